"""Real processes that share a run, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(folder: Path, code: str, ranks: int = 2, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run code, in which `ranks` is set, in so many processes on the CPU; what each prints stands in folder/RANK.

    `before`: code that runs before the processes join.
    """
    script, tests = folder / "script.py", str(Path(__file__).parent)
    head = f"import sys; sys.path.insert(0, {tests!r}); from rsae.ranks import Ranks\n{before}\nranks = Ranks.current()"
    script.write_text(f"{head}\nsys.stdout = open(r'{folder}/' + str(ranks.rank), 'w', buffering=1)\n{code}")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
