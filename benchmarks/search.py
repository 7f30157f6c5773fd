"""The search for the settings of control and RSAE alike, on validation documents: `benchmarks.evidence` measures what it chose.

    python -m benchmarks.search [--only TEXT]

fine-tunes teachers of the evidence (middle layers, seed 0) once for each variation of the settings, of the gate or of its
edge, each on the same batches for the same steps, and writes results/search.json after each teacher, SEARCH.md at the end. What is
finished is not run again. The evidence's cells have to be there.

    --only TEXT    only variations whose "cell: name" contains TEXT
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
from benchmarks.evidence import ARMS, BATCH, FINETUNE, RESULTS, RUNS, TEXT, Arm, Cell, gather, start
from benchmarks.evidence_tables import nats, ran_on, relative, table, write_page
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from rsae import finetune as finetuning
from rsae import rational, trainees
from rsae.artefacts import Progress, read_json, write_json
from rsae.calibrate import HeldOut, counting_threshold, match_l0, mean_l0
from rsae.cli import progress_shown
from rsae.evaluate import evaluate_runs
from rsae.rational import Surrogate
from rsae.sae import DELTA, THETA, RationalSAE
from rsae.sparse import Entries
from rsae.teachers import load_teacher
from rsae.text import evaluation_contexts

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

    from rsae.pipeline import Data

SMOLLM2, GEMMA = "package:smollm2-135m", "package:gemma3-270m"
TOKENS, CE_TOKENS = 60_000, {SMOLLM2: 32_768, GEMMA: 16_384}
LR = 1e-3
L0_PRICE = 0.95
"""What one more active latent of a sample costs: about what a matched L0 comes to at the end of the default's training."""


def triangle(distance: Tensor, width: Tensor) -> Tensor:
    """2 at the threshold, 0 at the window's ends; as `rsae.rational._window`."""
    return torch.where(distance.abs() < 0.5 * width, 2 - 4 * distance.abs() / width, 0.0)


def gaussian(distance: Tensor, width: Tensor) -> Tensor:
    """A standard deviation of width/6, cut off at the window's ends."""
    bell = 6 / math.sqrt(2 * math.pi) * torch.exp(-18 * (distance / width).square())
    return torch.where(distance.abs() < 0.5 * width, bell, 0.0)


@cache
def _own_density() -> Tensor:
    """F', with F(t) = phi(t)/t the smooth step that the fit of a JumpReLU of threshold 1 makes, across its design's gap."""
    teacher = JumpReLUSAE(JumpReLUSAEConfig(d_in=1, d_sae=1))
    torch.nn.init.ones_(teacher.threshold)
    gate = RationalSAE.from_teacher(teacher, support="dense").gate
    gap = DELTA / THETA
    t = torch.linspace(1 - gap, 1 + gap, 2001, dtype=torch.float64)
    step = (gate.amplitude(t, gate.C_in.double(), gate.C_out.double()) / t).detach()
    return (step[1:] - step[:-1]) * 2000 / (step[-1] - step[0])


def own_derivative(distance: Tensor, width: Tensor) -> Tensor:
    """The derivative of the fitted rational itself, its gap stretched over the window."""
    density, v = _own_density().to(distance.dtype), distance / width
    return torch.where(v.abs() < 0.5, density[((v + 0.5) * 2000).long().clamp(0, 1999)], 0.0)


class SignedTrainee(trainees.ThresholdTrainee):
    """A gate with two sides, sgn(h) phi(|h|): active where |h| is above the threshold."""

    def choose(self, h: Tensor) -> Entries:
        entries = super().choose(h.abs())
        return Entries(entries.rows, entries.latents, entries.shape)  # without the values, which are those of |h|

    def latents(self, h: Tensor, entries: Entries) -> Tensor:
        return super().latents(h.abs(), entries) * h.sign()


def two_sided(sae: RationalSAE) -> RationalSAE:
    """What a gate with two sides makes of `sae`, as a RationalSAE of twice the width: each latent, and its negative."""
    d_sae = sae.cfg.d_sae
    weights = {
        name: torch.cat([tensor, tensor]) if name != "b_dec" and tensor.shape == (d_sae,) else tensor
        for name, tensor in sae.state_dict().items()
    } | {
        "W_enc": torch.cat([sae.W_enc, -sae.W_enc], dim=1),
        "b_enc": torch.cat([sae.b_enc, -sae.b_enc]),
        "W_dec": torch.cat([sae.W_dec, -sae.W_dec]),
    }
    doubled = RationalSAE(replace(sae.cfg, d_sae=2 * d_sae))
    doubled.load_state_dict(weights)
    doubled.sync_config()
    return doubled


@dataclass(frozen=True)
class Variation:
    """How an arm differs from its default."""

    change: dict[str, Any] = field(default_factory=dict)
    """Of its FinetuneConfig."""
    degree: tuple[int, int] | None = None
    scales: Literal["one", "each"] | None = None
    """One scale for all latents, the amplitude a function of h; or one for each, a function of h/theta_j."""
    kernel: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of the edge, in place of the rectangle."""
    is_signed: bool = False
    auxiliary: float | None = None
    """Weight of a TopK's auxiliary loss."""
    share: float = 1.0
    """Of the L0 that it is trained at; its thresholds come down to the whole of it at the end."""

    def begin(self, kind: str, teacher: SAE[Any], data: Data, seed: int) -> SAE[Any]:
        """What it starts from, where its arm starts from `kind` (`benchmarks.evidence.start`)."""
        sae = start("scales" if self.scales == "each" else kind, teacher, data, seed, self.degree)
        if self.scales == "one":
            for name in ("C_in", "C_out"):
                setattr(sae.gate, name, torch.nn.Parameter(getattr(sae.gate, name).detach().median()))
            sae.sync_config()
        return sae

    @contextmanager
    def in_the_loop(self) -> Iterator[None]:
        """Within the block the loop trains this kind of gate, by this kernel."""
        with ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(mock.patch.object(rational, "_window", self.kernel))
                # which know the rectangle alone
                stack.enter_context(mock.patch.object(rational, "_edge_kernels", return_value=None))
            if self.is_signed:
                stack.enter_context(mock.patch.object(finetuning, "ThresholdTrainee", SignedTrainee))
            if self.auxiliary is not None:
                stack.enter_context(mock.patch.object(trainees, "AUXILIARY", self.auxiliary))
            yield


CONTROL = {
    "control": Variation(),
    "control, lr 5e-4": Variation({"lr": 5e-4}),
    "control, lr 2e-3": Variation({"lr": 2e-3}),
    "control, lr 4e-3": Variation({"lr": 4e-3}),
}
GATE_RATES = {
    f"{of}, gate rate {rate}": Variation({**CONTROL[of].change, "gate_lr": float(rate)})
    for of, rates in {
        "control": ("3e-3", "1e-2", "3e-2"),
        "control, lr 2e-3": ("3e-3", "1e-2"),
        "control, lr 4e-3": ("3e-3",),
    }.items()
    for rate in rates
}
"""What a JumpReLU control can vary besides: the rate of its thresholds, above that of a rational gate."""
THRESHOLDS = {
    "control, bandwidth 0.2": Variation({"surrogate": Surrogate(bandwidth=0.2)}),
    "control, bandwidth 0.8": Variation({"surrogate": Surrogate(bandwidth=0.8)}),
    "control, bandwidth 1.2": Variation({"surrogate": Surrogate(bandwidth=1.2)}),
    "control, gate rate 3e-4": Variation({"gate_lr": 3e-4}),
    **GATE_RATES,
    **{
        f"control, lr 2e-3, trained at {share:g} of the L0": Variation({"lr": 2e-3}, share=share)
        for share in (0.9, 0.8)
    },
}
"""And the window of its rectangle, and an L0 that it is opened to at the end."""
EDGE = {
    # Of the rectangle's variance, and cut off at three standard deviations
    "triangle, bandwidth 0.7": Variation({"surrogate": Surrogate(bandwidth=0.7)}, kernel=triangle),
    "Gaussian, bandwidth 0.87": Variation({"surrogate": Surrogate(bandwidth=0.87)}, kernel=gaussian),
    "the rational's own derivative, bandwidth 1.0": Variation(
        {"surrogate": Surrogate(bandwidth=1.0)}, kernel=own_derivative
    ),
}
SHAPE = {
    "degrees (3, 2)": Variation(degree=(3, 2)),
    "degrees (5, 4)": Variation(degree=(5, 4)),
    "two sides (d_sae counts each)": Variation(is_signed=True),
    "L0 at a price, matched at the end": Variation({"objective": "l0", "penalty": L0_PRICE}),
}
RATES = {
    "": Variation(),
    "lr 5e-4": Variation({"lr": 5e-4}),
    "lr 2e-3": Variation({"lr": 2e-3}),
    "lr 4e-3": Variation({"lr": 4e-3}),
}
RSAE = RATES | {
    "strength 0.3": Variation({"surrogate": Surrogate(strength=0.3)}),
    "bandwidth 0.3": Variation({"surrogate": Surrogate(bandwidth=0.3)}),
    "alpha 0": Variation({"alpha": 0.0}),
    "gate rate 2e-3": Variation({"gate_lr": 2e-3}),
}
OPENED = {f"trained at {share:g} of the L0": Variation(share=share) for share in (0.95, 0.9, 0.8)}
AT_TWICE_THE_RATE = {
    "gate rate 5e-4": Variation({"gate_lr": 5e-4}),
    "strength 0.3": Variation({"surrogate": Surrogate(strength=0.3)}),
    "strength 0.4": Variation({"surrogate": Surrogate(strength=0.4)}),
    "bandwidth 0.3": Variation({"surrogate": Surrogate(bandwidth=0.3)}),
    "alpha 0": Variation({"alpha": 0.0}),
    "crowding 160": Variation({"surrogate": Surrogate(crowding=160.0)}),
    "crowding 64": Variation({"surrogate": Surrogate(crowding=64.0)}),
    "scales frozen": Variation({"frozen": ("scales",)}),
    **EDGE, **SHAPE,
    "one scale for all latents": Variation(scales="one"),
    **OPENED,
}  # fmt: skip
"""From a JumpReLU, whose control is best with it."""
PAPER = {f"paper, l1 price {price:g}, hardened": Variation({"penalty": price}) for price in (0.1, 0.3, 1.0, 3.0)}
"""What is not counted is zeroed, at the threshold that leaves the teacher's L0."""


def _rsae(variations: dict[str, Variation]) -> dict[str, Variation]:
    return {f"rsae, {name}".removesuffix(", "): variation for name, variation in variations.items()}


JUMPRELU = {
    f"lr 2e-3, {name}": replace(variation, change={"lr": 2e-3, **variation.change})
    for name, variation in AT_TWICE_THE_RATE.items()
}
SPARING = {
    f"lr {lr}, strength 0.4, crowding {crowding:g}, sparing {sparing:g}": Variation(
        {"lr": float(lr), "surrogate": replace(finetuning.JUMPRELU_EDGE, crowding=crowding, sparing=sparing)}
    )
    for lr, crowding, sparing in (
        ("2e-3", 160.0, 0.0), ("2e-3", 64.0, 0.0), ("2e-3", 64.0, 0.1), ("2e-3", 160.0, 0.1), ("2e-3", 160.0, 0.03),
        ("2e-3", 32.0, 0.1), ("4e-3", 160.0, 0.1), ("4e-3", 32.0, 0.1),
    )
}  # fmt: skip
"""And what a rare latent pays: 32 and .1 are the recipe's."""
RECTANGLE = replace(finetuning.JUMPRELU_EDGE, kind="rectangle", crowding=0.0)
FIRST_ORDER = {
    f"lr {lr}, rectangle, strength 0.4, crowding 0, sparing 0.1": Variation({"lr": float(lr), "surrogate": RECTANGLE})
    for lr in ("2e-3", "4e-3")
}
FASTER = {
    f"control, lr {lr}, gate rate {rate}": Variation({"lr": float(lr), "gate_lr": float(rate)})
    for lr, rate in (("2e-3", "3e-2"), ("2e-3", "1e-1"), ("4e-3", "3e-2"), ("8e-3", "3e-3"), ("8e-3", "3e-2"))
}
WITHOUT = {"control, no auxiliary loss": Variation(auxiliary=0.0)}
VARIATIONS: dict[Cell, dict[str, Variation]] = {
    Cell(SMOLLM2, 15, "relu", 32, 0): CONTROL | _rsae({name: RATES[name] for name in ("", "lr 2e-3")}),
    Cell(SMOLLM2, 15, "topk", 32, 0): CONTROL
    | WITHOUT
    | _rsae(RSAE | EDGE | SHAPE | OPENED)
    | {"rsae, a scale for each latent": Variation(scales="each")}
    | PAPER,
    Cell(SMOLLM2, 15, "jumprelu", 32, 0): CONTROL | THRESHOLDS | _rsae(RATES | JUMPRELU),
    Cell(SMOLLM2, 15, "jumprelu", 64, 0): {
        name: (CONTROL | _rsae(RATES | JUMPRELU))[name]
        for name in ("control", "control, lr 2e-3", "rsae, lr 2e-3", "rsae, lr 2e-3, crowding 160")
    },
    Cell(GEMMA, 9, "topk", 32, 0): {name: CONTROL[name] for name in ("control", "control, lr 2e-3")}
    | WITHOUT
    | _rsae({"": Variation()}),
    **{
        Cell(GEMMA, layer, "jumprelu", 32, 0): {name: CONTROL[name] for name in ("control", "control, lr 2e-3")}
        | GATE_RATES
        | FASTER
        | _rsae({name: (RATES | JUMPRELU)[name] for name in ("", "lr 2e-3", "lr 2e-3, strength 0.4")})
        | _rsae(SPARING | FIRST_ORDER)
        for layer in (3, 9, 14)
    },
}
BEFORE = (
    "From the teacher of an earlier training loop. A TopK's had no auxiliary loss there, nor had its control, but for the one "
    "whose row says so."
)
"""Of cells in search.json that carry more than a cell's name."""
SHOWN = {"fvu": relative, "delta_ce": nats}


def train(cell: Cell, name: str, teacher: SAE[Any], data: Data, l0: float, progress: Progress | None) -> SAE[Any]:
    """One variation, at the teacher's L0 on validation text."""
    arm: Arm = ARMS[name.split(",")[0]]
    variation = VARIATIONS[cell][name]
    how = replace(FINETUNE, lr=LR, target_l0=variation.share * l0, seed=cell.seed, **arm.change)
    folder = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)
    out = RUNS.parent / "search" / cell.name / folder
    how = replace(how, **variation.change)
    with variation.in_the_loop():
        sae = finetuning.finetune(
            variation.begin(arm.start, teacher, data, cell.seed), data.train, how, held_out=data.validation, out=out,
            progress=progress, name=name,
        )  # fmt: skip
    if variation.is_signed:
        assert isinstance(sae, RationalSAE)
        sae = two_sided(sae)
    if variation.is_signed or how.objective == "l0" or variation.share < 1:  # else it is matched
        sae = match_l0(sae, HeldOut(data.validation), l0)
    return sae


def search(cell: Cell, names: list[str], progress: Progress | None) -> dict[str, Any]:
    """Train and measure the named variations from one teacher, each compared with the control as it is."""
    data = gather(cell, progress)
    teacher = load_teacher(RUNS / cell.name / "teacher").sae
    l0 = mean_l0(teacher, HeldOut(data.validation))
    arms = {name: train(cell, name, teacher, data, l0, progress) for name in dict.fromkeys(["control", *names])}
    eps = {
        name: counting_threshold(arms[name], HeldOut(data.validation), l0) if name in PAPER else 0.0 for name in arms
    }
    contexts = evaluation_contexts(data.host.tokenizer, TEXT, n_tokens=TOKENS, split="validation")
    pairs = [(name, "control") for name in arms if name != "control"]
    (found,) = evaluate_runs(
        {"": arms}, data.host, data.hook, contexts, store_stats=data.train.sink_rule, ce_tokens=CE_TOKENS[cell.host], eps=eps,
        pairs=pairs, progress=progress,
    ).values()  # fmt: skip
    return {
        name: {metric: found[name][metric] for metric in ("fvu", "delta_ce", "l0", "alive", "dense")}
        | {"minus_control": found.get(f"{name}_minus_control"), "provenance": found["provenance"]}
        for name in arms
    }


def page(result: dict[str, Any]) -> str:
    """SEARCH.md, from what search.json holds."""
    rows = [row for found in result["cells"].values() for row in found.values()]
    lines = [
        "# The search: settings of control and RSAE", "",
        f"`python -m benchmarks.search`, {ran_on(rows)}. Made by the command from `search.json`.", "",
        f"Seed 0; {FINETUNE.steps} steps of {BATCH} from teachers of the evidence, of earlier versions of the loop where a table "
        f"says so, at a rate of {LR:g}, of gates too. The rates that JumpReLU controls have in EVIDENCE.md are later, and by "
        "scripts (dev/LOG.md). "
        "Each row says how it differs from its arm as EVIDENCE.md has it from a TopK; from a JumpReLU an RSAE has strength 0.4, "
        f"crowding 32 and sparing 0.1 there. Measured on {TOKENS:,} tokens of validation documents, on which "
        "L0 is matched too; they are neither trained on nor evaluated in EVIDENCE.md, though of the sources evaluated there. "
        "Differences are from the control as it is, with the 95% interval of a bootstrap paired by document. One teacher and one "
        "seed: of several that are tried, the best looks better than it is. The RSAE's settings had been searched before, and "
        "longer than the control's (dev/LOG.md).",
    ]  # fmt: skip
    cells = {cell.name: cell for cell in VARIATIONS}
    for where, variations in result["cells"].items():
        cell = cells[where.partition(",")[0]]
        rows = []
        for name, m in variations.items():
            from_control = [show(m["minus_control"][key]) if m["minus_control"] else "" for key, show in SHOWN.items()]
            rows.append([
                name, f"{m['fvu']:.4f}", from_control[0], f"{m['delta_ce']:.4f}", from_control[1], f"{m['alive']:.2%}",
                f"{m['dense']:.2%}", f"{m['l0']:.2f}",
            ])  # fmt: skip
        heads = ["", "FVU", "from the control's", "delta-CE", "from the control's", "alive", "dense", "L0"]
        lines += [
            "",
            f"## {where}",
            "",
            *([] if where in cells else [BEFORE, ""]),
            f"The model's loss: on {CE_TOKENS[cell.host]:,} tokens.",
            "",
            table(heads, rows),
        ]
        if left := [name for name in VARIATIONS[cell] if name not in variations and where in cells]:
            lines.append(f"Not run: {'; '.join(left)}.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    file = RESULTS / "search.json"
    result: dict[str, Any] = read_json(file) if file.exists() else {"cells": {}}
    with progress_shown() as progress:
        for cell, variations in VARIATIONS.items():
            known = result["cells"].get(cell.name, {})
            names = [name for name in variations if name not in known and only in f"{cell.name}: {name}"]
            if names:
                found = search(cell, names, progress)
                in_order = sorted((known | found).items(), key=lambda item: list(variations).index(item[0]))
                result["cells"][cell.name] = dict(in_order)
                write_json(file, result)
    write_page(RESULTS / "SEARCH.md", page(result))


if __name__ == "__main__":
    main()
