"""The benchmark's numerics: the parabola's best piecewise linear functions in closed form, encoders, Zolotarev's errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from rsae import fit_gate

PATH = Path(__file__).parents[1] / "benchmarks" / "separation.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="benchmarks are not part of the source distribution")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("separation", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parabola(x):
    return x**2


@pytest.mark.parametrize("m", [1, 2, 7, 100])
def test_parabola_needs_m_pieces_for_an_error_of_one_over_8_m_squared(benchmark, m):
    eps = 1 / (8 * m**2)  # of x^2 on [0, 1]: pieces of length 1 / m, |f''| h^2 / 16 each
    assert benchmark.fewest_pieces(parabola, 0.0, 1.0, 1.01 * eps) == m
    assert benchmark.fewest_pieces(parabola, 0.0, 1.0, 0.99 * eps) == m + 1
    knots, values = benchmark.polyline(parabola, 0.0, 1.0, 1.01 * eps)
    assert len(knots) == m + 1
    x = np.linspace(0, 1, 10001)
    assert np.abs(np.interp(x, knots, values) - x**2).max() == pytest.approx(1.01 * eps, rel=1e-3)


def test_parabola_has_exponent_one_half(benchmark):
    errors = 10.0 ** -np.arange(3, 7)
    counts = [benchmark.fewest_pieces(parabola, 0.0, 1.0, eps) for eps in errors]
    assert np.polyfit(-np.log(errors), np.log(counts), 1)[0] == pytest.approx(0.5, abs=0.01)


def test_encoders_are_the_even_polyline_with_half_of_all_or_two_latents_active(benchmark):
    knots, values = benchmark.polyline(lambda x: 1 / (1 + 25 * x**2), 0.0, 1.0, 1e-3)
    x = np.sort(np.concatenate([np.linspace(-1, 1, 5001), knots, -knots]))
    expected = np.interp(np.abs(x), knots, values)
    x_hat, active = benchmark.relu_encoder(knots, values)(x)
    np.testing.assert_allclose(x_hat, expected, atol=1e-12)
    assert active.max() == len(knots) - 1
    x_hat, active = benchmark.topk_encoder(knots, values, 1e-6)(x, k=2)
    np.testing.assert_allclose(x_hat, expected, atol=1.01e-6)
    assert (active == 2).all()


@pytest.mark.parametrize(("n", "delta"), [(1, 0.1), (3, 0.01), (8, 0.1), (8, 0.001)])
def test_zolotarev_is_the_best_sign(benchmark, n, delta):
    if n == 1:  # a x on [delta, 1]: off by (1 - delta) / (1 + delta)
        assert benchmark.zolotarev(1, delta) == pytest.approx((1 - delta) / (1 + delta), rel=1e-12)
    assert fit_gate("sign", (n, n), delta=delta).max_error == pytest.approx(benchmark.zolotarev(n, delta), rel=1e-8)


def test_symmetric_gap_gives_the_best_heaviside(benchmark):
    assert benchmark.symmetric_gap(0.0, 0.03) == pytest.approx(0.03, rel=1e-12)
    half = benchmark.zolotarev(6, benchmark.symmetric_gap(-0.4, 0.02)) / 2
    assert fit_gate("heaviside", (6, 6), theta=-0.4, delta=0.02).max_error == pytest.approx(half, rel=1e-8)


def test_results_are_written(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "ETAS", (0.3,))
    monkeypatch.setattr(benchmark, "ERRORS", (1e-2, 1e-3))
    monkeypatch.setattr(benchmark, "DELTAS", (0.1, 0.05))
    monkeypatch.setattr(benchmark, "LEVELS", (1e-2, 1e-3))
    monkeypatch.setattr(benchmark, "FLOOR", 1e-4)
    benchmark.write(benchmark.measure(), tmp_path)
    results = json.loads((tmp_path / "separation.json").read_text())
    assert set(results) == {"separation", "levels", "growth", "relu", "seconds", "provenance"}
    (separation,) = results["separation"]
    assert separation["rational_error"] < 1e-14
    for eps, row in zip((1e-2, 1e-3), separation["rows"], strict=True):
        assert row["sup_error"] == pytest.approx(eps, rel=1e-6)
        assert row["bound"] <= row["relu"] <= row["bound"] + 4
        assert (row["at_once"], row["topk_at_once"]) == (row["relu"] // 2, 2)
    assert [growth["gate"] for growth in results["growth"]] == ["sign", "heaviside", "jumprelu"]
    for growth in results["growth"]:
        for gap in growth["gaps"]:
            assert gap["rate"] == pytest.approx(gap["rate_theory"], rel=0.02)
            assert all(n <= m for n, m in zip(gap["least"], gap["least_theory"], strict=True))
    assert results["relu"]["rows"][0] | {"notes": []} == {
        "n": 2,
        "error": pytest.approx(2.18445e-2, rel=1e-5),
        "converged": True,
        "notes": [],
        "over_stahl": pytest.approx(0.4643, rel=1e-3),
    }
    assert (tmp_path / "SEPARATION.md").read_text().startswith("# Rational gates")
    assert (tmp_path / "separation.svg").read_text().startswith("<svg")


def test_a_fit_that_did_not_converge_is_named_and_proves_no_least_degree(benchmark):
    rows = [{"n": n, "error": e, "converged": n != 3} for n, e in ((2, 1e-1), (3, 1e-2), (4, 1e-3))]
    assert benchmark._converged(rows) == "2 of 3 (not n = 3)"
    assert (benchmark._least(rows, 1e-1), benchmark._least(rows, 1e-2), benchmark._least(rows, 1e-3)) == (2, None, None)
