"""Peak memory of an upgrade, host and all, and of fine-tuning a wide SAE.

    python -m benchmarks.memory [--json] [--only NAME]

Each case runs in a process of its own, and its peak is what the system says of that process when it has ended:

    upgrade   `rsae upgrade` of a TopK teacher of 5,120 latents (trained for 100 steps) on SmolLM2-135M, from text to page
    wide      fine-tuning an RSAE of 768 -> 24,576 from a TopK with k = 32, batches of 2,048; activations are made up, and there is
              no host: what the loop itself takes

Both leave out most of a store's two buffers: at the default 1,000,000 tokens these are 2 x 262,144 x d_in x 2 bytes (0.6 GB at d_in
576, 0.8 GB at 768), and the upgrade here reads 40,000 tokens, the wide one none from a store.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import machine

GOALS_GB = {"upgrade": 3.0, "wide": 6.0}
HOST, HOOK, TEXT = "package:smollm2-135m", "blocks.15.hook_resid_post", "package:sae-probes"


def upgrade(folder: Path, stage: str) -> None:
    """Train a teacher ("teacher"), or upgrade it ("upgrade")."""
    from rsae.finetune import FinetuneConfig
    from rsae.hosts import load_host
    from rsae.pipeline import Data, UpgradeConfig
    from rsae.pipeline import upgrade as run
    from rsae.pretrain import pretrain

    config = UpgradeConfig(
        train_tokens=40_000, validation_tokens=8_192, evaluation_tokens=16_384, ce_tokens=4_096,
        finetune=FinetuneConfig(steps=50, batch_size=2048),
    )  # fmt: skip
    if stage == "teacher":
        data = Data.gather(load_host(HOST), HOOK, TEXT, folder / "acts", config, None)
        how = FinetuneConfig(steps=100, lr=1e-3, target_l0=32.0)
        pretrain("topk", data.train, how, d_sae=5120, held_out=data.validation, out=folder / "teacher")
    else:
        run(folder / "teacher", HOST, HOOK, TEXT, folder / "run", config=config)


def wide(folder: Path) -> None:
    """Fine-tune a wide RSAE on made-up activations."""
    from benchmarks.step import Activations

    from rsae.calibrate import calibrate
    from rsae.finetune import FinetuneConfig, finetune
    from rsae.pretrain import initial_sae
    from rsae.sae import RationalSAE

    data = Activations(768, 24_576)
    teacher = initial_sae("topk", data, d_sae=24_576, l0=32, seed=0)
    init = calibrate(RationalSAE.from_teacher(teacher), [next(data.batches(2048, seed=0))])
    del teacher
    config = FinetuneConfig(steps=20, batch_size=2048, checkpoint_every=10)
    finetune(init, data, config, held_out=data, out=folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=GOALS_GB, help="one case")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        case, *rest = arguments.run
        print(json.dumps(measure(case, Path(rest[0]), *rest[1:])))
        return
    peaks: dict[str, Any] = {}
    for case in GOALS_GB if arguments.only is None else (arguments.only,):
        with tempfile.TemporaryDirectory() as folder:
            if case == "upgrade":
                child(case, folder, "teacher")
            peaks[case] = child(case, folder, "upgrade") if case == "upgrade" else child(case, folder)
    result = {
        "peak_gb": {case: round(peak, 2) for case, peak in peaks.items()},
        "goal_gb": {case: GOALS_GB[case] for case in peaks},
        "machine": machine(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"peak resident memory; {result['machine']}")
    for case, peak in peaks.items():
        print(f"  {case:<10}{peak:>6.2f} GB   goal {GOALS_GB[case]:.0f} GB")


def measure(case: str, folder: Path, *stage: str) -> float:
    """Run a case here; its peak, in GB."""
    if case == "upgrade":
        upgrade(folder, *stage)
    else:
        wide(folder)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def child(case: str, *arguments: str) -> float:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--run", case, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
