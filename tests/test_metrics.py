"""Metrics against hand arithmetic, numpy and scipy; streaming against whole; each trap of other tools."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsae.metrics import (
    ArmSums,
    DocumentSums,
    LossMetrics,
    ReconstructionMetrics,
    paired_difference,
    verdict,
)

# The example worked out by hand, used below: 3 tokens, d_in 2, 2 latents, documents 7, 7, 9.
#   x        (0,0) (3,0) (0,3)      mean (1,1)       ||x - mean||^2   2, 5, 5   -> document 7: 7, document 9: 5, all: 12
#   x_hat    (0,1) (3,0) (1,3)                       ||x - x_hat||^2  1, 0, 1   -> document 7: 1, document 9: 1, all: 2
#   latents  (0,0) (2,0) (-1,0)     fires: 0, 1, 1 latents a token; latent 0 on 2 tokens of 3, latent 1 never
X = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
X_HAT = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 3.0]])
LATENTS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
DOCUMENTS = torch.tensor([7, 7, 9])


def reconstruction(
    x: torch.Tensor, x_hat: torch.Tensor, latents: torch.Tensor, documents: torch.Tensor, splits: tuple[int, ...] = ()
) -> ReconstructionMetrics:
    """The accumulator fed with the tokens cut at `splits`."""
    metrics = ReconstructionMetrics(x.shape[1], latents.shape[1])
    edges = [0, *splits, len(x)]
    for i, j in itertools.pairwise(edges):
        metrics.update(x[i:j], x_hat[i:j], latents[i:j], documents[i:j])
    return metrics


def arm(fvu: tuple[np.ndarray, np.ndarray], delta_ce: tuple[np.ndarray, np.ndarray] | None = None) -> ArmSums:
    """Per-document sums from numpy (numerator, denominator); the loss like the FVU if not given."""

    def sums(pair: tuple[np.ndarray, np.ndarray]) -> DocumentSums:
        numerator, denominator = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in pair)
        return DocumentSums(torch.arange(len(numerator)), numerator, denominator)

    return ArmSums(sums(fvu), sums(delta_ce or fvu))


def test_reconstruction_by_hand() -> None:
    metrics = reconstruction(X, X_HAT, LATENTS, DOCUMENTS)
    result = metrics.compute()
    assert result["mse"] == pytest.approx(2 / 3, abs=1e-15)
    assert result["fvu"] == pytest.approx(2 / 12, abs=1e-15)
    assert result["explained_variance"] == pytest.approx(10 / 12, abs=1e-15)
    assert result["l0"] == 2 / 3
    assert result["alive"] == 1 / 2
    assert result["dense"] == 1 / 2  # latent 0 fires on 67% of the tokens
    assert result["negative"] == 1 / 2  # 2 and -1 fire
    assert (result["n_tokens"], result["n_documents"]) == (3, 2)
    assert "z != 0" in result["counting_rule"]
    # L0 of the tokens: 0, 1, 1; bins of width 1.
    assert result["histograms"]["l0"] == {"edges": [0, 1, 2], "counts": [1, 2]}
    # Density 2/3 = 10^-0.18: the last but one of ten bins from 0.1 to 1.
    density = result["histograms"]["log10_density"]
    assert density["counts"] == [0] * 8 + [1, 0]
    assert density["edges"] == [-1, -0.9, -0.8, -0.7, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0]
    assert density["dead"] == 1
    sums = metrics.document_sums()
    assert sums.documents.tolist() == [7, 9]
    torch.testing.assert_close(sums.numerator, torch.tensor([1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(sums.denominator, torch.tensor([7.0, 5.0], dtype=torch.float64))
    json.dumps(result, allow_nan=False)


def test_loss_by_hand() -> None:
    metrics = LossMetrics()
    metrics.update(
        torch.tensor([1.0, 2.0, 3.0]),  # mean 2
        torch.tensor([2.0, 2.0, 4.0]),  # mean 8/3, 2/3 above clean
        torch.tensor([5.0, 5.0, 5.0]),  # recovered (5 - 8/3) / (5 - 2) = 7/9
        torch.tensor([4.0, 4.0, 4.0]),  # recovered (4 - 8/3) / (4 - 2) = 2/3
        torch.tensor([0.125, 0.25, 0.75]),  # mean 0.375
        DOCUMENTS,
    )
    result = metrics.compute()
    expected = {
        "ce_clean": 2,
        "ce_spliced": 8 / 3,
        "delta_ce": 2 / 3,
        "ce_zero_ablated": 5,
        "ce_mean_ablated": 4,
        "loss_recovered": 7 / 9,
        "loss_recovered_mean": 2 / 3,
        "kl": 0.375,
        "n_ce_tokens": 3,
        "n_ce_documents": 2,
    }
    assert result == pytest.approx(expected, abs=1e-15)
    sums = metrics.document_sums()
    assert sums.numerator.tolist() == [1, 1]  # documents 7 (1 + 0) and 9 (1)
    assert sums.denominator.tolist() == [2, 1]


def test_loss_recovered_is_none_where_the_ablation_changes_nothing() -> None:
    metrics = LossMetrics()
    ones = torch.ones(2)
    metrics.update(ones, 2 * ones, ones, 3 * ones, ones, torch.tensor([0, 1]))
    result = metrics.compute()
    assert result["loss_recovered"] is None
    assert result["loss_recovered_mean"] == 0.5


def splits_and_tokens() -> st.SearchStrategy[tuple[int, tuple[int, ...], int]]:
    """Number of tokens, where they are cut, seed."""
    return st.integers(2, 60).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.integers(0, n), max_size=6).map(lambda cuts: tuple(sorted(cuts))),
            st.integers(0, 999),
        )
    )


@settings(max_examples=60, deadline=None)
@given(case=splits_and_tokens(), offset=st.sampled_from([0.0, 1e4]), bf16=st.booleans())
def test_streaming_equals_whole_whatever_the_split(
    case: tuple[int, tuple[int, ...], int], offset: float, bf16: bool
) -> None:
    n, splits, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(n, 5, generator=generator)
    x[0, 0] += offset  # the first token, about which the spread is summed, is an outlier
    if bf16:
        x = x.bfloat16()
    x_hat = x.float() + 0.3 * torch.randn(n, 5, generator=generator)
    latents = torch.randn(n, 7, generator=generator) * (torch.rand(n, 7, generator=generator) < 0.3)
    documents = torch.randint(-3, 4, (n,), generator=generator) * 10**12
    whole = reconstruction(x, x_hat, latents, documents)
    parts = reconstruction(x, x_hat, latents, documents, splits)
    flat_whole, flat_parts = whole.compute(), parts.compute()
    for exact in ("histograms", "counting_rule"):
        assert flat_whole.pop(exact) == flat_parts.pop(exact)
    assert flat_whole == pytest.approx(flat_parts, rel=1e-9)
    # ... and the FVU is that of numpy's float64 on everything at once, its denominators by document too.
    x64, x_hat64 = x.double().numpy(), x_hat.double().numpy()
    centred = ((x64 - x64.mean(0)) ** 2).sum(1)
    assert flat_parts["fvu"] == pytest.approx(((x64 - x_hat64) ** 2).sum() / centred.sum(), rel=1e-9)
    by_document = [centred[documents.numpy() == d].sum() for d in np.unique(documents.numpy())]
    np.testing.assert_allclose(parts.document_sums().denominator, by_document, rtol=1e-9, atol=1e-9 * centred.sum())
    assert flat_parts["l0"] == np.count_nonzero(latents.numpy()) / n

    losses = torch.randn(5, n, generator=generator).abs()
    together, apart = LossMetrics(), LossMetrics()
    together.update(*losses, documents)
    for i, j in zip([0, *splits], [*splits, n], strict=True):
        apart.update(*losses[:, i:j], documents[i:j])
    assert together.compute() == pytest.approx(apart.compute(), rel=1e-9)


def test_rows_beyond_one_scratch_buffer_are_counted() -> None:
    latents = torch.zeros(5000, 3)  # more than two buffers of 2048
    latents[:, 1] = 1
    latents[4999, 2] = -1
    x = torch.arange(5000.0)[:, None]
    result = reconstruction(x, x, latents, torch.zeros(5000, dtype=torch.int64)).compute()
    assert result["l0"] == 5001 / 5000
    assert result["negative"] == 1 / 5001
    assert result["alive"] == 2 / 3
    assert result["dense"] == 1 / 3


def test_memory_grows_with_documents_not_tokens() -> None:
    metrics = ReconstructionMetrics(2, 2)
    for _ in range(200):
        metrics.update(X, X_HAT, LATENTS, DOCUMENTS)
    assert len(metrics._table._sums) <= 4  # two documents, doubled at most
    assert metrics.compute()["n_tokens"] == 600
    assert metrics.compute()["fvu"] == pytest.approx(1 / 6)


# Traps seen in other tools.


def test_the_mean_predictor_explains_nothing() -> None:
    # Squared before averaging, it would score above 0 on coordinates of unlike variance.
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5
    x_hat = x.double().mean(0).expand_as(x)
    result = reconstruction(x, x_hat, torch.ones(300, 1), torch.arange(300) // 10, (7, 100)).compute()
    assert result["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert result["fvu"] == pytest.approx(1, abs=1e-12)


def test_fvu_is_a_ratio_of_sums_not_a_mean_of_batch_ratios() -> None:
    # First batch: sse 2, spread about its own mean 2; second: sse 0, spread 200. The mean of ratios would be 1/2.
    x = torch.tensor([[-1.0], [1.0], [-10.0], [10.0]])
    x_hat = torch.tensor([[0.0], [0.0], [-10.0], [10.0]])
    result = reconstruction(x, x_hat, torch.ones(4, 1), torch.tensor([0, 0, 1, 1]), (2,)).compute()
    assert result["fvu"] == pytest.approx(2 / 202)


def test_mse_is_divided_by_tokens_once_and_not_by_d_in() -> None:
    x = torch.zeros(10, 8)
    x[0] = 1
    result = reconstruction(x, x + 2, torch.ones(10, 1), torch.arange(10), (3, 4)).compute()
    assert result["mse"] == 8 * 4


def test_signed_latents_count_as_non_zero_and_are_reported() -> None:
    latents = torch.tensor([[-1.0, 0.0], [-1e-30, 0.0], [0.5, -0.0]])
    result = reconstruction(X, X_HAT, latents, DOCUMENTS).compute()
    assert result["l0"] == 1  # as z > 0 it would be 1/3; -0.0 is zero
    assert result["negative"] == 2 / 3
    assert result["alive"] == 1 / 2


def test_a_counting_threshold_stands_beside_the_number() -> None:
    latents = torch.tensor([[0.05, 0.1], [2.0, -0.05], [-1.0, 0.0]])
    metrics = ReconstructionMetrics(2, 2, eps=0.1)
    metrics.update(X, X_HAT, latents, DOCUMENTS)
    result = metrics.compute()
    assert result["l0"] == 2 / 3  # 2 and -1; 0.1 itself is not above eps
    assert result["alive"] == 1 / 2
    assert result["negative"] == 1 / 2
    assert "|z| > 0.1" in result["counting_rule"]
    assert "set to 0" in result["counting_rule"]


def test_dense_is_strictly_more_than_a_tenth() -> None:
    latents = torch.zeros(20, 2)
    latents[:2, 0] = 1  # exactly 10%
    latents[:3, 1] = 1
    x = torch.arange(20.0)[:, None]
    result = reconstruction(x, x, latents, torch.zeros(20, dtype=torch.int64)).compute()
    assert result["dense"] == 1 / 2
    assert result["alive"] == 1


def test_a_silent_dictionary_has_no_negative_share_and_all_dead() -> None:
    result = reconstruction(X, X_HAT, torch.zeros(3, 4), DOCUMENTS).compute()
    assert (result["l0"], result["alive"], result["negative"]) == (0, 0, 0)
    assert result["histograms"]["log10_density"]["dead"] == 4
    assert result["histograms"]["l0"] == {"edges": [0, 1], "counts": [3]}


def test_histograms_hold_every_token_and_every_latent() -> None:
    latents = (torch.rand(1000, 400, generator=torch.Generator().manual_seed(0)) < torch.logspace(-4, 0, 400)).float()
    latents[:, -1] = 1  # density exactly 1: the last bin, not beyond it
    x = torch.arange(1000.0)[:, None]
    histograms = reconstruction(x, x, latents, torch.zeros(1000, dtype=torch.int64)).compute()["histograms"]
    l0, density = histograms["l0"], histograms["log10_density"]
    counts, _ = np.histogram(latents.count_nonzero(1).numpy(), l0["edges"])
    assert counts.tolist() == l0["counts"]
    assert sum(l0["counts"]) == 1000
    assert len(l0["counts"]) <= 64
    fires = latents.count_nonzero(0).numpy()
    assert density["dead"] == (fires == 0).sum()
    assert sum(density["counts"]) + density["dead"] == 400
    edges = np.array(density["edges"]) - 1e-9  # a density on an edge belongs to the bin that begins there
    counts, _ = np.histogram(np.log10(fires[fires > 0] / 1000), np.append(edges[:-1], 1e-9))
    assert counts.tolist() == density["counts"]
    assert len(density["edges"]) == len(density["counts"]) + 1


# Bad input.


@pytest.mark.parametrize(
    ("x", "x_hat", "latents", "documents", "message"),
    [
        (X[:, :1], X_HAT, LATENTS, DOCUMENTS, r"x must be \(3, 2\).*got \(3, 1\)"),
        (X, X_HAT[:2], LATENTS, DOCUMENTS, r"x_hat must be \(3, 2\).*got \(2, 2\)"),
        (X, X_HAT, LATENTS.repeat(1, 2), DOCUMENTS, r"latents must be \(3, 2\).*got \(3, 4\)"),
        (X, X_HAT, LATENTS, DOCUMENTS[:2], "beside 2 documents"),
        (X, X_HAT, LATENTS.where(LATENTS != 2, math.nan), DOCUMENTS, "nan or inf in latents"),
        (X, X_HAT, LATENTS.where(LATENTS != 2, -math.inf), DOCUMENTS, "nan or inf in latents"),
        (X, X_HAT.where(X_HAT != 1, math.inf), LATENTS, DOCUMENTS, "nan or inf in x_hat"),
        (X.where(X != 3, math.nan), X_HAT, LATENTS, DOCUMENTS, "nan or inf in x "),
    ],
)
def test_reconstruction_refuses(
    x: torch.Tensor, x_hat: torch.Tensor, latents: torch.Tensor, documents: torch.Tensor, message: str
) -> None:
    metrics = ReconstructionMetrics(2, 2)
    with pytest.raises(ValueError, match=message):
        metrics.update(x, x_hat, latents, documents)


def test_loss_refuses() -> None:
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="nan or inf in kl"):
        LossMetrics().update(ones, ones, ones, ones, torch.tensor([0, 1, math.nan]), DOCUMENTS)
    with pytest.raises(ValueError, match=r"nll_zero must be \(3,\).*got \(2,\)"):
        LossMetrics().update(ones, ones, ones[:2], ones, ones, DOCUMENTS)


def test_nothing_measured_is_an_error() -> None:
    empty = torch.zeros(0, 2)
    metrics = ReconstructionMetrics(2, 2)
    metrics.update(empty, empty, empty, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tokens"):
        metrics.compute()
    with pytest.raises(ValueError, match="no predicted tokens"):
        LossMetrics().compute()
    with pytest.raises(ValueError, match="all 3 activations are equal"):
        reconstruction(torch.ones(3, 2), X_HAT, LATENTS, DOCUMENTS).compute()
    with pytest.raises(ValueError, match="eps must be"):
        ReconstructionMetrics(2, 2, eps=-1)


# The paired bootstrap and the verdict.


def documents(seed: int, count: int = 60) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """A generator, the spread and the squared error of `count` documents of very unlike lengths."""
    generator = np.random.default_rng(seed)
    sst = generator.lognormal(3, 1, count)
    return generator, sst, sst * generator.uniform(0.1, 0.3, count)


def level(**changes: float) -> dict[str, Any]:
    return {"alive": 0.95, "dense": 0.01} | changes


def test_identical_arms_tie_exactly() -> None:
    _, sst, sse = documents(0)
    difference = paired_difference(arm((sse, sst)), arm((sse, sst)), samples=200)
    assert difference == {"fvu": [0, 0, 0], "delta_ce": [0, 0, 0]}
    assert set(verdict(difference, level(), level()).values()) == {"tie"}


def test_a_constant_gain_is_exact_in_every_sample() -> None:
    # Every document's error is 20% lower, its loss 0.01 nats a token lower: so says every resample.
    generator, sst, sse = documents(1)
    tokens = generator.integers(20, 400, 60)
    nats = tokens * generator.normal(0.3, 0.1, 60)
    better = arm((0.8 * sse, sst), (nats - 0.01 * tokens, tokens))
    control = arm((sse, sst), (nats, tokens))
    difference = paired_difference(better, control)
    assert difference["fvu"] == pytest.approx([-0.2] * 3, abs=1e-12)
    assert difference["delta_ce"] == pytest.approx([-0.01] * 3, abs=1e-12)
    assert verdict(difference, level(), level()) == {"fvu": "win", "delta_ce": "win", "alive": "tie", "dense": "tie"}
    back = verdict(paired_difference(control, better), level(), level())
    assert (back["fvu"], back["delta_ce"]) == ("loss", "loss")


def test_the_interval_is_that_of_scipy() -> None:
    generator, sst, sse = documents(2)
    other = sse * generator.normal(0.97, 0.1, 60)
    got = paired_difference(arm((other, sst)), arm((sse, sst)), samples=20_000)["fvu"]

    def relative(a: np.ndarray, b: np.ndarray, spread: np.ndarray, axis: int = -1) -> np.ndarray:
        fvu_a, fvu_b = a.sum(axis) / spread.sum(axis), b.sum(axis) / spread.sum(axis)
        return (fvu_a - fvu_b) / fvu_b

    expected = scipy.stats.bootstrap(
        (other, sse, sst), relative, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    interval = expected.confidence_interval
    assert got[0] == pytest.approx(other.sum() / sse.sum() - 1, rel=1e-12)
    width = interval.high - interval.low
    assert got[1] == pytest.approx(interval.low, abs=0.03 * width)  # both are Monte Carlo: about 1% of the width
    assert got[2] == pytest.approx(interval.high, abs=0.03 * width)


def test_the_interval_covers_the_truth() -> None:
    # Two arms whose per-document FVUs differ by -0.02 of the control's on average and vary together from document to
    # document; tokens per document independent of the gain, so that -0.02 is also the ratio of expectations.
    covered, unpaired_width, width = 0, 0.0, 0.0
    for seed in range(200):
        generator, sst, _ = documents(1000 + seed, 80)
        sse = sst * generator.uniform(0.1, 0.3, 80)
        other = sse * (0.98 + generator.normal(0, 0.02, 80))
        _, low, high = paired_difference(arm((other, sst)), arm((sse, sst)), samples=400)["fvu"]
        covered += low <= -0.02 <= high
        width += high - low
        single = np.std(sse / sst) / np.mean(sse / sst) / np.sqrt(80)  # relative error of one arm's mean FVU
        unpaired_width += 2 * 1.96 * np.sqrt(2) * single
    assert 0.88 * 200 <= covered <= 0.99 * 200  # 95% less what a percentile interval over 80 lognormal documents loses
    assert width < unpaired_width / 5  # what pairing is for


def test_the_bootstrap_depends_on_its_seed_alone_and_not_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, sst, sse = documents(3)
    a, b = arm((sse * generator.normal(1, 0.1, 60), sst)), arm((sse, sst))
    first = paired_difference(a, b, samples=100, seed=4)
    torch.manual_seed(99)
    assert paired_difference(a, b, samples=100, seed=4) == first
    assert paired_difference(a, b, samples=100, seed=5) != first
    monkeypatch.setattr("rsae.metrics._DRAWS", 600)  # ten samples at a time
    assert paired_difference(a, b, samples=100, seed=4)["fvu"] == pytest.approx(first["fvu"], rel=1e-12)


def test_paired_difference_from_the_accumulators() -> None:
    # Squared error of a and b: document 7: 0 and 1, document 9: 1 and 1. Overall (1 - 2)/2 = -1/2; the possible samples
    # of two documents are (7,7): -1, (7,9): -1/2, (9,9): 0, so the 95% interval is [-1, 0]: a tie.
    loss = LossMetrics()
    ones = torch.ones(3)
    loss.update(ones, ones, ones, ones, ones, DOCUMENTS)
    better = X_HAT.clone()
    better[0] = 0
    a = ArmSums(reconstruction(X, better, LATENTS, DOCUMENTS).document_sums(), loss.document_sums())
    b = ArmSums(reconstruction(X, X_HAT, LATENTS, DOCUMENTS, (1,)).document_sums(), loss.document_sums())
    difference = paired_difference(a, b)
    assert difference["fvu"] == pytest.approx([-0.5, -1, 0], abs=1e-12)
    assert difference["delta_ce"] == [0, 0, 0]
    assert verdict(difference, level(), level())["fvu"] == "tie"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (level(alive=0.96), level(), ("win", "tie")),
        (level(alive=0.94), level(), ("loss", "tie")),
        (level(alive=0.951), level(), ("tie", "tie")),  # 0.1 percentage point
        (level(alive=0.9511), level(), ("win", "tie")),
        (level(dense=0.008), level(), ("tie", "win")),
        (level(dense=0.012), level(), ("tie", "loss")),
        (level(dense=0.009), level(), ("tie", "tie")),
    ],
)
def test_verdict_on_alive_and_dense(a: dict[str, Any], b: dict[str, Any], expected: tuple[str, str]) -> None:
    result = verdict({"fvu": [0.0, 0.0, 0.0], "delta_ce": [0.0, 0.0, 0.0]}, a, b)
    assert (result["alive"], result["dense"]) == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([-0.1, -0.2, -0.01], "win"),
        ([0.1, 0.01, 0.2], "loss"),
        ([-0.1, -0.2, 0.01], "tie"),
        ([-1e-8, -2e-8, -1e-9], "tie"),  # float32 rounding of the same reconstruction
    ],
)
def test_verdict_on_intervals(interval: list[float], expected: str) -> None:
    result = verdict({"fvu": interval, "delta_ce": interval}, level(), level())
    assert (result["fvu"], result["delta_ce"]) == (expected, expected)


def test_paired_difference_refuses() -> None:
    _, sst, sse = documents(4)
    good = arm((sse, sst))
    with pytest.raises(ValueError, match=r"fvu.*different tokens \(60 and 59 documents"):
        paired_difference(good, arm((sse[:59], sst[:59])))
    with pytest.raises(ValueError, match="different tokens"):
        paired_difference(good, arm((sse, sst * 1.01)))
    with pytest.raises(ValueError, match="two at least"):
        paired_difference(arm((sse[:1], sst[:1])), arm((sse[:1], sst[:1])))
    with pytest.raises(ValueError, match="nothing can be relative"):
        paired_difference(good, arm((0 * sse, sst)))
    with pytest.raises(ValueError, match="samples must be"):
        paired_difference(good, good, samples=0)
