"""Processes that share a run: real ones, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import torchrun

from rsae.ranks import Ranks


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_no_thread_of_a_connection_outlives_the_run(tmp_path) -> None:
    """Not even where an error was caught that holds a frame, which holds the connections: such a thread may abort the process."""
    before = """
import atexit, pathlib
def gloo():
    return sum("gloo" in file.read_text() for file in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: print(gloo()))
"""
    code = """
def refused():
    apart = ranks.apart()
    apart.gather(1)
    error = ValueError()  # whose traceback holds this frame, which holds the error
    raise error
try:
    refused()
except ValueError:
    print(gloo() > 0)
"""
    done = torchrun(tmp_path, code, before=before)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text().split() for rank in "01"] == [["True", "0"]] * 2


def test_a_lost_rank_is_said_and_not_waited_for(tmp_path) -> None:
    code = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for those that are left: before one can be lost
try:
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()
except ConnectionError as error:
    print(error)
"""
    assert torchrun(tmp_path, code).returncode != 0
    assert "rank 0 lost another rank of 2" in (tmp_path / "0").read_text()


@pytest.mark.slow
def test_one_that_works_alone_is_waited_for(tmp_path) -> None:
    """However long it takes: nothing but work that all do alike has to come within TIMEOUT."""
    before = "from datetime import timedelta; from rsae import ranks as module; module.TIMEOUT = timedelta(seconds=2)"
    code = """
import time
from rsae.mesh import Mesh
mesh = Mesh.of(2)
print(mesh.once(lambda: time.sleep(5) or "measured"))
with ranks.main_first():
    time.sleep(5 * ranks.is_main)
print("loaded")
"""
    done = torchrun(tmp_path, code, before=before)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["measured\nloaded\n"] * 2


def test_more_ranks_than_gpus(monkeypatch) -> None:
    settings = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="rank 3 of this machine has no GPU, there are 2"):
        Ranks.current()


@pytest.mark.parametrize(("local", "found"), [("1", 1), (None, 3)])
def test_each_rank_takes_the_gpu_of_its_number_on_the_machine(monkeypatch, local, found) -> None:
    settings = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": local, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    taken = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)

    def joined(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr("torch.distributed.init_process_group", joined)
    with pytest.raises(InterruptedError):
        Ranks.current()
    assert taken == [found]
