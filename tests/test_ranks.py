"""Processes that share a run: real ones, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsae.ranks import Ranks

HEAD = "import sys\nfrom rsae.ranks import Ranks\nranks = Ranks.current()\n"


def torchrun(folder: Path, code: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run code in `ranks` processes; what they say stands in folder/RANK."""
    script = folder / "script.py"
    script.write_text(HEAD + f"sys.stdout = open(r'{folder}/' + str(ranks.rank), 'w', buffering=1)\n" + code)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_alone_nothing_waits() -> None:
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert ranks.gather("a") == ["a"]
    assert ranks.broadcast("a") == "a"
    ranks.agree("seed", "0")
    ranks.barrier()
    with ranks.main_first():
        pass
    assert ranks.apart() is ranks


def test_values_pass_between_ranks(tmp_path) -> None:
    code = """
print(ranks.rank, ranks.world, ranks.is_main, ranks == Ranks.current())
print(ranks.gather(f"from {ranks.rank}"), ranks.broadcast({"of": ranks.rank}))
ranks.agree("seed", "7")
print(ranks.apart().gather(ranks.rank))
with ranks.main_first():
    found = open(sys.argv[0] + ".made", "x" if ranks.is_main else "r").mode
print(found)
try:
    ranks.agree("seed", str(ranks.rank))
except ValueError as error:
    print(error)
"""
    done = torchrun(tmp_path, code)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text().splitlines() == [
            f"{rank} 2 {rank == 0} True",
            "['from 0', 'from 1'] {'of': 0}",
            "[0, 1]",
            "xr"[rank],
            "the ranks have different seed (rank 0: 0, rank 1: 1): start all with the same command and files",
        ]


def test_a_lost_rank_is_said_and_not_waited_for(tmp_path) -> None:
    code = """
import os, signal
ranks.barrier()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for those that are left
if ranks.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    ranks.barrier()
except ConnectionError as error:
    print(error)
"""
    assert torchrun(tmp_path, code).returncode != 0
    assert "rank 0 lost another rank of 2" in (tmp_path / "0").read_text()


def test_more_ranks_than_gpus(monkeypatch) -> None:
    settings = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="rank 3 of this machine has no GPU, there are 2"):
        Ranks.current()
