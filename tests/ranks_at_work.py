"""What tests/test_mesh.py runs in every process: arms of all kinds, trained on a mesh.

Arguments: folder, shards of the latents, and the step at which every arm is stopped (0: none); there the last rank is killed in the
last arm.
"""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from test_finetune import SMALL, MemoryStore

from rsae import sparse, trainees
from rsae.finetune import finetune
from rsae.mesh import Mesh
from rsae.teachers import load_teacher

ARMS = {
    "relu": {},
    "jumprelu": {},
    "topk": {},
    "topk-with-silent": {},
    "gated": {},
    "rational-relu": {},
    "rational-topk": {},
    "rational-jumprelu": {"objective": "l0", "penalty": 0.1},
    "dense-topk": {"objective": "l1", "penalty": 0.05},
}


def main() -> None:
    sparse.NARROW = torch.float32  # so that only the order of sums differs
    torch.autocast = lambda *_, **__: nullcontext()
    folder, shards, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    mesh = Mesh.of(shards)
    data, held_out = MemoryStore(2000, seed=0), MemoryStore(1000, seed=1)

    def progress(name: str, done: int, total: int) -> None:
        if done == stop:
            if name == list(ARMS)[-1] and mesh.ranks.rank == mesh.ranks.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if name != list(ARMS)[-1]:
                raise KeyboardInterrupt

    for arm, change in ARMS.items():
        trainees.SILENT_TOKENS = 200 if "silent" in arm else 100_000
        config = replace(SMALL, steps=20, **change)
        sae = load_teacher(folder.parent / "start" / arm).sae
        try:
            finetune(sae, data, config, held_out=held_out, out=folder / arm, progress=progress, name=arm, mesh=mesh)
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    main()
