"""Encoder and decoder on the few active entries of a batch, with their gradients.

A latent that is exactly 0 costs nothing in the decoder, in the loss or in any gradient. So after the one dense product that
gives the pre-activations, everything works on a list of entries: the active latents and those near enough to their edge to learn.

Products over all latents run in bfloat16 with float32 accumulation; sums over entries in float32. Knows torch and nothing else.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Entries:
    """Some entries of a (batch, d_sae) matrix, in the order of its rows.

    Attributes:
        rows, latents: (n,) int64, where each entry stands.
        shape: (batch, d_sae).
    """

    def __init__(self, rows: Int[Tensor, " n"], latents: Int[Tensor, " n"], shape: tuple[int, int]) -> None:
        self.rows, self.latents, self.shape = rows, latents, shape

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch d_sae"]) -> Entries:
        """The entries where `mask` is true."""
        batch, d_sae = mask.shape
        flat = mask.view(-1).nonzero().squeeze(1)
        rows = flat.div(d_sae, rounding_mode="floor")
        return cls(rows, flat - rows * d_sae, (batch, d_sae))

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
        return self.latents.argsort(stable=True), _offsets(self.latents, self.shape[1])

    def sum_by_row(self, weights: Float[Tensor, " n"], vectors: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        """For each row: the sum over its entries of weight * vectors[latent]."""
        return F.embedding_bag(self.latents, vectors, self.row_offsets, mode="sum", per_sample_weights=weights)

    def sum_by_latent(
        self, weights: Float[Tensor, " n"], vectors: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "d_sae d"]:
        """For each latent: the sum over its entries of weight * vectors[row]."""
        order, offsets = self.by_latent
        return F.embedding_bag(self.rows[order], vectors, offsets, mode="sum", per_sample_weights=weights[order])


def _offsets(index: Int[Tensor, " n"], bins: int) -> Int[Tensor, " bins"]:
    counts = torch.bincount(index, minlength=bins)
    return counts.cumsum(0) - counts


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """h = x W_enc^T + b_enc in bfloat16, without a gradient: what the gate chooses its entries from."""
    with torch.no_grad():
        return F.linear(x.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16())


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dense: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, entries: Entries
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.entries, ctx.subtracts = entries, b_dec is not None
        return dense.view(-1)[entries.flat].float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        (grad,) = grad_outputs
        d_b_enc = torch.zeros_like(W_enc[:, 0]).index_add_(0, ctx.entries.latents, grad)
        d_b_dec = -(d_b_enc @ W_enc) if ctx.subtracts else None
        return None, None, ctx.entries.sum_by_latent(grad, x), d_b_enc, d_b_dec, None


def encode(
    dense: Float[Tensor, "batch d_sae"],
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
    entries: Entries,
) -> Float[Tensor, " n"]:
    """The pre-activations of the entries, with their gradient in W_enc, b_enc and b_dec.

    Args:
        dense: `pre_activations(x, W_enc, b_enc)`.
        x: the input of the encoder, b_dec already subtracted if it is to be.
        b_dec: where its gradient goes if it was subtracted, else None.
    """
    return _Encode.apply(dense, x, W_enc, b_enc, b_dec, entries)  # type: ignore[return-value]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, W_dec: Tensor, b_dec: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(latents, W_dec)
        ctx.entries = entries
        return entries.sum_by_row(latents, W_dec) + b_dec

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        latents, W_dec = ctx.saved_tensors
        (grad,) = grad_outputs
        # One dense product and a gather: on processors with bfloat16 units it costs less than a dot product for each entry
        d_latents = F.linear(grad.bfloat16(), W_dec.bfloat16()).view(-1)[ctx.entries.flat].float()
        return d_latents, ctx.entries.sum_by_latent(latents, grad), grad.sum(0), None


def decode(
    latents: Float[Tensor, " n"], W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"], entries: Entries
) -> Float[Tensor, "batch d_in"]:
    """x_hat from the latents of the entries; latents that are 0 get their gradient all the same."""
    return _Decode.apply(latents, W_dec, b_dec, entries)  # type: ignore[return-value]
