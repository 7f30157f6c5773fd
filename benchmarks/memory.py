"""Peak memory of an upgrade, host and all, and of fine-tuning a wide SAE.

    python -m benchmarks.memory [--json] [--only NAME]

Each case runs in a process of its own, and its peak is what the system says of that process when it has ended:

    smollm2   `rsae upgrade` of a TopK teacher of 5,120 latents (trained for 100 steps) on SmolLM2-135M, from text to page
    gemma3    the same on Gemma 3 270M, whose vocabulary is five times as large
    wide      fine-tuning an RSAE of 768 -> 24,576 from a TopK with k = 32, batches of 2,048; activations are made up, and there is
              no host: what the loop itself takes

All leave out most of a store's two buffers: the upgrades here read 40,000 tokens, the wide one none from a store. At the default
1,000,000 they are 2 x 262,144 x d_in x 2 bytes, in a column of their own. Their sum is the most it can be: what an upgrade freed
by then is used again. A peak, without them, above its goal ends the command with an error.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import machine

GOALS_GB = {"smollm2": 3.0, "gemma3": 3.0, "wide": 6.0}
D_IN = {"smollm2": 576, "gemma3": 640, "wide": 768}
HOSTS = {
    "smollm2": ("package:smollm2-135m", "blocks.15.hook_resid_post"),
    "gemma3": ("package:gemma3-270m", "blocks.9.hook_resid_post"),
}
TEXT = "package:sae-probes"


def upgrade(folder: Path, stage: str, host: str, hook: str) -> None:
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
        data = Data.gather(load_host(host), hook, TEXT, folder / "acts", config, None)
        how = FinetuneConfig(steps=100, lr=1e-3, target_l0=32.0)
        pretrain("topk", data.train, how, d_sae=5120, held_out=data.validation, out=folder / "teacher")
    else:
        run(folder / "teacher", host, hook, TEXT, folder / "run", config=config, trust=True)


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
    peaks: dict[str, float] = {}
    for case in GOALS_GB if arguments.only is None else (arguments.only,):
        with tempfile.TemporaryDirectory() as folder:
            if case in HOSTS:
                child(case, folder, "teacher")
            peaks[case] = child(case, folder, "upgrade") if case in HOSTS else child(case, folder)
    buffers = {case: 2 * 2**18 * D_IN[case] * 2 / 2**30 for case in peaks}
    if arguments.json:
        rounded = [{case: round(gb, 2) for case, gb in each.items()} for each in (peaks, buffers)]
        goals = {case: GOALS_GB[case] for case in peaks}
        print(json.dumps({"peak_gb": rounded[0], "buffers_gb": rounded[1], "goal_gb": goals, "machine": machine()}))
    else:
        print(f"peak resident memory; {machine()}")
        for case, peak in peaks.items():
            print(f"  {case:<10}{peak:>6.2f} GB, buffers {buffers[case]:.2f} GB   goal {GOALS_GB[case]:.0f} GB")
    if missed := [case for case, peak in peaks.items() if peak > GOALS_GB[case]]:
        sys.exit(f"above their goals: {', '.join(missed)}")


def measure(case: str, folder: Path, *stage: str) -> float:
    """Run a case here; its peak, in GB."""
    if case in HOSTS:
        upgrade(folder, *stage, *HOSTS[case])
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
