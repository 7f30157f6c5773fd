"""How exactly stage 1 reproduces its teachers: FVU of the calibrated RSAE, hard and dense, beside its teacher's.

    python -m benchmarks.init [RUN]

RUN is the folder of a demo (default runs/demo). Calibrated on training activations, measured on validation activations, whose
documents come from other sources.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rsae.calibrate import calibrate
from rsae.harvest import ActivationStore
from rsae.metrics import ReconstructionMetrics
from rsae.sae import RationalSAE
from rsae.teachers import load_teacher

CALIBRATION_BATCHES, MEASURED_BATCHES, BATCH = 4, 8, 2048


@torch.no_grad()
def fvu(sae: Any, x: torch.Tensor) -> float:
    metrics = ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae)
    for part in x.split(1024):
        latents = sae.encode(part)
        metrics.update(part, sae.decode(latents), latents, torch.zeros(len(part), dtype=torch.int64))
    return metrics.compute()["fvu"]


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    train, validation = ActivationStore.open(run / "acts" / "train"), ActivationStore.open(run / "acts" / "validation")
    sample = list(islice(train.batches(BATCH, seed=0), CALIBRATION_BATCHES))
    x = torch.cat([part for part, _ in islice(validation.iterate(BATCH), MEASURED_BATCHES)])
    print(
        f"{len(x)} tokens       teacher's FVU   hard, relative   dense, relative   dense x_hat against the teacher's, of its error"
    )
    for family in ("relu", "jumprelu", "topk"):
        teacher = load_teacher(run / family / "teacher").sae
        hard, dense = (
            calibrate(RationalSAE.from_teacher(teacher, support=support), sample) for support in ("hard", "dense")
        )
        reference = fvu(teacher, x)
        with torch.no_grad():
            apart = sum(float((dense(part) - teacher(part)).double().square().sum()) for part in x.split(1024))
            error = sum(float((teacher(part) - part).double().square().sum()) for part in x.split(1024))
        print(
            f"{family:<12} {reference:15.6f} {fvu(hard, x) / reference - 1:+16.2e} {fvu(dense, x) / reference - 1:+17.3%}"
            f" {apart / error:20.3%}"
        )


if __name__ == "__main__":
    main()
