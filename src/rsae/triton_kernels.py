"""The functions of `rsae.kernels.Kernels` in Triton: the sparse work of a training step on a GPU.

Imported when the first tensor on a GPU arrives. Whatever is narrower than float32 is read and written as it is, and worked on in
float32. A sum belongs to one program, or is made of partial sums that torch adds up: no atomics, and the same bytes every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a row that a program works on at a time."""
GATED = 512
"""Elements that a program of the rational gate works on: with more its registers leave no room for other programs."""
ENTRIES, COLUMNS = 16, 128
"""Entries and coordinates of their vectors that a program works on at a time."""
LONGEST = 1 << 15
"""Longest row that a program holds in registers."""


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float | None, **constants: int) -> None:
    """Run a kernel on the device of its first argument, unless there is nothing to do."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if all(grid):
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, **constants)


def start() -> None:
    """Run one kernel: Triton makes its driver at the first launch, which takes a C compiler and Python's headers."""
    zero, one = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.ones(1, 1, device="cuda")
    sum_groups(zero, None, zero, one[0], one)


def _programs(n: int, each: int) -> int:
    return -(-n // each)


# -- Entries -----------------------------------------------------------------------------------------------------------


@triton.jit
def _relative(x, inverse, at, mask):
    """x * inverse; what is masked and nan come last."""
    if inverse is not None:
        x = x * tl.load(inverse + at, mask, other=1.0)
    return tl.where(mask & (x == x), x, float("-inf"))


@triton.jit
def _ordered(bits):
    """The bits of a float32 as an integer that is ordered as the floats are; and back, being its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _two_largest_kernel(h, inverse, n, k, found, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(h + row * n + at, at < n, other=0.0).to(tl.float32)
    key = _ordered(_relative(x, inverse, at, at < n).to(tl.int32, bitcast=True))
    # The largest integer that at least k keys reach, bit by bit from the sign
    kth = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -2147483648)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        kth = tl.where(tl.sum((key >= kth + bit).to(tl.int32)) >= k, kth + bit, kth)
        bit = bit >> 1
    below = tl.max(tl.where(key < kth, key, -2147483648))
    following = tl.where(tl.sum((key >= kth).to(tl.int32)) > k, kth, below)
    tl.store(found + 2 * row, _ordered(kth).to(tl.float32, bitcast=True))
    tl.store(found + 2 * row + 1, _ordered(following).to(tl.float32, bitcast=True))


@triton.jit
def _count_kernel(h, inverse, edge, n, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(edge + row)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(h + row * n + at, at < n, other=0.0).to(tl.float32)
        above += (_relative(x, inverse, at, at < n) > limit).to(tl.int32)
    tl.store(count + row, tl.sum(above))


@triton.jit
def _fill_kernel(h, inverse, edge, offsets, ties, n, rows, latents, values, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    limit, place = tl.load(edge + row), tl.load(offsets + row)
    if ties is not None:
        ties_left = tl.load(ties + row)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(h + row * n + at, at < n, other=0.0).to(tl.float32)
        r = _relative(x, inverse, at, at < n)
        taken = r > limit
        if ties is not None:
            tie = (r == limit) & (at < n)
            taken = taken | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= ties_left))
            ties_left -= tl.sum(tie.to(tl.int32))
        to = place + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(rows + to, row, taken)
        tl.store(latents + to, at, taken)
        tl.store(values + to, x, taken)
        place += tl.sum(taken.to(tl.int32))


def select(
    h: Tensor,
    inverse: Tensor | None,
    *,
    k: int | None,
    alpha: float = 0.0,
    share: float = 1.0,
    smallest: float = 0.0,
    exact: bool = False,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d_sae = h.shape
    top = h.new_zeros(batch, 2, dtype=torch.float32)
    if given is None and k is not None and k < d_sae:
        top = _two_largest(h, inverse, k)
    scale = torch.ones_like(top[:, :1]) if k is None else top.mean(1, keepdim=True).clamp(min=smallest)
    scale = scale if given is None else given
    edge = top[:, 0].contiguous() if exact else (share * scale**alpha).squeeze(1)
    count, ties = h.new_empty(batch, dtype=torch.int64), None
    _launch(_count_kernel, (batch,), h, inverse, edge, d_sae, count, BLOCK=BLOCK)
    if exact:
        assert k is not None
        count, ties = torch.full_like(count, k), k - count
    offsets = count.cumsum(0) - count
    n = k * batch if exact and k is not None else int(count.sum())  # which waits for the device
    rows, latents = h.new_empty(n, dtype=torch.int64), h.new_empty(n, dtype=torch.int64)
    values = h.new_empty(n, dtype=torch.float32)
    _launch(
        _fill_kernel, (batch,), h, inverse, edge, offsets, ties, d_sae, rows, latents, values, BLOCK=BLOCK
    )  # fmt: skip
    return scale, rows, latents, values


def _two_largest(h: Tensor, inverse: Tensor | None, k: int) -> Tensor:
    """The k-th and the (k+1)-th largest h * inverse of each row, (batch, 2)."""
    batch, d_sae = h.shape
    if d_sae > LONGEST:  # by torch, some rows at a time: all of them in float32 would be the largest tensor of the step
        parts = (part.float() if inverse is None else part * inverse for part in h.split(max(1, (1 << 24) // d_sae)))
        ordered = (part.nan_to_num(-math.inf, math.inf, -math.inf) for part in parts)
        return torch.cat([part.topk(k + 1, dim=1).values[:, -2:] for part in ordered])
    found = h.new_empty(batch, 2, dtype=torch.float32)
    block = max(16, 1 << (d_sae - 1).bit_length())
    _launch(
        _two_largest_kernel, (batch,), h, inverse, d_sae, k, found, BLOCK=block, num_warps=min(16, max(1, block // 1024))
    )  # fmt: skip
    return found


def sort_by_key(key: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    key, order = key.int().sort(stable=True)  # a radix sort: half the bits, half the time
    return order, torch.searchsorted(key, torch.arange(n_keys, dtype=torch.int32, device=key.device))


# -- Sums over entries -------------------------------------------------------------------------------------------------


@triton.jit
def _sum_groups_kernel(
    offsets, order, index, weights, vectors, out, groups, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + group)
    last = tl.load(offsets + group + 1, group + 1 < groups, other=n)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        mask = entry < last
        if order is not None:
            entry = tl.load(order + entry, mask, other=0)
        weight = tl.load(weights + entry, mask, other=0.0).to(tl.float32)
        vector = tl.load(index + entry, mask, other=0)
        # Near its edge, but not active: nothing to read
        mask = (weight != 0.0)[:, None] & (column < d)[None, :]
        v = tl.load(vectors + vector[:, None] * d + column[None, :], mask, other=0.0)
        sums += weight[:, None] * v.to(tl.float32)
    tl.store(out + group * d + column, tl.sum(sums, 0), column < d)


def sum_groups(offsets: Tensor, order: Tensor | None, index: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    groups, d = len(offsets), vectors.shape[1]
    out = vectors.new_empty(groups, d)
    _launch(
        _sum_groups_kernel, (groups, _programs(d, COLUMNS)), offsets, order, index, weights, vectors, out, groups,
        len(index), d, ENTRIES=ENTRIES, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


@triton.jit
def _dots_kernel(rows, latents, a, b, out, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < n
    row, latent = tl.load(rows + entry, there, other=0), tl.load(latents + entry, there, other=0)
    sums = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for start in range(0, d, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = there[:, None] & (column < d)
        x = tl.load(a + row[:, None] * d + column, mask, other=0.0).to(tl.float32)
        y = tl.load(b + latent[:, None] * d + column, mask, other=0.0).to(tl.float32)
        sums += x * y
    tl.store(out + entry, tl.sum(sums, 1), there)


def dots(rows: Tensor, row_offsets: Tensor, latents: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Over the entries and not over rows: programs of equal length, and the entries of a row find it in the cache
    out = a.new_empty(len(rows))
    _launch(
        _dots_kernel, (_programs(len(rows), ENTRIES),), rows, latents, a, b, out, len(rows), a.shape[1], ENTRIES=ENTRIES,
        COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


def sum_and_dots(
    offsets: Tensor,
    order: Tensor,
    rows: Tensor,
    row_offsets: Tensor,
    latents: Tensor,
    weights: Tensor,
    a: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    return sum_groups(offsets, order, rows, weights, a), dots(rows, row_offsets, latents, a, b)


@triton.jit
def _rescale_kernel(rows, norms, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(rows + row * d + at, at < d, other=0.0).to(tl.float32)
        squares += x * x
    by = tl.load(norms + row) / tl.maximum(tl.sqrt(tl.sum(squares)), 1e-8)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(rows + row * d + at, by * tl.load(rows + row * d + at, at < d, other=0.0).to(tl.float32), at < d)


def rescale_rows(rows: Tensor, norms: Tensor) -> None:
    n, d = rows.shape
    _launch(_rescale_kernel, (n,), rows, norms, d, BLOCK=BLOCK)


# -- The rational gate -------------------------------------------------------------------------------------------------


@triton.jit
def _horner(coeffs, u, N: tl.constexpr):
    value = tl.zeros_like(u) + tl.load(coeffs + N - 1)
    for i in tl.static_range(1, N):
        value = value * u + tl.load(coeffs + N - 1 - i)
    return value


@triton.jit
def _argument(t, centre, scale):
    """u. Division as IEEE has it: Triton's own is off by two units in the last place, and the gate may be steep."""
    return tl.div_rn(tl.where(t < -1.0, -1.0, tl.where(t > 1.0, 1.0, t)) - centre, scale)


@triton.jit
def _rational_forward_kernel(
    h, C_in, C_out, num, den, out, n, centre, scale,
    STEP_IN: tl.constexpr, STEP_OUT: tl.constexpr, N_NUM: tl.constexpr, N_DEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(h + at, mask, other=0.0).to(tl.float32)
    c_in = tl.load(C_in + STEP_IN * at, mask, other=1.0).to(tl.float32)
    c_out = tl.load(C_out + STEP_OUT * at, mask, other=1.0).to(tl.float32)
    u = _argument(tl.div_rn(x, c_in), centre, scale)
    r = tl.div_rn(_horner(num, u, N_NUM), 1.0 + tl.abs(_horner(den, u, N_DEN)))
    beyond = tl.where(x > c_in, x - c_in, 0.0)
    tl.store(out + at, r * c_out + beyond * tl.div_rn(c_out, c_in), mask)


@triton.jit
def _rational_backward_kernel(
    h, grad, C_in, C_out, num, num_prime, den, den_prime, d_h, d_C_in, d_C_out, partial, n, centre, scale,
    STEP_IN: tl.constexpr, STEP_OUT: tl.constexpr, N_NUM: tl.constexpr, N_DEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(h + at, mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
    c_in = tl.load(C_in + STEP_IN * at, mask, other=1.0).to(tl.float32)
    c_out = tl.load(C_out + STEP_OUT * at, mask, other=1.0).to(tl.float32)
    t = tl.div_rn(x, c_in)
    u = _argument(t, centre, scale)
    A = _horner(den, u, N_DEN)
    sign = tl.where(A > 0.0, 1.0, tl.where(A < 0.0, -1.0, 0.0))
    Q = 1.0 + tl.abs(A)
    r = tl.div_rn(_horner(num, u, N_NUM), Q)
    P_prime = _horner(num_prime, u, max(1, N_NUM - 1))
    A_prime = _horner(den_prime, u, max(1, N_DEN - 1))
    slope = tl.div_rn(tl.div_rn(P_prime - r * sign * A_prime, Q), scale)
    slope = tl.where(t > 1.0, 1.0, tl.where(t > -1.0, slope, 0.0))
    through = g * tl.div_rn(c_out, c_in) * slope
    tl.store(d_h + at, through, mask)
    # A program's sums: of the coefficients, and of the scales if they are for all
    sums = partial + program * (N_NUM + N_DEN + 2)
    if STEP_IN:
        tl.store(d_C_in + at, -through * t, mask)
    else:
        tl.store(sums + N_NUM + N_DEN, tl.sum(-through * t))
    by_C_out = g * (r + tl.where(t > 1.0, t - 1.0, 0.0))
    if STEP_OUT:
        tl.store(d_C_out + at, by_C_out, mask)
    else:
        tl.store(sums + N_NUM + N_DEN + 1, tl.sum(by_C_out))
    w = tl.div_rn(g * c_out, Q)
    power = w
    for i in tl.static_range(N_NUM):
        tl.store(sums + i, tl.sum(power))
        power = power * u
    power = -w * r * sign
    for j in tl.static_range(N_DEN):
        tl.store(sums + N_NUM + j, tl.sum(power))
        power = power * u


def rational_forward(
    h: Tensor, C_in: Tensor, C_out: Tensor, num: Tensor, den: Tensor, centre: float, scale: float
) -> Tensor:
    out = torch.empty_like(h)
    _launch(
        _rational_forward_kernel, (_programs(h.numel(), GATED),), h, C_in, C_out, num, den, out, h.numel(), centre, scale,
        STEP_IN=min(C_in.ndim, 1), STEP_OUT=min(C_out.ndim, 1), N_NUM=len(num), N_DEN=len(den), BLOCK=GATED,
    )  # fmt: skip
    return out


def rational_backward(
    h: Tensor,
    grad: Tensor,
    C_in: Tensor,
    C_out: Tensor,
    num: Tensor,
    num_prime: Tensor,
    den: Tensor,
    den_prime: Tensor,
    centre: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    programs = _programs(h.numel(), GATED)
    d_h = torch.empty_like(h)
    d_C_in, d_C_out = (torch.empty_like(C) if C.ndim else None for C in (C_in, C_out))
    partial = h.new_empty(programs, len(num) + len(den) + 2, dtype=torch.float32)
    _launch(
        _rational_backward_kernel, (programs,), h, grad, C_in, C_out, num, num_prime, den, den_prime, d_h, d_C_in, d_C_out,
        partial, h.numel(), centre, scale, STEP_IN=min(C_in.ndim, 1), STEP_OUT=min(C_out.ndim, 1), N_NUM=len(num),
        N_DEN=len(den), BLOCK=GATED,
    )  # fmt: skip
    d_num, d_den, for_in, for_out = partial.sum(0).split([len(num), len(den), 1, 1])
    return (
        d_h,
        for_in.view(()) if d_C_in is None else d_C_in,
        for_out.view(()) if d_C_out is None else d_C_out,
        d_num,
        d_den,
    )


# -- The hard edge -----------------------------------------------------------------------------------------------------


@triton.jit
def _is_near(x, threshold, bandwidth):
    return tl.abs(x - threshold) < 0.5 * (bandwidth * threshold)


@triton.jit
def _edge_gain_kernel(
    amplitude, h, threshold, on, grad, curvature, weight, gain, partial, n, bandwidth, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(h + at, mask, other=float("inf")).to(tl.float32)
    t = tl.load(threshold + at, mask, other=1.0).to(tl.float32)
    near = mask & _is_near(x, t, bandwidth)
    a = tl.load(amplitude + at, mask, other=0.0).to(tl.float32)
    jump = a * tl.load(grad + at, mask, other=0.0).to(tl.float32)
    if curvature is not None:
        second = tl.load(curvature + at, mask, other=0.0).to(tl.float32) * (a * a)
        jump += tl.where(tl.load(on + at, mask, other=0) != 0, -second, second)
    jump = tl.where(near, jump, 0.0)
    tl.store(gain + at, jump, mask)
    paid = near.to(tl.float32)
    if weight is not None:
        paid = tl.where(near, tl.load(weight + at, mask, other=0.0).to(tl.float32), 0.0)
    tl.store(partial + 2 * program, tl.sum(jump))
    tl.store(partial + 2 * program + 1, tl.sum(paid))


@triton.jit
def _edge_backward_kernel(
    gain, h, threshold, on, grad, weight, price, d_amplitude, d_h, d_threshold, n, bandwidth, strength, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(h + at, mask, other=float("inf")).to(tl.float32)
    t = tl.load(threshold + at, mask, other=1.0).to(tl.float32)
    near = mask & _is_near(x, t, bandwidth)  # never where the threshold is 0
    x, t = tl.where(near, x, 0.0), tl.where(near, t, 1.0)
    paid = tl.load(price)
    if weight is not None:
        paid = paid * tl.load(weight + at, mask, other=0.0).to(tl.float32)
    edge = tl.where(near, (tl.load(gain + at, mask, other=0.0).to(tl.float32) + paid) / (bandwidth * t), 0.0)
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
    tl.store(d_amplitude + at, tl.where(tl.load(on + at, mask, other=0) != 0, g, 0.0), mask)
    if d_h is not None:
        tl.store(d_h + at, strength * edge, mask)
    tl.store(d_threshold + at, -edge * (x / t), mask)


def edge_gain(
    amplitude: Tensor,
    h: Tensor,
    threshold: Tensor,
    on: Tensor,
    grad: Tensor,
    curvature: Tensor | None,
    weight: Tensor | None,
    bandwidth: float,
) -> tuple[Tensor, Tensor]:
    programs, gain = _programs(len(h), BLOCK), torch.empty_like(h, dtype=torch.float32)
    partial = h.new_empty(programs, 2, dtype=torch.float32)
    _launch(
        _edge_gain_kernel, (programs,), amplitude, h, threshold, on, grad, curvature, weight, gain, partial, len(h), bandwidth,
        BLOCK=BLOCK,
    )  # fmt: skip
    return gain, partial.sum(0)


def edge_backward(
    gain: Tensor,
    h: Tensor,
    threshold: Tensor,
    on: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    price: Tensor,
    bandwidth: float,
    strength: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    d_amplitude, d_threshold = torch.empty_like(h), torch.empty_like(h)
    d_h = torch.empty_like(h) if strength else None
    _launch(
        _edge_backward_kernel, (_programs(len(h), BLOCK),), gain, h, threshold, on, grad, weight, price, d_amplitude, d_h,
        d_threshold, len(h), bandwidth, strength, BLOCK=BLOCK,
    )  # fmt: skip
    return d_amplitude, d_h, d_threshold
