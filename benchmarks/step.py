"""Time of one fine-tuning step of ours beside SAELens' TopK training step and beside the floor, in one run.

    python -m benchmarks.step [--json]

The floor is what no implementation can leave out: one dense encoder product in bfloat16 (in float32 on a CPU that is
faster so), one pass of Adam over the weights, and one pass over the pre-activations. "plain" is our step by what torch alone
has; "naive" the same loss by autograd, with every latent of every token. SAELens' step is its own TopKTrainingSAE forward, loss
and backward, with the same Adam. Ours is all that the loop does in a step. They take turns, and ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from benchmarks.timing import machine, ratio, taking_turns
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from rsae import kernels
from rsae.calibrate import calibrate
from rsae.cpu import keep_pages, prefers_bfloat16
from rsae.finetune import FinetuneConfig, _ready_to_train, take_step, trainee_for
from rsae.mesh import ALONE
from rsae.rational import Surrogate
from rsae.sae import RationalSAE
from rsae.sparse import pre_activations
from rsae.trainees import SparseTrainee

D_IN, D_SAE, BATCH, L0 = 640, 5120, 2048, 32
SIZES = ((D_IN, D_SAE, BATCH), (576, 4608, BATCH), (D_IN, D_SAE, 2 * BATCH))
"""d_in, d_sae and batch; the first is what the names of --json are of."""


class Activations:
    """Sums of a few directions of a dictionary and noise: as on a real model, about twice L0 of the latents are near their edge."""

    def __init__(self, d_in: int = D_IN, d_sae: int = D_SAE, l0: int = L0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.d_in, self.d_sae, self.l0, self.mean, self.fingerprint = d_in, d_sae, l0, torch.zeros(d_in), ""

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed + 1000 * start)
        while True:
            chosen = torch.randint(self.d_sae, (batch_size, self.l0), generator=generator)
            weights = 1 + 0.3 * torch.rand(batch_size, self.l0, generator=generator)
            noise = 0.02 * torch.randn(batch_size, self.d_in, generator=generator)
            sums = torch.nn.functional.embedding_bag(chosen, self.directions, per_sample_weights=weights, mode="sum")
            yield (sums + noise).chunk(world)[rank]

    def iterate(self, batch_size: int) -> Iterator[tuple[torch.Tensor, None]]:
        yield next(self.batches(batch_size, seed=1)), None


def _start(data: Activations, x: torch.Tensor) -> SAE[Any]:
    """An RSAE with hard support, made from a TopK that knows the dictionary, ready to train."""
    teacher = TopKSAE(TopKSAEConfig(d_in=data.d_in, d_sae=data.d_sae, k=data.l0))
    with torch.no_grad():
        teacher.W_dec.copy_(data.directions)
        teacher.W_enc.copy_(data.directions.T)
        teacher.b_enc.fill_(-0.22)  # so that the tail of the interference is as thin as a trained encoder's
    init = calibrate(RationalSAE.from_teacher(teacher), [x]).to(ALONE.device)
    return _ready_to_train(init, [x], FinetuneConfig(), data.l0, ALONE)


def ours(data: Activations, x: torch.Tensor, device: str = "cpu") -> tuple[SparseTrainee, Callable[[], object]]:
    """The step of `rsae.finetune` for an RSAE with hard support."""
    trainee = trainee_for(_start(data, x), 1.0, FinetuneConfig(target_l0=data.l0)).to(device)
    x, mean = x.to(device), data.mean.to(device)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=1e-4, fused=True)
    assert isinstance(trainee, SparseTrainee)
    return trainee, lambda: take_step(trainee, optimizer, x, mean, data.l0)


def without_kernels(step: Callable[[], object]) -> Callable[[], object]:
    """The same step by what torch alone has."""

    def plain() -> None:
        found, kernels.usable = kernels.usable, lambda *tensors, dtype=None: None
        try:
            step()
        finally:
            kernels.usable = found

    return plain


def naive(data: Activations, x: torch.Tensor) -> Callable[[], object]:
    """The same loss as it is written down: every latent of every token, by torch's autograd, its products in bfloat16 as ours."""
    sae = _start(data, x).to(x.device).requires_grad_(True)
    assert isinstance(sae, RationalSAE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda or prefers_bfloat16()):
            h = sae.pre_acts(x).float()
            norms = sae.W_dec.detach().norm(dim=1, keepdim=True)
            z = sae.gate(h, surrogate=Surrogate(), curvature=norms.squeeze(1) ** 2 / len(x))
            x_hat = sae.decode(z).float()
        ((x_hat - x).square().sum() / len(x)).backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec.mul_(norms / sae.W_dec.norm(dim=1, keepdim=True))

    return without_kernels(step)


def saelens(data: Activations, x: torch.Tensor, autocast: bool) -> Callable[[], object]:
    """SAELens' training step for TopK."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=data.d_in, d_sae=data.d_sae, k=data.l0, device=x.device.type))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    given = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = sae.training_forward_pass(given).loss
        loss.backward()
        optimizer.step()

    return step


def floor(x: torch.Tensor, d_sae: int = D_SAE) -> Callable[[], object]:
    """Encoder product, Adam over two matrices, one pass over the pre-activations."""
    weights = [torch.nn.Parameter(torch.randn(d_sae, x.shape[1])) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
    dtype = torch.bfloat16 if x.is_cuda or prefers_bfloat16() else torch.float32
    inputs, encoder = x.to(dtype), weights[0].detach().to(dtype)

    def step() -> None:
        torch.nn.functional.linear(inputs, encoder).sum()
        optimizer.step()

    return step


def measure(d_in: int, d_sae: int, batch: int) -> dict[str, Any]:
    """All of them at one size."""
    data = Activations(d_in, d_sae)
    x = next(data.batches(batch, seed=0))
    trainee, step = ours(data, x)
    times = taking_turns({
        "rsae": step,
        "floor": floor(x, d_sae),
        "rsae_plain": without_kernels(step),
        "rsae_naive": naive(data, x),
        "saelens_fp32": saelens(data, x, autocast=False),
        "saelens_bf16": saelens(data, x, autocast=True),
    })  # fmt: skip
    h = pre_activations(x - trainee.centre, trainee.W_enc, trainee.b_enc)
    ms = {name: round(median(each), 1) for name, each in times.items()}
    return {
        "size": f"{batch} x {d_in} -> {d_sae}",
        "tokens_per_s": round(1e3 * batch / ms["rsae"]),
        "vs_saelens_fp32": ratio(times, "saelens_fp32", "rsae"),
        "vs_saelens_bf16": ratio(times, "saelens_bf16", "rsae"),
        "vs_floor": ratio(times, "rsae", "floor"),
        "vs_plain": ratio(times, "rsae_plain", "rsae"),
        "vs_naive": ratio(times, "rsae_naive", "rsae"),
        "entries_per_token": round(len(trainee.choose(h).rows) / batch, 1),
        "ms": ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    keep_pages()
    if as_json:
        found = [measure(*size) for size in SIZES]
        print(json.dumps({**found[0], "others": found[1:], "machine": machine()}))
        return
    print(machine())
    for size in SIZES:
        row = measure(*size)
        print(
            f"step of {row['size']}, L0 {L0}, {row['entries_per_token']:.0f} entries a token: {row['vs_floor']} floors"
        )
        for name, value in row["ms"].items():
            times = row.get(f"vs_{name.removeprefix('rsae_')}")
            text = "" if name in ("rsae", "floor") else f"  {times:>6.2f} x ours"
            print(f"  {name:<14}{value:>8.1f} ms{text}", flush=True)


if __name__ == "__main__":
    main()
