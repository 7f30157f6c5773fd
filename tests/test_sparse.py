"""The sparse encoder and decoder against torch's autograd of the plain dense formula, in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsae import kernels, sparse
from rsae.sparse import Entries, at_latents, decode, encode, pre_activations

# (batch, d_in, d_sae): multiples of nothing, single rows and single latents among them
SHAPES = [(37, 13, 101), (1, 7, 29), (19, 5, 1), (3, 1, 17), (1, 1, 1), (64, 32, 128)]


def masks(batch: int, d_sae: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    some = torch.rand(batch, d_sae, generator=g) < 0.15
    gaps = some.clone()
    gaps[::2] = False  # empty rows, first and perhaps last
    gaps[-1] = False
    gaps[:, ::3] = False  # empty latents
    gaps[:, -1] = False
    one = torch.zeros_like(some)
    one[batch // 2, d_sae // 2] = True
    return {"random": some, "gaps": gaps, "full": torch.ones_like(some), "none": torch.zeros_like(some), "one": one}


CASES = [
    pytest.param(shape, kind, id=f"{'x'.join(map(str, shape))}-{kind}")
    for shape in SHAPES
    for kind in ("random", "gaps", "full", "none", "one")
]


def tensors(batch: int, d_in: int, d_sae: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, d_in), "W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def leaves(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    """1e-5 of the largest entry: float32 sums in another order."""
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


# -- Entries -----------------------------------------------------------------------------------------------------------


def test_entries_by_hand() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    entries = Entries.of(mask)
    assert entries.shape == (3, 4)
    assert entries.rows.tolist() == [0, 0, 2, 2]
    assert entries.latents.tolist() == [1, 3, 0, 1]
    assert entries.flat.tolist() == [1, 3, 8, 9]
    assert entries.row_offsets.tolist() == [0, 2, 2]
    order, offsets = entries.by_latent
    assert order.tolist() == [2, 0, 3, 1]
    assert offsets.tolist() == [0, 1, 3, 3]
    weights, vectors = torch.tensor([1.0, 10.0, 100.0, 1000.0]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    # rows: 1*2 + 10*4, nothing, 100*1 + 1000*2
    assert entries.sum_by_row(weights, vectors).tolist() == [[42.0], [0.0], [2100.0]]
    # latents, with the vectors of rows 5, 6, 7: 100*7, 1*5 + 1000*7, nothing, 10*5
    assert entries.sum_by_latent(weights, torch.tensor([[5.0], [6.0], [7.0]])).tolist() == [
        [700.0],
        [7005.0],
        [0.0],
        [50.0],
    ]


@given(st.integers(1, 9), st.integers(1, 11), st.integers(1, 4), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_sums_are_products_with_the_dense_matrix(batch: int, d_sae: int, d: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, d_sae, generator=g) < density
    entries = Entries.of(mask)
    assert torch.equal(torch.stack([entries.rows, entries.latents], 1), mask.nonzero())
    # small integers: float32 sums of them are exact in any order
    weights = torch.randint(-8, 9, (len(entries.rows),), generator=g).float()
    by_latent, by_row = (torch.randint(-8, 9, (n, d), generator=g).float() for n in (d_sae, batch))
    dense = torch.zeros(batch, d_sae)
    dense[mask] = weights
    assert torch.equal(entries.sum_by_row(weights, by_latent), dense @ by_latent)
    assert torch.equal(entries.sum_by_latent(weights, by_row), dense.T @ by_row)


# -- encode ------------------------------------------------------------------------------------------------------------


def test_pre_activations_are_the_dense_ones_in_bfloat16() -> None:
    t = tensors(37, 13, 101)
    h = pre_activations(t["x"], t["W_enc"].requires_grad_(), t["b_enc"])
    assert h.dtype == torch.bfloat16
    assert not h.requires_grad
    exact = t["x"].double() @ t["W_enc"].double().T + t["b_enc"].double()
    # both factors and the result are rounded by at most 2^-8 of themselves
    bound = 2.0**-6 * (t["x"].double().abs() @ t["W_enc"].double().abs().T + t["b_enc"].double().abs())
    assert bool(((h.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("batch", [1, 256, 600])
def test_where_bfloat16_is_slow_pre_activations_are_float32_products_rounded_once(batch: int, monkeypatch) -> None:
    monkeypatch.setattr(sparse, "prefers_bfloat16", lambda: False)
    t = tensors(batch, 13, 101)
    h = pre_activations(t["x"], t["W_enc"].requires_grad_(), t["b_enc"])
    exact = torch.addmm(t["b_enc"].double(), t["x"].double(), t["W_enc"].double().T).detach()
    assert h.dtype == torch.bfloat16
    assert not h.requires_grad
    assert bool(((h.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all())
    # and so are the inner products of the plain path
    entries = Entries.of(masks(batch, 101)["random"])
    monkeypatch.setattr(kernels, "usable", lambda *tensors, dtype=None: None)
    dots = entries.dots(t["x"], t["W_enc"].detach())
    exact = (exact - t["b_enc"])[entries.rows, entries.latents]
    assert bool(((dots - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all())


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_values_of_latents(shape: tuple[int, int, int], kind: str) -> None:
    batch, _, d_sae = shape
    entries = Entries.of(masks(batch, d_sae)[kind])
    (values,) = leaves(torch.linspace(-1, 1, d_sae))
    found = at_latents(values, entries)
    assert torch.equal(found, values[entries.latents])
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(values[entries.latents], values, grad)
    close(torch.autograd.grad(found, values, grad)[0], expected)
    # What a GPU does instead, so that the order of the sum is always the same
    close(entries.sum_by_latent(grad, torch.ones(batch, 1)).squeeze(1), expected)


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_encode(shape: tuple[int, int, int], kind: str) -> None:
    t, mask = tensors(*shape), masks(shape[0], shape[2])[kind]
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9))

    W_enc, b_enc = leaves(t["W_enc"], t["b_enc"])
    inputs = t["x"] - t["b_dec"]
    dense = pre_activations(inputs, W_enc, b_enc)
    h = encode(dense, inputs, W_enc, b_enc, Entries.of(mask))
    assert h.dtype == torch.float32
    assert torch.equal(h, dense[mask].float())
    (h.square() * upstream[mask]).sum().backward()

    W_enc_, b_enc_ = leaves(t["W_enc"], t["b_enc"])
    h_ = inputs @ W_enc_.T + b_enc_
    h_ = dense.float() + (h_ - h_.detach())  # the same values; the gradient is the formula's
    (h_.square() * upstream * mask).sum().backward()

    close(W_enc.grad, W_enc_.grad)
    close(b_enc.grad, b_enc_.grad)


# -- decode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_decode(shape: tuple[int, int, int], kind: str) -> None:
    t, mask = tensors(*shape), masks(shape[0], shape[2])[kind]
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9)) * mask
    values[:, ::4] = 0.0  # entries may be 0, near their edge, and are to learn all the same

    z, W_dec, b_dec = leaves(values[mask], t["W_dec"], t["b_dec"])
    x_hat = decode(z, W_dec, Entries.of(mask)) + b_dec
    dense, W_dec_, b_dec_ = leaves(values, t["W_dec"], t["b_dec"])
    x_hat_ = dense @ W_dec_ + b_dec_
    close(x_hat, x_hat_)

    (x_hat - t["x"]).square().sum().backward()
    (x_hat_ - t["x"]).square().sum().backward()
    close(W_dec.grad, W_dec_.grad)
    close(b_dec.grad, b_dec_.grad)
    assert dense.grad is not None
    assert z.grad is not None
    # d_latents is one bfloat16 product: both factors and the result are rounded by at most 2^-8 of themselves
    grad = 2 * (x_hat_ - t["x"]).detach()
    bound = 3.05 * 2.0**-8 * (grad.abs() @ t["W_dec"].abs().T)
    assert bool(((z.grad - dense.grad[mask]).abs() <= bound[mask]).all())


def test_the_gradient_of_latents_is_rounded_only_in_the_end() -> None:
    """With factors that bfloat16 holds exactly, sums run in float32: 1 + 256 ones would be 256 in bfloat16 sums."""
    d = 300
    W_dec, target = torch.ones(3, d), torch.zeros(2, d)
    z = torch.ones(2, requires_grad=True)
    x_hat = decode(z, W_dec, Entries.of(torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.bool)))
    (x_hat - target).square().sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [600.0, 600.0]


# -- together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "gaps", "full"])
def test_an_autoencoder_end_to_end(kind: str) -> None:
    """relu(h) on the entries, squared error: every gradient within bfloat16 of the dense autoencoder's."""
    shape = (37, 13, 101)
    t, mask = tensors(*shape), masks(37, 101)[kind]
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = ours = leaves(*(t[name] for name in names))
    inputs = (t["x"] - b_dec).detach()
    entries = Entries.of(mask)
    dense = pre_activations(inputs, W_enc, b_enc)
    x_hat = decode(encode(dense, inputs, W_enc, b_enc, entries).relu(), W_dec, entries) + b_dec
    (x_hat - t["x"]).square().sum().backward()

    W_enc, b_enc, W_dec, b_dec = theirs = leaves(*(t[name] for name in names))
    h = inputs @ W_enc.T + b_enc
    h = dense.float() + (h - h.detach())
    (((h * mask).relu() @ W_dec + b_dec) - t["x"]).square().sum().backward()
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < (1e-5 if name == "W_dec" else 5e-3), name
