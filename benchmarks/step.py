"""Time of one fine-tuning step of ours beside SAELens' TopK training step and beside the floor, in one run.

    python -m benchmarks.step [--json]

The floor is what no implementation can leave out: one dense encoder product in bfloat16, one pass of Adam over the weights, and
one pass over the pre-activations. SAELens' step is its own TopKTrainingSAE forward, loss and backward, with the same Adam.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from rsae.allocator import keep_pages
from rsae.finetune import FinetuneConfig, trainee_for
from rsae.pretrain import initial_sae
from rsae.sae import RationalSAE

D_IN, D_SAE, BATCH, L0 = 640, 5120, 2048, 32


class Activations:
    """Random activations: the time of a step does not depend on what they say."""

    d_in, mean = D_IN, torch.zeros(D_IN)

    def batches(self, batch_size: int, *, seed: int, start: int = 0):
        while True:
            yield torch.randn(batch_size, D_IN)


def median_ms(step: Callable[[], object], runs: int = 12, warmup: int = 3) -> float:
    """Median time of a call, in milliseconds."""
    times = []
    for _ in range(runs + warmup):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[warmup:])[runs // 2]


def ours(x: torch.Tensor) -> Callable[[], object]:
    """The step of `rsae.finetune` for an RSAE with hard support, made from a TopK."""
    teacher = initial_sae("jumprelu", Activations(), d_sae=D_SAE, l0=L0, seed=0)  # type: ignore[arg-type]
    trainee = trainee_for(RationalSAE.from_teacher(teacher), 1.0, FinetuneConfig())
    optimizer = torch.optim.Adam(trainee.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        trainee(x).loss.backward()
        optimizer.step()
        trainee.constrain()

    return step


def saelens(x: torch.Tensor, autocast: bool) -> Callable[[], object]:
    """SAELens' training step for TopK."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=L0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    given = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sae.training_forward_pass(given).loss
        loss.backward()
        optimizer.step()

    return step


def floor(x: torch.Tensor) -> Callable[[], object]:
    """Encoder product, Adam over two matrices, one pass over the pre-activations."""
    weights = [torch.nn.Parameter(torch.randn(D_SAE, D_IN)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
    narrow, encoder = x.bfloat16(), weights[0].detach().bfloat16()

    def step() -> None:
        torch.nn.functional.linear(narrow, encoder).sum()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    keep_pages()
    x = torch.randn(BATCH, D_IN)
    ms = {
        "rsae": median_ms(ours(x)),
        "saelens_fp32": median_ms(saelens(x, autocast=False), runs=5, warmup=1),
        "saelens_bf16": median_ms(saelens(x, autocast=True), runs=5, warmup=1),
        "floor": median_ms(floor(x)),
    }
    result = {
        "tokens_per_s": round(1e3 * BATCH / ms["rsae"]),
        "vs_saelens_fp32": round(ms["saelens_fp32"] / ms["rsae"], 2),
        "vs_saelens_bf16": round(ms["saelens_bf16"] / ms["rsae"], 2),
        "vs_floor": round(ms["rsae"] / ms["floor"], 2),
        "ms": {name: round(value, 1) for name, value in ms.items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"step of {BATCH} x {D_IN} -> {D_SAE}, L0 {L0}; {result['machine']}")
    for name, value in ms.items():
        print(f"  {name:<14}{value:>8.1f} ms  {value / ms['rsae']:>6.2f} x ours")


if __name__ == "__main__":
    main()
