"""The processes that share a run: one, or those that torchrun started. Nothing else in rsae touches torch.distributed's set-up."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits, in the middle of work that all do alike, before it gives the others up."""
PATIENCE = timedelta(days=1)
"""How long it waits where one works alone, loads a model, measures, puts a large checkpoint together. A rank that dies closes its
connections, and is not waited for."""


class Ranks(NamedTuple):
    """This process among those of the run. Alone it is rank 0 of 1, and no method waits for anybody.

    The methods that pass values are collective: every rank calls them, in the same order and from one thread. They raise
    ConnectionError if another rank has died or is silent for `PATIENCE`.
    """

    rank: int = 0
    world: int = 1
    connections: int = 0
    """Which of `_groups`. What holds the group itself would keep it, and its threads, beyond the end of the run."""

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of this run; the first call joins them, if torchrun (or its environment) says that there are others.

        CPU tensors go by gloo and, where there are GPUs, CUDA tensors by NCCL: each rank of a machine then takes the GPU of its
        number, which becomes torch's current device. Call it before anything is put on a GPU.

        Raises:
            ValueError: more ranks on this machine than GPUs.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                return cls()
            backend = "gloo"
            if torch.cuda.is_available():
                found = torch.cuda.device_count()
                # Other launchers than torchrun name no LOCAL_RANK; they fill a machine before the next
                local = int(os.environ.get("LOCAL_RANK", int(os.environ["RANK"]) % max(1, found)))
                if local >= found:
                    raise ValueError(
                        f"rank {local} of this machine has no GPU, there are {found}: start at most {found} processes, or hide "
                        'the GPUs with CUDA_VISIBLE_DEVICES="" and use the processors'
                    )
                torch.cuda.set_device(local)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=TIMEOUT)
            atexit.register(_leave)
        if dist.get_world_size() == 1:
            return cls()
        if not _groups:
            _groups.append(_patient())
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes what is written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that pickles), by rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.lost():
            dist.all_gather_object(values, value, group=_groups[self.connections])
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        with self.lost():
            dist.broadcast_object_list(values, src=0, group=_groups[self.connections])
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.gather(None)

    def agree(self, what: str, value: str) -> None:
        """Check that every rank has the same `value` of `what` (a config's hash, a seed).

        Raises:
            ValueError: on every rank, if they differ.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(values))
            raise ValueError(f"the ranks have different {what} ({listed}): start all with the same command and files")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others: what is made once and then found (a cache) is made by one."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def apart(self) -> Ranks:
        """The same ranks by connections of their own, for another thread. Collective."""
        if self.world == 1:
            return self
        _groups.append(_patient())
        return self._replace(connections=len(_groups) - 1)

    @contextmanager
    def lost(self) -> Iterator[None]:
        """torch's error where a rank is lost, as one that says so."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1:
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConnectionError(f"rank {self.rank} lost another rank of {self.world} ({reason})") from error


_groups: list[Any] = []
"""Those on which a rank that works alone is waited for: the first for all, more by `Ranks.apart`."""


def _patient() -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    """Close all connections and end their threads: one that is still at work when the interpreter is gone aborts the process."""
    _groups.clear()
    gc.collect()  # an error that was caught may hold frames, and these a group
    dist.destroy_process_group()
