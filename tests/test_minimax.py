"""The fit against verified min-max errors, Zolotarev's closed form, and alternation checked in mpmath on points of our own."""

import doctest
import json
import warnings
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsae import minimax, remez
from rsae.minimax import NumericalWarning, RationalFit, fit_gate, save_picture

# Each row names its source: mpmath Remez with 50-190 digits, Zolotarev's closed form, or an exact value.
REFERENCE = json.loads((Path(__file__).parent / "data" / "minimax.json").read_text())
BY_NAME = {
    "relu": lambda t, theta: np.maximum(t, 0),
    "abs": lambda t, theta: np.abs(t),
    "jumprelu": lambda t, theta: t * (t > theta),
    "heaviside": lambda t, theta: (t > theta).astype(float),
    "sign": lambda t, theta: np.sign(t - theta),
}


def dense(domain, centre, n=6000):
    """Our own grid: uniform, and log-spaced towards every end of the domain, 0 and the centre."""
    steps = np.geomspace(1e-11, 2, n)
    points = [np.linspace(-1, 1, 20001), np.ravel(domain)]
    points += [c + side * steps for c in {0.0, centre, *np.ravel(domain).tolist()} for side in (-1, 1)]
    t = np.unique(np.concatenate(points))
    return t[np.any([(low <= t) & (t <= high) for low, high in domain], axis=0)]


def by_hand(fit, t):
    """P(u) and A(u) by numpy's polyval, independently of the fit's own evaluation."""
    u = (t - fit.centre) / fit.scale
    return np.polyval(fit.num_coeffs[::-1], u), np.polyval([*fit.den_coeffs[::-1], 0.0], u)


def peaks(t, e):
    """The largest |e| in each run of one sign."""
    runs = np.split(np.arange(len(t)), np.flatnonzero(np.diff(np.sign(e))) + 1)
    return np.array([run[np.argmax(np.abs(e[run]))] for run in runs])


@pytest.mark.parametrize("row", REFERENCE, ids=lambda r: f"{r['target']}-{r['theta']}-{r['delta']}-{r['p']}-{r['q']}")
def test_error_is_the_reference_error(row):
    where = {} if row["theta"] is None else {"theta": row["theta"], "delta": row["delta"]}
    fit = fit_gate(row["target"], (row["p"], row["q"]), **where)
    rel = 1e-6 if row["q"] <= 12 else 1e-4
    assert fit.max_error == pytest.approx(row["minimax_error"], rel=rel)
    assert fit.converged
    assert fit.notes == ()
    assert (len(fit.num_coeffs), len(fit.den_coeffs)) == (row["p"] + 1, row["q"])
    t = dense(row["domain"], fit.centre)
    P, A = by_hand(fit, t)
    assert A.min() >= -1e-12
    gate = BY_NAME[row["target"]](t, row["theta"])
    assert np.abs(gate - P / (1 + A)).max() == pytest.approx(row["minimax_error"], rel=rel)
    np.testing.assert_allclose(fit(t), P / (1 + np.abs(A)), rtol=1e-9, atol=1e-13)


def zolotarev(n, l):
    """Best error of sign(x) on [-1, -l] u [l, 1] among types (n, n): the modulus whose nome is exp(-2 pi n K(l)/K'(l))."""
    with mpmath.workdps(40):
        nome = mpmath.exp(-2 * mpmath.pi * n * mpmath.ellipk(l**2) / mpmath.ellipk(1 - l**2))
        return (mpmath.jtheta(2, 0, nome) / mpmath.jtheta(3, 0, nome)) ** 2


@pytest.mark.parametrize(
    ("n", "theta", "delta"),
    [
        (8, 0.3, 0.007),
        (12, -0.62, 0.0004),
        (5, 0.91, 0.02),
        (9, -0.05, 1e-4),
        (1, 0.4, 0.3),
        (4, 0.0, 0.02),
        (3, 0, 0.3),
    ],
)
def test_jumps_by_the_closed_form(n, theta, delta):
    with mpmath.workdps(40):
        a, b, c, d = -1, mpmath.mpf(theta) - mpmath.mpf(delta), mpmath.mpf(theta) + mpmath.mpf(delta), 1
        ratio = 2 * (c - a) * (d - b) / ((d - a) * (c - b)) - 1  # of the four ends, as of -1, -l, l, 1
        error = float(zolotarev(n, 1 / (ratio + mpmath.sqrt(ratio**2 - 1))))
    assert fit_gate("sign", (n, n), theta=theta, delta=delta).max_error == pytest.approx(error, rel=1e-6)
    assert fit_gate("heaviside", (n, n), theta=theta, delta=delta).max_error == pytest.approx(error / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("gate", "degree", "theta", "delta"),
    [
        ("jumprelu", (9, 8), 0.3, 0.002),
        ("jumprelu", (7, 6), -0.55, 0.01),
        ("jumprelu", (9, 8), -0.97, 0.003),
        ("jumprelu", (12, 12), 0.96, 1e-4),
        ("jumprelu", (5, 9), 0.2, 0.05),
        ("jumprelu", (11, 6), 0.2, 0.01),
        ("jumprelu", (6, 0), 0.2, 0.01),
        ("jumprelu", (3, 2), 0.0, 0.01),
        ("heaviside", (10, 9), 0.71, 0.004),
        ("relu", (4, 4), None, None),
        ("relu", (4, 3), None, None),
        ("relu", (2, 6), None, None),
        ("relu", (7, 0), None, None),
        ("abs", (5, 5), None, None),
        ("abs", (3, 7), None, None),
        ("sign", (9, 12), 0.0, 0.02),
    ],
)
def test_alternation_in_mpmath_proves_other_rows_optimal(gate, degree, theta, delta):
    """de la Vallée Poussin: no error of this type is below the least of p + q + 2 - defect alternating ones."""
    fit = fit_gate(gate, degree, theta=theta, delta=delta)
    t = dense(fit.domain, fit.centre, 60000)
    e = BY_NAME[gate](t, theta) - fit(t)
    highest = np.abs(e).max()
    assert fit.max_error == pytest.approx(highest, rel=1e-6)
    at = t[peaks(t, e)]
    with mpmath.workdps(50):
        u = [(mpmath.mpf(float(x)) - mpmath.mpf(fit.centre)) / mpmath.mpf(fit.scale) for x in at]
        A = [mpmath.polyval([mpmath.mpf(c) for c in (*fit.den_coeffs[::-1], 0.0)], x) for x in u]
        P = [mpmath.polyval([mpmath.mpf(c) for c in fit.num_coeffs[::-1]], x) for x in u]
        exact = [
            float(mpmath.mpf(float(BY_NAME[gate](x, theta))) - p / (1 + a)) for x, p, a in zip(at, P, A, strict=True)
        ]
    assert min(A) > -1e-12
    levelled = np.array([value for value in exact if abs(value) >= (1 - 1e-6) * highest])
    zeros = [len(c) - 1 - max(np.flatnonzero(c)) for c in (np.array(fit.num_coeffs), np.array([1.0, *fit.den_coeffs]))]
    assert 1 + np.count_nonzero(np.diff(np.sign(levelled))) >= sum(degree) + 2 - min(zeros)


def test_relu_is_half_of_abs():
    for p, q in ((3, 2), (6, 4), (9, 8), (5, 1), (4, 0)):
        assert fit_gate("relu", (p, q)).max_error == pytest.approx(fit_gate("abs", (p, q)).max_error / 2, rel=1e-9)


def test_heaviside_is_half_of_sign_and_reflects():
    sign = fit_gate("sign", (9, 8), theta=0.37, delta=0.01).max_error
    assert fit_gate("heaviside", (9, 8), theta=0.37, delta=0.01).max_error == pytest.approx(sign / 2, rel=1e-7)
    assert fit_gate("heaviside", (9, 8), theta=-0.37, delta=0.01).max_error == pytest.approx(sign / 2, rel=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    gate=st.sampled_from(["jumprelu", "heaviside"]),
    theta=st.floats(-0.95, 0.95),
    log_delta=st.floats(-4, -0.5),
    p=st.integers(1, 13),
    q=st.integers(0, 12),
)
def test_any_fit_is_proven_optimal_or_says_that_it_is_not(gate, theta, log_delta, p, q):
    delta = 10**log_delta * (1 - abs(theta))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = fit_gate(gate, (p, q), theta=theta, delta=delta)
    assert fit.converged != any(issubclass(w.category, NumericalWarning) for w in caught)
    assert fit.converged == (fit.notes == ())
    t = dense(fit.domain, fit.centre, 12000)
    e = BY_NAME[gate](t, theta) - fit(t)
    assert np.abs(e).max() <= fit.max_error * (1 + 1e-6) + 1e-14
    if fit.converged:
        assert by_hand(fit, np.linspace(-1, 1, 20001))[1].min() >= -1e-12  # Q = 1 + A >= 1, in the gap too
    if fit.converged and fit.max_error > 1e-8:
        level = e[peaks(t, e)]
        level = level[np.abs(level) >= (1 - 1e-4) * fit.max_error]
        zeros = [len(c) - 1 - max(np.flatnonzero(c)) for c in (fit.num_coeffs, [1.0, *fit.den_coeffs])]
        assert 1 + np.count_nonzero(np.diff(np.sign(level))) >= p + q + 2 - min(zeros)


def test_mse_is_the_mean_over_the_uniform_grid_without_the_gap():
    fit = fit_gate("relu", (3, 2))
    t = np.linspace(-1, 1, 4001)
    assert fit.mse == pytest.approx(np.mean((np.maximum(t, 0) - fit(t)) ** 2), rel=1e-12)
    assert fit.mse == pytest.approx(2.3e-4, rel=0.03)  # an earlier, independent fit
    fit = fit_gate("jumprelu", (5, 4), theta=0.25, delta=0.1, grid=201)
    t = np.linspace(-1, 1, 201)
    t = t[(t <= fit.domain[0][1]) | (t >= fit.domain[1][0])]
    assert fit.mse == pytest.approx(np.mean((t * (t > 0.25) - fit(t)) ** 2), rel=1e-12)


def silu(t):
    return t / (1 + np.exp(-t))


def shifted_abs(t):
    return np.abs(t - 0.3)


def test_callables():
    fit = fit_gate(silu, (5, 4), domain=[(-8, 8)])
    assert (fit.gate, fit.converged, fit.domain) == ("silu", True, ((-8.0, 8.0),))
    t = np.linspace(-8, 8, 40001)
    e = silu(t) - fit(t)
    assert np.abs(e).max() == pytest.approx(fit.max_error, rel=1e-6)
    assert np.count_nonzero(np.abs(e[peaks(t, e)]) > (1 - 1e-5) * fit.max_error) >= 11
    step = fit_gate(lambda t: (t > 0.3) * 1.0, (8, 8), domain=[(-1, 0.29), (0.31, 1)])
    assert step.max_error == pytest.approx(fit_gate("heaviside", (8, 8), theta=0.3, delta=0.01).max_error, rel=1e-7)
    assert fit_gate(shifted_abs, (9, 8), domain=[(-1, 1)]).converged  # a kink that nobody told it of
    chord = (1 - (np.e - 1) * (1 - np.log(np.e - 1))) / 2  # the chord's slope, and the tangent that has it
    assert fit_gate(np.exp, (1, 0), domain=[(0, 1)]).max_error == pytest.approx(chord, rel=1e-9)


@pytest.mark.parametrize(
    ("f", "degree"),
    [
        (lambda t: 0 * t, (3, 2)),
        (lambda t: 0 * t + 2, (1, 4)),
        (lambda t: 1 / (1 + t * t), (5, 4)),
        (lambda t: t, (9, 8)),
    ],
)
def test_what_is_already_rational_comes_back(f, degree):
    fit = fit_gate(f, degree, domain=[(-1, 1)])
    assert fit.converged
    assert fit.max_error < 1e-13


# ---- failures are detected


def test_a_jump_without_a_gap_is_said_to_fail():
    with pytest.warns(NumericalWarning, match=r"degree \(3, 2\): no optimum of type \(3, 2\) was found"):
        fit = fit_gate(lambda t: (t > 0.3) * 1.0, (3, 2), domain=[(-1, 1)])
    assert not fit.converged
    assert np.isfinite(fit(np.linspace(-1, 1, 101))).all()


def test_an_error_below_rounding_is_said_to_fail():
    with pytest.warns(NumericalWarning, match="lower the degree"):
        assert not fit_gate(np.tanh, (9, 8), domain=[(-3.5, 3.5)]).converged


def test_an_exchange_that_never_works_leaves_a_polynomial(monkeypatch):
    def broken(*_):
        raise remez.Failed("out of order")

    monkeypatch.setattr(minimax, "solve", broken)
    with pytest.warns(NumericalWarning, match="out of order.*least-squares polynomial of degree 8 stands in"):
        fit = fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.05)
    assert not fit.converged
    assert fit.max_error < 0.1
    assert (len(fit.num_coeffs), len(fit.den_coeffs)) == (10, 8)


def test_a_lower_type_stands_in_where_one_type_fails(monkeypatch):
    def broken(problem, solve=remez.solve):
        if (problem.p, problem.q) == (9, 8):
            raise remez.Failed("out of order")
        return solve(problem)

    monkeypatch.setattr(minimax, "solve", broken)
    with pytest.warns(NumericalWarning, match=r"type \(8, 7\) stands in"):
        fit = fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.05)
    lower = fit_gate("jumprelu", (8, 7), theta=0.1, delta=0.05)
    assert not fit.converged
    assert fit.max_error == pytest.approx(lower.max_error, rel=1e-9)
    assert fit.degree == (9, 8)


@pytest.mark.parametrize("part", ["num", "den"])
def test_a_wrong_optimum_is_found_out(monkeypatch, part):
    def off(problem, solve=remez.solve):
        level = solve(problem)
        wrong = getattr(level, part) * (1 + 1e-5 * np.arange(len(getattr(level, part))))
        return minimax.replace(level, **{part: wrong})

    monkeypatch.setattr(minimax, "solve", off)
    with pytest.warns(NumericalWarning, match="alternating extrema reach the largest error, 19 would prove"):
        fit = fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.01)
    assert not fit.converged


# ---- the published initialisation


def test_relaxed_remez_is_seeded_safe_and_above_the_optimum():
    fit = fit_gate("relu", (3, 2), method="relaxed-remez")
    assert fit == fit_gate("relu", (3, 2), method="relaxed-remez", seed=0)
    assert fit != fit_gate("relu", (3, 2), method="relaxed-remez", seed=1)
    t = np.linspace(-1, 1, 20001)
    assert np.abs(np.maximum(t, 0) - fit(t)).max() == pytest.approx(fit.max_error, rel=1e-5)
    assert 0.0218445 < fit.max_error < 3 * 0.0218445
    assert fit.method == "relaxed-remez"


# ---- files


def test_json_round_trip():
    fit = fit_gate("jumprelu", (5, 4), theta=0.1, delta=0.02)
    again = RationalFit.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert again == fit
    with pytest.raises(ValueError, match=r"unknown: \['colour'\], missing: \[\]"):
        RationalFit.from_dict({**fit.to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match=r"missing: \['scale'\]"):
        RationalFit.from_dict({key: value for key, value in fit.to_dict().items() if key != "scale"})
    with pytest.raises(ValueError, match="needs 6 num_coeffs and 4 den_coeffs, got 6 and 3"):
        RationalFit.from_dict({**fit.to_dict(), "den_coeffs": fit.den_coeffs[:-1]})


def test_picture_is_one_file(tmp_path):
    save_picture(fit_gate("jumprelu", (5, 4), theta=0.1, delta=0.02), tmp_path / "gate.html")
    html = (tmp_path / "gate.html").read_text()
    assert "max error" in html
    assert "<script src=" not in html
    with pytest.raises(ValueError, match="unknown gate 'silu'"):
        save_picture(fit_gate(silu, (3, 2), domain=[(-4, 4)]), tmp_path / "silu.html")


def test_docstring_examples():
    assert doctest.testmod(minimax).failed == 0


# ---- bad input

JUMP = {"theta": 0.1, "delta": 0.01}


@pytest.mark.parametrize(
    ("gate", "degree", "options", "message"),
    [
        ("gelu", (3, 2), {}, "unknown gate 'gelu': use one of relu, jumprelu, heaviside, sign, abs"),
        (None, (3, 2), {}, "unknown gate None"),
        ("relu", (0, 2), {}, r"p >= 1 and q >= 0; got \(0, 2\)"),
        ("relu", (3, -1), {}, "p >= 1 and q >= 0"),
        ("relu", (3.0, 2), {}, "two integers"),
        ("relu", (True, 2), {}, "two integers"),
        ("relu", 3, {}, "two integers"),
        ("relu", (3, 2, 1), {}, "two integers"),
        ("relu", (3, 2), {"theta": 0.1}, "has no threshold"),
        ("relu", (3, 2), {"domain": [(-1, 1)]}, "leave out domain"),
        ("jumprelu", (3, 2), {}, "needs a threshold -1 < theta < 1; got theta=None"),
        ("jumprelu", (3, 2), {"theta": 1.0, "delta": 0.01}, "got theta=1.0"),
        ("jumprelu", (3, 2), {"theta": float("nan"), "delta": 0.01}, "got theta=nan"),
        ("jumprelu", (3, 2), {"theta": "0.1", "delta": 0.01}, "got theta='0.1'"),
        ("jumprelu", (3, 2), {"theta": 0.1}, "needs a gap 0 < delta < 1 - .theta. = 0.9, .*got delta=None"),
        ("heaviside", (3, 2), {"theta": 0.1, "delta": 0.0}, "got delta=0.0"),
        ("heaviside", (3, 2), {"theta": -0.4, "delta": 0.6}, "got delta=0.6"),
        ("sign", (3, 2), {"delta": 1.0}, "got delta=1.0"),
        ("sign", (3, 2), {"theta": 0.5, "delta": 1e-18}, "lost in rounding"),
        ("jumprelu", (3, 2), {**JUMP, "method": "remez"}, "minimax, relaxed-remez; got 'remez'"),
        ("jumprelu", (3, 2), {**JUMP, "grid": 1}, "grid must be an integer >= 2"),
        ("jumprelu", (3, 2), {**JUMP, "grid": 10.5}, "grid must be an integer"),
        (np.tanh, (3, 2), {}, "needs its domain"),
        (np.tanh, (3, 2), {"domain": [(-1, 1)], "theta": 0.1}, "leave out theta and delta"),
        (np.tanh, (3, 2), {"domain": [(1, -1)]}, "ascending and disjoint"),
        (np.tanh, (3, 2), {"domain": [(-1, 0.2), (0.1, 1)]}, "ascending and disjoint"),
        (np.tanh, (3, 2), {"domain": [(-1, np.inf)]}, "finite intervals"),
        (np.tanh, (3, 2), {"domain": []}, "ascending and disjoint"),
        (np.tanh, (3, 2), {"domain": 3}, "list of intervals"),
        (np.tanh, (3, 2), {"domain": (-1, 1)}, "list of intervals"),
        (lambda t: np.where(t > 0.5, np.nan, t), (3, 2), {"domain": [(-1, 1)]}, "250 nan or inf"),
        (lambda t: 1.0, (3, 2), {"domain": [(-1, 1)]}, r"got shape \(\)"),
    ],
)
def test_bad_input(gate, degree, options, message):
    with pytest.raises(ValueError, match=message):
        fit_gate(gate, degree, **options)
