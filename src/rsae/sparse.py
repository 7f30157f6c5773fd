"""Encoder and decoder on the few active entries of a batch, with their gradients.

A latent that is exactly 0 costs nothing in the decoder, in the loss or in any gradient. So after the one dense product that
gives the pre-activations, everything works on a list of entries: the active latents and those near enough to their edge to learn.

Products over all latents run in bfloat16 with float32 accumulation, or in float32 on a CPU that is faster so; sums over entries in
float32. What torch has no fused operation for is done by the kernels of the device (kernels.py), without them by what torch has.
Knows torch, the processor and the kernels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsae import kernels
from rsae.cpu import prefers_bfloat16
from rsae.rational import SMALLEST, sample_scale

NARROW = torch.bfloat16
"""Dtype of pre-activations; the kernels choose entries from this one alone."""
_ROWS = 256
"""Rows of a product in float32 that is rounded to NARROW: they stay in the cache meanwhile."""


class Entries:
    """Some entries of a (batch, d_sae) matrix, in the order of its rows.

    Attributes:
        rows, latents: (n,) int64, where each entry stands.
        shape: (batch, d_sae).
        values: (n,) float32, what stands there, if it is known already.
    """

    def __init__(
        self,
        rows: Int[Tensor, " n"],
        latents: Int[Tensor, " n"],
        shape: tuple[int, int],
        values: Float[Tensor, " n"] | None = None,
    ) -> None:
        self.rows, self.latents, self.shape, self.values = rows, latents, shape, values

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch d_sae"]) -> Entries:
        """The entries where `mask` is true."""
        batch, d_sae = mask.shape
        flat = mask.view(-1).nonzero().squeeze(1)
        rows = flat.div(d_sae, rounding_mode="floor")
        return cls(rows, flat - rows * d_sae, (batch, d_sae))

    @classmethod
    def above(
        cls,
        h: Float[Tensor, "batch d_sae"],
        threshold: Float[Tensor, " d_sae"] | None = None,
        *,
        share: float = 1.0,
        k: int | None = None,
        alpha: float = 0.0,
        scale: Float[Tensor, "batch 1"] | None = None,
    ) -> tuple[Entries, Float[Tensor, "batch 1"] | None]:
        """The entries with h > share * threshold_j * s^alpha, and s: `rsae.rational.sample_scale` of h/threshold, if there is a k.

        Args:
            h: bfloat16.
            threshold: positive; None: 1, and with a `share` of 0 the positive entries.
            scale: s, if it is known: where h has some of the latents only.
        """
        inverse = None if threshold is None else threshold.float().reciprocal()
        if (lib := kernels.usable(h, dtype=torch.bfloat16)) is not None:
            how = {"k": k, "alpha": alpha, "share": share, "smallest": SMALLEST}
            found_scale, *found = lib.select(h, inverse, given=scale, **how)
            return cls._found(h, *found), None if k is None else found_scale
        relative = h.float() if inverse is None else h.float() * inverse
        if k is None:
            return cls.of(relative > share), None
        scale = sample_scale(relative, k) if scale is None else scale
        return cls.of(relative > share * scale**alpha), scale

    @classmethod
    def largest(
        cls, h: Float[Tensor, "batch d_sae"], k: int, threshold: Float[Tensor, " d_sae"] | None = None
    ) -> Entries:
        """The k largest h, or h/threshold, of each row, k of them where there are as many; of equal ones, any."""
        k = min(k, h.shape[1])
        inverse = None if threshold is None else threshold.float().reciprocal()
        if (lib := kernels.usable(h, dtype=torch.bfloat16)) is not None and k < h.shape[1]:
            return cls._found(h, *lib.select(h, inverse, k=k, exact=True)[1:])
        top = (h if inverse is None else h.float() * inverse).topk(k, dim=1, sorted=False).indices
        rows = torch.arange(len(h), device=h.device).repeat_interleave(k)
        return cls(rows, top.view(-1), (h.shape[0], h.shape[1]))

    def where(self, mask: Bool[Tensor, " n"]) -> Entries:
        """Those of these entries for which `mask` is true."""
        values = None if self.values is None else self.values[mask]
        return Entries(self.rows[mask], self.latents[mask], self.shape, values)

    def read(self, h: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " n"]:
        """What h has at these entries."""
        return h.view(-1)[self.flat].float() if self.values is None else self.values

    @classmethod
    def _found(cls, h: Tensor, rows: Tensor, latents: Tensor, values: Tensor) -> Entries:
        return cls(rows, latents, (h.shape[0], h.shape[1]), values)

    @cached_property
    def flat(self) -> Int[Tensor, " n"]:
        """Index of each entry in the flattened matrix."""
        return self.rows * self.shape[1] + self.latents

    @cached_property
    def row_offsets(self) -> Int[Tensor, " batch"]:
        """Where the entries of each row begin."""
        return _offsets(self.rows, self.shape[0])

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " d_sae"]]:
        """The order that sorts the entries by latent, and where those of each latent begin in it."""
        if (lib := kernels.usable(self.latents, dtype=torch.int64)) is not None:
            return lib.sort_by_key(self.latents, self.shape[1])
        latents, order = self.latents.sort(stable=True)
        return order, _offsets(latents, self.shape[1])

    def sum_by_row(self, weights: Float[Tensor, " n"], vectors: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        """For each row: the sum over its entries of weight * vectors[latent]."""
        if (lib := kernels.usable(weights, vectors)) is not None:
            return lib.sum_groups(self.row_offsets, None, self.latents, weights, vectors)
        return F.embedding_bag(self.latents, vectors, self.row_offsets, mode="sum", per_sample_weights=weights)

    def sum_by_latent(
        self, weights: Float[Tensor, " n"], vectors: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "d_sae d"]:
        """For each latent: the sum over its entries of weight * vectors[row]."""
        order, offsets = self.by_latent
        if (lib := kernels.usable(weights, vectors)) is not None:
            return lib.sum_groups(offsets, order, self.rows, weights, vectors)
        return F.embedding_bag(self.rows[order], vectors, offsets, mode="sum", per_sample_weights=weights[order])

    def dots(self, a: Float[Tensor, "batch d"], b: Float[Tensor, "d_sae d"]) -> Float[Tensor, " n"]:
        """For each entry: the inner product of a[row] and b[latent]."""
        if (lib := kernels.usable(a, b)) is not None:
            return lib.dots(self.rows, self.row_offsets, self.latents, a, b)
        # One dense product and a gather: on processors with bfloat16 units it costs less than gathering both sides
        return _product(a, b).view(-1)[self.flat].float()

    def sum_and_dots(
        self, weights: Float[Tensor, " n"], a: Float[Tensor, "batch d"], b: Float[Tensor, "d_sae d"]
    ) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " n"]]:
        """`sum_by_latent(weights, a)` and `dots(a, b)`, which fetch the same rows."""
        if (lib := kernels.usable(weights, a, b)) is not None:
            order, offsets = self.by_latent
            return lib.sum_and_dots(offsets, order, self.rows, self.row_offsets, self.latents, weights, a, b)
        return self.sum_by_latent(weights, a), self.dots(a, b)


def at_latents(values: Float[Tensor, " d_sae"], entries: Entries) -> Float[Tensor, " n"]:
    """The value of each entry's latent."""
    return _AtLatents.apply(values, entries)  # type: ignore[return-value]


class _AtLatents(torch.autograd.Function):
    # Not indexing, whose backward is a hundred times as slow
    @staticmethod
    def forward(ctx: Any, values: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return values.index_select(0, entries.latents)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _summed(grad_outputs[0], ctx.entries), None


def _summed(values: Float[Tensor, " n"], entries: Entries) -> Float[Tensor, " d_sae"]:
    """The sum of each latent's entries."""
    if values.is_cuda:  # where index_add_ has no fixed order: a run that is resumed would come to another result
        return entries.sum_by_latent(values.contiguous(), values.new_ones(entries.shape[0], 1)).squeeze(1)
    return values.new_zeros(entries.shape[1]).index_add_(0, entries.latents, values)


def _offsets(index: Int[Tensor, " n"], bins: int) -> Int[Tensor, " bins"]:
    """Where each of 0, 1, ... bins - 1 begins in a sorted index."""
    return torch.searchsorted(index, torch.arange(bins, device=index.device))


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """h = x W_enc^T + b_enc in bfloat16, without a gradient: what the gate chooses its entries from."""
    with torch.no_grad():
        if x.is_cuda or not prefers_bfloat16():
            return _product(x, W_enc, b_enc)
        # On a CPU torch writes the bias out, and adds the product to it. As one more column of the weights it costs nothing
        return F.linear(_with_column(x, 1.0), _with_column(W_enc, b_enc))


def _product(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], bias: Float[Tensor, " m"] | None = None) -> Tensor:
    """a b^T + bias, in NARROW."""
    if a.is_cuda or prefers_bfloat16():
        return F.linear(a.to(NARROW), b.to(NARROW), None if bias is None else bias.to(NARROW))
    h = a.new_empty(len(a), len(b), dtype=NARROW)
    for rows, out in zip(a.split(_ROWS), h.split(_ROWS), strict=True):
        out.copy_(F.linear(rows, b, bias))
    return h


def _with_column(matrix: Float[Tensor, "n d"], column: Tensor | float) -> Float[Tensor, "n d_plus_2"]:
    """The matrix, the column, and one of zeros that keeps rows aligned to four bytes."""
    n, d = matrix.shape
    wide = matrix.new_empty(n, d + 2, dtype=NARROW)
    wide[:, :d], wide[:, d], wide[:, d + 1] = matrix, column, 0.0
    return wide


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(x)
        ctx.entries = entries
        return entries.read(dense).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return None, None, ctx.entries.sum_by_latent(grad, x), _summed(grad, ctx.entries), None


def encode(
    dense: Float[Tensor, "batch d_sae"],
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    entries: Entries,
) -> Float[Tensor, " n"]:
    """The pre-activations of the entries, with their gradient in W_enc and b_enc.

    Args:
        dense: `pre_activations(x, W_enc, b_enc)`.
        x: the input of the encoder, what it is centred on already subtracted.
    """
    return _Encode.apply(dense, x, W_enc, b_enc, entries)  # type: ignore[return-value]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, W_dec: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(latents, W_dec)
        ctx.entries = entries
        return entries.sum_by_row(latents, W_dec)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        latents, W_dec = ctx.saved_tensors
        (grad,) = grad_outputs
        grad = grad.contiguous()
        if not ctx.needs_input_grad[1]:
            return ctx.entries.dots(grad, W_dec), None, None
        d_W_dec, d_latents = ctx.entries.sum_and_dots(latents, grad, W_dec)
        return d_latents, d_W_dec, None


def decode(
    latents: Float[Tensor, " n"], W_dec: Float[Tensor, "d_sae d_in"], entries: Entries
) -> Float[Tensor, "batch d_in"]:
    """x_hat less b_dec from the latents of the entries; latents that are 0 get their gradient all the same."""
    return _Decode.apply(latents, W_dec, entries)  # type: ignore[return-value]
