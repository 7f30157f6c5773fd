"""What torch has no fused operation for, by the device of its tensors: kernels.c on a CPU, triton_kernels.py on a GPU.

kernels.c is compiled once for this machine by its C compiler and called through ctypes. The threads are torch's own: a second pool
would fight with it for the cores. Results do not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
# No flag that lets the compiler reorder sums: a run has the same bytes every time
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
OPENMP = "-fopenmp"
BLOCK = 256
"""Elements of a block of the rational kernels, as in kernels.c."""
ROOM = 256
"""Entries of a row that are kept as they are counted, or 4 k if that is more. A row with yet more is gone through again."""


class Kernels(Protocol):
    """Functions over contiguous tensors of one device. n entries, their groups given by where each begins."""

    def select(
        self,
        h: Float[Tensor, "batch d_sae"],
        inverse: Float[Tensor, " d_sae"] | None,
        *,
        k: int | None,
        alpha: float = 0.0,
        share: float = 1.0,
        smallest: float = 0.0,
        exact: bool = False,
        given: Float[Tensor, "batch 1"] | None = None,
    ) -> tuple[Float[Tensor, "batch 1"], Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The entries with h * inverse > share * s^alpha, and s.

        s is the midpoint of the k-th and the (k+1)-th largest h * inverse of a row, at least `smallest`; 1 without a k; or `given`.
        `exact`: the k largest of each row instead, k < d_sae, and of equal ones the first.

        Returns:
            s, and the entries in the order of the matrix: rows, latents, h.
        """
        ...

    def sort_by_key(self, key: Int[Tensor, " n"], n_keys: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n_keys"]]:
        """The order that sorts by key, those of a key as they come; and where each of 0, 1, ... n_keys - 1 begins in it."""
        ...

    def sum_groups(
        self,
        offsets: Int[Tensor, " groups"],
        order: Int[Tensor, " n"] | None,
        index: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        vectors: Float[Tensor, "m d"],
    ) -> Float[Tensor, "groups d"]:
        """For each group the sum of weight * vectors[index] over its entries; `order`: which those are, None: 0, 1, 2, ..."""
        ...

    def dots(
        self,
        rows: Int[Tensor, " n"],
        row_offsets: Int[Tensor, " batch"],
        latents: Int[Tensor, " n"],
        a: Float[Tensor, "batch d"],
        b: Float[Tensor, "d_sae d"],
    ) -> Float[Tensor, " n"]:
        """For each entry the inner product of a[row] and b[latent]."""
        ...

    def sum_and_dots(
        self,
        offsets: Int[Tensor, " d_sae"],
        order: Int[Tensor, " n"],
        rows: Int[Tensor, " n"],
        row_offsets: Int[Tensor, " batch"],
        latents: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        a: Float[Tensor, "batch d"],
        b: Float[Tensor, "d_sae d"],
    ) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, " n"]]:
        """For each latent the sum of weight * a[row] over its entries (`sum_groups`), and for each entry `dots`."""
        ...

    def rescale_rows(self, rows: Float[Tensor, "n d"], norms: Float[Tensor, "n 1"]) -> None:
        """Each row to its norm, in place."""
        ...

    def rational_forward(
        self, h: Tensor, C_in: Tensor, C_out: Tensor, num: Tensor, den: Tensor, centre: float, scale: float
    ) -> Tensor:
        """phi(h) of `rsae.rational`, as h in shape and dtype; C_in and C_out are scalars or as h, `den` has a constant term."""
        ...

    def rational_backward(
        self,
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
        """Gradients in h, C_in, C_out, num and den; `_prime`: coefficients of the derivatives."""
        ...

    def edge_gain(
        self,
        amplitude: Float[Tensor, " n"],
        h: Float[Tensor, " n"],
        threshold: Float[Tensor, " n"],
        on: Bool[Tensor, " n"],
        grad: Float[Tensor, " n"],
        curvature: Float[Tensor, " n"] | None,
        weight: Float[Tensor, " n"] | None,
        bandwidth: float,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " 2"]]:
        """L_on - L_off of `rsae.rational.hard_edge` in the window, 0 outside it; the sums of it and of the weights there."""
        ...

    def edge_backward(
        self,
        gain: Float[Tensor, " n"],
        h: Float[Tensor, " n"],
        threshold: Float[Tensor, " n"],
        on: Bool[Tensor, " n"],
        grad: Float[Tensor, " n"],
        weight: Float[Tensor, " n"] | None,
        price: Float[Tensor, ""],
        bandwidth: float,
        strength: float,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None, Float[Tensor, " n"]]:
        """Gradients of `rsae.rational.hard_edge` in the amplitude, h (None without `strength`) and the threshold."""
        ...


def usable(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> Kernels | None:
    """The kernels, if they take these tensors: contiguous, on the CPU of this `dtype`, on a GPU of any but float64."""
    if not all(t.is_contiguous() for t in tensors):
        return None
    if all(t.device.type == "cpu" and t.dtype == dtype for t in tensors):
        return library()
    return gpu_library() if all(t.is_cuda and t.dtype != torch.float64 for t in tensors) else None


@cache
def library() -> Kernels | None:
    """The compiled kernels, from the cache or fresh; None, and one line in the log, where they cannot be made."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or platform.system() == "Windows":
        return _without("no C compiler was found")
    try:
        return Compiled(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        return _without(f"{compiler} failed: {getattr(error, 'stderr', '') or error}")


@cache
def gpu_library() -> Kernels | None:
    """Triton's kernels; None, and one line in the log, without Triton or what it takes to start one."""
    try:
        from rsae import triton_kernels
    except ImportError as error:
        return _without(f"no Triton: {error}")
    try:
        triton_kernels.start()
    except Exception as error:  # whatever a driver or a compiler that is not there makes of it
        return _without(f"Triton's kernels do not start: {error}")
    return triton_kernels


class Compiled:
    """The functions of kernels.c over tensors: `Kernels`."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    def call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a function."""
        getattr(self._loaded, name)(*map(_passed, arguments))

    def select(
        self,
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
        # Whatever torch's default dtype is
        scale, edge = torch.empty(batch, 1, dtype=torch.float32), torch.empty(batch, dtype=torch.float32)
        count = torch.empty(batch, dtype=torch.int64)
        room = k or 0 if exact else min(d_sae, max(ROOM, 4 * (k or 0)))
        found, near = torch.empty(batch, room, dtype=torch.int32), torch.empty(batch, room, dtype=torch.bfloat16)
        given = given if given is None else given.float().contiguous()
        self.call(
            "count_entries", batch, d_sae, h, inverse, k or 0, float(alpha), float(share), int(exact), smallest, given, scale,
            edge, count, room, found, near,
        )  # fmt: skip
        offsets = count.cumsum(0) - count
        n = int(count.sum())
        latents, rows = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
        values = torch.empty(n, dtype=torch.float32)
        self.call(
            "fill_entries", batch, d_sae, h, inverse, edge, offsets, count, room, found, near, latents, rows, values
        )  # fmt: skip
        return scale, rows, latents, values

    def sort_by_key(self, key: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
        order, offsets = torch.empty_like(key), key.new_empty(n_keys)
        self.call("sort_by_key", len(order), n_keys, key, offsets, order)
        return order, offsets

    def sum_groups(
        self, offsets: Tensor, order: Tensor | None, index: Tensor, weights: Tensor, vectors: Tensor
    ) -> Tensor:
        out = vectors.new_empty(len(offsets), vectors.shape[1])
        self.call(
            "sum_groups", len(out), out.shape[1], offsets, len(out), len(index), order, index, weights, vectors, out
        )  # fmt: skip
        return out

    def dots(self, rows: Tensor, row_offsets: Tensor, latents: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(len(rows))
        self.call("dot_entries", len(a), a.shape[1], row_offsets, len(a), len(out), latents, a, b, out)
        return out

    def sum_and_dots(
        self,
        offsets: Tensor,
        order: Tensor,
        rows: Tensor,
        row_offsets: Tensor,
        latents: Tensor,
        weights: Tensor,
        a: Tensor,
        b: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums, out = torch.empty_like(b), torch.empty_like(weights)
        self.call("sum_and_dots", len(b), b.shape[1], offsets, len(out), order, rows, weights, a, b, sums, out)
        return sums, out

    def rescale_rows(self, rows: Tensor, norms: Tensor) -> None:
        self.call("rescale_rows", *rows.shape, rows, norms)

    def rational_forward(
        self, h: Tensor, C_in: Tensor, C_out: Tensor, num: Tensor, den: Tensor, centre: float, scale: float
    ) -> Tensor:
        out = torch.empty_like(h)
        self.call(
            "rational_forward", -(-h.numel() // BLOCK), h.numel(), h, C_in, min(C_in.ndim, 1), C_out, min(C_out.ndim, 1), num,
            len(num), den, len(den), centre, scale, out,
        )  # fmt: skip
        return out

    def rational_backward(
        self,
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
        blocks = -(-h.numel() // BLOCK)
        d_h = torch.empty_like(h)
        d_C_in, d_C_out = (torch.empty_like(h) if C.ndim else None for C in (C_in, C_out))
        d_num, d_den = (torch.empty(blocks, len(c), dtype=torch.float64) for c in (num, den))
        sum_in, sum_out = torch.empty(blocks, dtype=torch.float64), torch.empty(blocks, dtype=torch.float64)
        self.call(
            "rational_backward", blocks, h.numel(), h, grad, C_in, min(C_in.ndim, 1), C_out, min(C_out.ndim, 1), num, num_prime,
            len(num), den, den_prime, len(den), centre, scale, d_h, d_C_in, d_C_out, d_num, d_den, sum_in, sum_out,
        )  # fmt: skip
        return (
            d_h,
            sum_in.sum().float() if d_C_in is None else d_C_in,
            sum_out.sum().float() if d_C_out is None else d_C_out,
            d_num.sum(0),
            d_den.sum(0),
        )

    def edge_gain(
        self,
        amplitude: Tensor,
        h: Tensor,
        threshold: Tensor,
        on: Tensor,
        grad: Tensor,
        curvature: Tensor | None,
        weight: Tensor | None,
        bandwidth: float,
    ) -> tuple[Tensor, Tensor]:
        blocks, gain = -(-len(h) // BLOCK), torch.empty_like(h)
        sums = torch.empty(blocks, 2, dtype=torch.float64)
        self.call(
            "edge_gain", blocks, len(h), amplitude, h, threshold, on, grad, curvature, weight, float(bandwidth), gain, sums
        )  # fmt: skip
        return gain, sums.sum(0).float()

    def edge_backward(
        self,
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
        self.call(
            "edge_backward", -(-len(h) // BLOCK), len(h), gain, h, threshold, on, grad, weight, price, float(bandwidth),
            float(strength), d_amplitude, d_h, d_threshold,
        )  # fmt: skip
        return d_amplitude, d_h, d_threshold


def _passed(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, under $RSAE_CACHE (default ~/.cache/rsae)."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    processor = [line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features"))]
    key = [SOURCE.read_text(), *FLAGS, compiler, version, platform.machine(), platform.platform(), *processor]
    cache = Path(os.environ.get("RSAE_CACHE", Path.home() / ".cache" / "rsae")) / "kernels"
    target = cache / f"{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "check": True}
            try:
                subprocess.run([*command, OPENMP], **options)
                ctypes.CDLL(str(made))
            except (
                OSError,
                subprocess.SubprocessError,
            ):  # a compiler without OpenMP, or without its library: one thread
                subprocess.run(command, **options)
            os.replace(made, target)
    return target


def _without(reason: str) -> None:
    logging.getLogger("rsae").warning("rsae: %s: training takes the plain path, about twice as slow", reason.strip())
