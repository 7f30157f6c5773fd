"""On a GPU: one step of ours beside SAELens' and sparsify's TopK training steps, and the rational gate beside a copy, in one run.

    python -m benchmarks.gpu [--json]

The steps are those of benchmarks.step, the gate and the copy those of benchmarks.gate, in two precisions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gate import gates
from benchmarks.step import L0, Activations, ours, saelens, without_kernels
from benchmarks.timing import median_ms

D_IN, D_SAE, BATCH = 2304, 16384, 4096


def finished(step: Callable[[], object]) -> Callable[[], object]:
    """The step, waited for."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def steps(data: Activations, x: torch.Tensor, device: str) -> dict[str, Callable[[], object]]:
    """Training steps by name. `x` is on the CPU, where an SAE is made ready."""
    _, step = ours(data, x, device)
    x = x.to(device)
    return {
        "rsae": step,
        "rsae_plain": without_kernels(step),
        "saelens_fp32": saelens(data, x, autocast=False),
        "saelens_bf16": saelens(data, x, autocast=True),
        "sparsify": sparsify(data, x),
    }


def sparsify(data: Activations, x: torch.Tensor) -> Callable[[], object]:
    """EleutherAI sparsify's step: its SparseCoder with fused encoder and decoder, in the bfloat16 autocast that it sets."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(data.d_in, SparseCoderConfig(num_latents=data.d_sae, k=data.l0), device=x.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        coder.set_decoder_norm_to_unit_norm()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU, and torch sees none; benchmarks.step is the same on a CPU")
    data = Activations(D_IN, D_SAE)
    found = steps(data, next(data.batches(BATCH, seed=0)), "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        named = gates(BATCH, D_SAE, "cuda", dtype)
        found |= {f"{name}_{str(dtype).removeprefix('torch.')}": step for name, step in named.items()}
    ms = {name: median_ms(finished(step)) for name, step in found.items()}
    result: dict[str, Any] = {
        "tokens_per_s": round(1e3 * BATCH / ms["rsae"]),
        "vs_saelens_fp32": round(ms["saelens_fp32"] / ms["rsae"], 2),
        "vs_saelens_bf16": round(ms["saelens_bf16"] / ms["rsae"], 2),
        "vs_sparsify": round(ms["sparsify"] / ms["rsae"], 2),
        "vs_plain": round(ms["rsae_plain"] / ms["rsae"], 2),
        "s_of_22000_steps": round(22 * ms["rsae"], 1),
        "gate_vs_copy": {n: round(ms[f"gate_{n}"] / ms[f"copy_{n}"], 2) for n in ("float32", "bfloat16")},
        "ms": {name: round(value, 3) for name, value in ms.items()},
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"step of {BATCH} x {D_IN} -> {D_SAE}, L0 {L0}; gate on {BATCH} x {D_SAE}; {result['machine']}")
    for name, value in ms.items():
        print(f"  {name:<14}{value:>10.3f} ms")
    for name in ("vs_saelens_fp32", "vs_saelens_bf16", "vs_sparsify", "vs_plain", "s_of_22000_steps", "gate_vs_copy"):
        print(f"  {name}: {result[name]}")


if __name__ == "__main__":
    main()
