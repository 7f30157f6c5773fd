"""The compiled kernels against the plain path, over shapes that are multiples of nothing; and what happens without a compiler."""

from __future__ import annotations

import logging
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsae import kernels, sparse
from rsae.minimax import fit_gate
from rsae.rational import Surrogate, hard_edge, rational, sample_scale

SHAPES = [(1, 1, 1), (3, 5, 2), (7, 33, 17), (64, 100, 48), (13, 257, 640), (5, 700, 200)]


@pytest.fixture
def plain(monkeypatch):
    """Switch to the plain path, and back to the kernels."""
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no C compiler on this machine")

    def switch(on: bool) -> None:
        monkeypatch.setattr(kernels, "library", lambda: None if on else compiled)

    return switch


def random_h(batch: int, d_sae: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(seed)).bfloat16()


def both(plain, function):
    results = []
    for on in (True, False):
        plain(on)
        results.append(function())
    return results


@pytest.mark.parametrize(("batch", "d_sae", "d"), SHAPES)
@pytest.mark.parametrize("share", [0.6, 100.0, -100.0], ids=["some", "none", "all"])
@pytest.mark.parametrize("thresholds", [False, True])
def test_entries_above_a_threshold(plain, batch, d_sae, d, share, thresholds) -> None:
    h = random_h(batch, d_sae)
    threshold = torch.linspace(0.5, 2.0, d_sae) if thresholds else None
    (slow, _), (fast, scale) = both(plain, lambda: sparse.Entries.above(h, threshold, share=share))
    assert scale is None
    assert torch.equal(slow.rows, fast.rows)
    assert torch.equal(slow.latents, fast.latents)
    assert torch.equal(fast.values, h[fast.rows, fast.latents].float())
    expected = {100.0: 0, -100.0: batch * d_sae}.get(share)
    assert expected is None or len(fast.rows) == expected


@pytest.mark.parametrize(("batch", "d_sae", "d"), SHAPES)
@pytest.mark.parametrize("k", [1, 2, 7, 10_000])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_entries_that_follow_the_sample(plain, batch, d_sae, d, k, alpha) -> None:
    h = random_h(batch, d_sae, seed=1)
    h[0] = -1.0  # a sample with no positive pre-activation
    threshold = torch.linspace(0.5, 2.0, d_sae)
    (slow, s), (fast, t) = both(plain, lambda: sparse.Entries.above(h, threshold, share=0.7, k=k, alpha=alpha))
    torch.testing.assert_close(s, t, rtol=1e-6, atol=0)
    torch.testing.assert_close(t, sample_scale(h.float() * threshold.reciprocal(), k), rtol=1e-6, atol=0)
    assert torch.equal(slow.flat, fast.flat)


@pytest.mark.parametrize(("batch", "d_sae", "d"), SHAPES)
def test_entries_of_a_shard(plain, batch, d_sae, d) -> None:
    """Its largest, and those above a scale that all shards have found."""
    h, threshold = random_h(batch, d_sae, seed=1), torch.linspace(0.5, 2.0, d_sae)
    given = torch.linspace(0.2, 3.0, batch)[:, None]
    how = {"share": 0.7, "k": 3, "alpha": 0.5, "scale": given}
    (slow, s), (fast, t) = both(plain, lambda: sparse.Entries.above(h, threshold, **how))
    assert torch.equal(s, given)
    assert torch.equal(t, given)
    assert torch.equal(slow.flat, fast.flat)
    for k in (1, 3, 10_000):
        slow, fast = both(plain, lambda k=k: sparse.Entries.largest(h, k, threshold))
        assert torch.equal(slow.rows, fast.rows)
        largest = (h.float() * threshold.reciprocal()).topk(min(k, d_sae)).values
        for found in (slow, fast):
            relative = found.read(h) * threshold.reciprocal()[found.latents]
            assert torch.equal(relative.view(batch, -1).sort(descending=True).values, largest)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10_000))
def test_the_k_largest_with_ties(d_sae, k, seed) -> None:
    if kernels.library() is None or k > d_sae:
        return
    generator = torch.Generator().manual_seed(seed)
    h = torch.randint(-3, 4, (5, d_sae), generator=generator).bfloat16()  # many equal values
    entries = sparse.Entries.largest(h, k)
    assert torch.equal(entries.rows, torch.arange(5).repeat_interleave(k))
    for row in range(5):
        mine = entries.latents[entries.rows == row]
        assert len(mine.unique()) == k
        assert torch.equal(h[row, mine].sort().values, h[row].topk(k).values.sort().values)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 80), st.data())
def test_the_scale_of_any_sample(d_sae, data) -> None:
    """The midpoint of the k-th and the next largest, whatever signs, ties, infinities and zeros a row has."""
    if kernels.library() is None:
        return
    k = data.draw(st.integers(1, d_sae - 1))
    some = st.sampled_from([-torch.inf, -1e30, -2.0, -1e-30, -0.0, 0.0, 1e-40, 0.5, 1.0, 3.0, 1e30])
    h = torch.tensor(data.draw(st.lists(some, min_size=d_sae, max_size=d_sae))).bfloat16().expand(3, -1).contiguous()
    h[1] = -h[1]
    h[2] = torch.randn(d_sae, generator=torch.Generator().manual_seed(d_sae))
    found = sparse.Entries.above(h, k=k, alpha=0.5)[1]
    torch.testing.assert_close(found, sample_scale(h.float(), k), rtol=1e-6, atol=0)


def test_nan_stays_within_bounds() -> None:
    h = random_h(6, 40)
    h[2] = float("nan")
    h[4, ::3] = float("nan")
    entries = sparse.Entries.largest(h, 9)
    assert len(entries.rows) == 54
    assert 0 <= int(entries.latents.min()) <= int(entries.latents.max()) < 40
    entries, _ = sparse.Entries.above(h, torch.ones(40), k=5, alpha=1.0)
    assert 0 <= int(entries.latents.min()) <= int(entries.latents.max()) < 40


@pytest.mark.parametrize(("batch", "d_sae", "d"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0], ids=["empty", "some", "full"])
def test_sums_and_products_over_entries(plain, batch, d_sae, d, density) -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(batch, d_sae, generator=generator) < density
    weights = torch.randn(int(mask.sum()), generator=generator)
    weights[::3] = 0.0
    W, x = torch.randn(d_sae, d, generator=generator), torch.randn(batch, d, generator=generator)

    def results():
        entries = sparse.Entries.of(mask)
        return (
            entries.by_latent[0],
            entries.sum_by_row(weights, W),
            entries.sum_by_latent(weights, x),
            entries.dots(x, W),
            *entries.sum_and_dots(weights, x, W),
        )

    (order, *slow), (fast_order, *fast) = both(plain, results)
    assert torch.equal(order, fast_order)
    # Rows fetched once for both gradients of a decoder: the same bits in whole registers, of 4, 8 or 16
    if d % 16 == 0:
        assert torch.equal(fast[3], fast[1])
        assert torch.equal(fast[4], fast[2])
    dense = torch.zeros(batch, d_sae, dtype=torch.float64)
    dense[mask] = weights.double()
    by_row, by_latent, dots = dense @ W.double(), dense.T @ x.double(), (x.double() @ W.double().T)[mask]
    exact, tolerances = (by_row, by_latent, dots, by_latent, dots), (1e-5, 1e-5, 2e-2, 1e-5, 2e-2)
    for mine, theirs, reference, tolerance in zip(fast, slow, exact, tolerances, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=2e-5)
        # without the kernels the products are made in bfloat16
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * d**0.5)


@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (5, 17), (40, 640)])
def test_rows_back_to_their_norms(plain, n, d) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, norms = torch.randn(n, d, generator=generator), torch.rand(n, 1, generator=generator) + 0.5
    rows[:1] = 0.0
    plain(False)
    found = rows.clone()
    kernels.usable(found, norms).rescale_rows(found, norms)
    torch.testing.assert_close(found, rows * norms / rows.norm(dim=1, keepdim=True).clamp(min=1e-8))


@pytest.mark.parametrize("n", [1, 255, 257, 3000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "surrogate",
    [
        Surrogate("rectangle", 0.5, strength=0.0),
        Surrogate("jump-corrected", 0.5, strength=0.2),
        Surrogate("jump-corrected", 3.0, strength=1.0, price=0.3),
    ],
)
def test_the_edge_and_its_gradients(plain, n, weighted, surrogate) -> None:
    generator = torch.Generator().manual_seed(n)
    grad, curvature, weight = (torch.rand(n, generator=generator) for _ in range(3))
    given = [torch.rand(n, generator=generator) + shift for shift in (0.5, 0.0, 0.2)]
    given[2][::7] = 0.0  # a threshold that nothing is near

    def gradients():
        amplitude, h, threshold = (tensor.clone().requires_grad_() for tensor in given)
        z = hard_edge(amplitude, h, threshold, h > threshold, surrogate, curvature, weight if weighted else None)
        z.backward(grad - 0.5)
        return z.detach(), amplitude.grad, h.grad, threshold.grad

    for slow, fast in zip(*both(plain, gradients), strict=True):
        if slow is None:
            assert fast is None
        else:
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))


def value_and_gradients(fit, tensors, grad):
    """phi(h), and the gradients of h, both coefficients and both scales, for an upstream `grad`."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = rational(*leaves.values(), fit.centre, fit.scale)
    out.backward(grad)
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("n", [1, 255, 256, 257, 3000])
@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("degree", [(9, 8), (3, 2), (1, 0)])
def test_the_rational_and_its_gradients(plain, n, per_entry, degree) -> None:
    fit = fit_gate("jumprelu", degree, theta=0.1, delta=0.005) if degree[1] > 2 else fit_gate("relu", degree)
    generator = torch.Generator().manual_seed(n)
    shape = (n,) if per_entry else ()
    tensors = {
        "h": 2 * torch.randn(n, generator=generator),
        "num": torch.tensor(fit.num_coeffs, dtype=torch.float32),
        "den": torch.tensor(fit.den_coeffs, dtype=torch.float32),
        "C_in": 0.5 + torch.rand(shape, generator=generator),
        "C_out": 0.5 + torch.rand(shape, generator=generator),
    }
    grad = torch.randn(n, generator=generator)

    slow, fast = both(plain, lambda: value_and_gradients(fit, tensors, grad))
    for name, value in slow.items():
        scale = float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            fast[name], value, rtol=1e-5, atol=1e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scales", [(), (301,), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rational_of_a_matrix(plain, scales, dtype) -> None:
    """A dense gate in training: scalar scales, one for each latent, one for each sample."""
    fit = fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.005)
    generator = torch.Generator().manual_seed(len(scales))
    tensors = {
        "h": (2 * torch.randn(7, 301, generator=generator)).to(dtype),
        "num": torch.tensor(fit.num_coeffs, dtype=torch.float32),
        "den": torch.tensor(fit.den_coeffs, dtype=torch.float32),
        "C_in": 0.5 + torch.rand(scales, generator=generator),
        "C_out": 0.5 + torch.rand(scales, generator=generator),
    }
    grad = torch.randn(7, 301, generator=generator).to(dtype)

    slow, fast = both(plain, lambda: value_and_gradients(fit, tensors, grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, value in slow.items():
        assert fast[name].dtype == value.dtype
        assert fast[name].shape == value.shape
        scale = max(float(value.abs().max()), 1.0)
        torch.testing.assert_close(
            fast[name], value, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_results_do_not_depend_on_the_number_of_threads(plain) -> None:
    plain(False)
    h, threshold = random_h(50, 300), torch.full((300,), 1.5)
    x, W = torch.randn(50, 20), torch.randn(300, 20)

    def results():
        entries, _ = sparse.Entries.above(h, threshold, share=0.6, k=9, alpha=0.5)
        weights = entries.values
        return entries.flat, entries.sum_by_latent(weights, x), *entries.sum_and_dots(weights, x, W)

    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("failing", ["no compiler", "a compiler that fails"])
def test_without_the_kernels_one_line_says_so(monkeypatch, caplog, failing, tmp_path) -> None:
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if failing == "no compiler":
        monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    else:

        def run(command, **options):
            if options.get("check"):
                raise subprocess.CalledProcessError(1, command, stderr="internal compiler error")
            return subprocess.CompletedProcess(command, 1)

        monkeypatch.setattr(kernels.subprocess, "run", run)
        monkeypatch.setattr(kernels.shutil, "which", lambda name: "/usr/bin/cc")
    kernels.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="rsae"):
            assert kernels.library() is None
            assert kernels.library() is None
        (record,) = caplog.records
        assert "plain path" in record.getMessage()
        assert ("no C compiler" if failing == "no compiler" else "internal compiler error") in record.getMessage()
    finally:
        kernels.library.cache_clear()


def test_the_default_dtype_does_not_matter(plain) -> None:
    plain(False)
    h, threshold = random_h(13, 257), torch.rand(257) + 0.1
    expected, s = sparse.Entries.above(h, threshold, k=4, alpha=0.5)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            found, s_found = sparse.Entries.above(h, threshold, k=4, alpha=0.5)
            torch.testing.assert_close(s_found, s)
            torch.testing.assert_close(found.values, expected.values)
    finally:
        torch.set_default_dtype(before)


def test_infinite_entries_end_the_search_for_the_largest(plain) -> None:
    plain(False)
    h = random_h(9, 300)
    h[::2, :8] = torch.inf
    found = sparse.Entries.above(h, k=4, alpha=0.5)[1]
    assert found is not None
    assert bool(found[::2].isinf().all())
    torch.testing.assert_close(found[1::2], sample_scale(h[1::2].float(), 4))


def test_whole_numbers_for_centre_and_scale(plain) -> None:
    plain(False)
    h, fit = torch.linspace(-1, 2, 50), fit_gate("relu", (3, 2))
    num, den, C = torch.tensor(fit.num_coeffs).float(), torch.tensor(fit.den_coeffs).float(), torch.tensor(1.0)
    torch.testing.assert_close(rational(h, num, den, C, C, 0, 1), rational(h, num, den, C, C, 0.0, 1.0))
