"""Does preflight find a teacher that is read wrong? Real teachers as they are, and copies whose checkpoint declares something else.

    python -m benchmarks.preflight [RUN]

RUN is the folder of a demo (default runs/demo). Every row is one checkpoint; the last column names the readings that preflight says
fit better. A copy that is read wrong has to be contradicted, a teacher as it is must not.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rsae.artefacts import read_json
from rsae.hosts import load_host
from rsae.preflight import preflight
from rsae.teachers import Teacher, load_teacher


def b_dec_flipped(sae: Any, factor: float) -> None:
    sae.cfg.apply_b_dec_to_input = not sae.cfg.apply_b_dec_to_input


def trained_on_scaled_inputs(sae: Any, factor: float) -> None:
    """The weights of an SAE of factor * x, whose checkpoint does not say so."""
    for name in ("b_enc", "b_dec", "threshold"):
        if hasattr(sae, name):
            getattr(sae, name).data.mul_(factor)


def scale_folded_twice(sae: Any, factor: float) -> None:
    trained_on_scaled_inputs(sae, 1 / factor)


def declares_layer_norm(sae: Any, factor: float) -> None:
    sae.cfg.normalize_activations = "layer_norm"


def decoder_rows_not_unit(sae: Any, factor: float) -> None:
    sae.W_dec.data.mul_(torch.linspace(1.5, 3.0, len(sae.W_dec))[:, None])


DAMAGE: tuple[Callable[[Any, float], None] | None, ...] = (
    None,
    b_dec_flipped,
    trained_on_scaled_inputs,
    scale_folded_twice,
    declares_layer_norm,
    decoder_rows_not_unit,
)


@torch.no_grad()
def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    about = read_json(run / "run.json")["identity"]
    host = load_host(about["host"])
    mean = torch.tensor(read_json(run / "acts" / "train" / "meta.json")["sinks"]["mean"])
    factor = host.d_model**0.5 / float(mean.norm())
    print(f"{'teacher':<10} {'checkpoint':<26} {'FVU':>8} {'verdict':<13} readings that fit better")
    for family in about["families"]:
        teacher = load_teacher(run / family / "teacher")
        for damage in DAMAGE:
            sae = copy.deepcopy(teacher.sae)
            if damage is not None:
                damage(sae, factor)
                rebuilt = type(sae)(sae.cfg)
                rebuilt.load_state_dict(sae.state_dict())
                sae = rebuilt
            case = Teacher(sae, teacher.family, teacher.conventions)
            found = preflight(case, host, about["hook"], about["text"], tokens=8192, ce_tokens=256)
            better = "; ".join(f"{r['convention']} {r['instead']}" for r in found["alternatives"] if r["contradicts"])
            name = "as it is" if damage is None else damage.__name__.replace("_", " ")
            print(f"{family:<10} {name:<26} {found['metrics']['fvu']:8.4f} {found['verdict']:<13} {better}", flush=True)


if __name__ == "__main__":
    main()
