"""How the benchmarks take times, and what they say of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

UNITS = ("amx_bf16", "avx512_bf16", "avx2")
"""Of a CPU's features, what its products run at; the first that it has is named."""


def milliseconds(step: Callable[[], object]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def median_ms(step: Callable[[], object], runs: int = 12, warmup: int = 3) -> float:
    """Median time of a call."""
    return median([milliseconds(step) for _ in range(runs + warmup)][warmup:])


def taking_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int = 9, *, least: int = 3, seconds: float = 60.0
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round. Whatever else the machine does in a round, it does to all of them.

    A step is called twice in a round, and the second call counts: what the other steps left in the caches is gone by then. After
    `seconds` no round is begun but for the `least`: in bfloat16, which many processors have no units for, a step may take ten.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = time.monotonic()
    for done in range(-1, rounds):  # the first is not counted
        if done >= least and time.monotonic() - began > seconds:
            break
        for name, step in steps.items():
            step()
            times[name].append(milliseconds(step))
    return {name: each[1:] for name, each in times.items()}


def ratio(times: Mapping[str, list[float]], a: str, b: str) -> float:
    """How many times as long a takes as b: the median over rounds."""
    return round(median(x / y for x, y in zip(times[a], times[b], strict=True)), 2)


def machine() -> str:
    """Processor, threads, torch: what a figure was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()] if cpuinfo.exists() else []
    about = {name.strip(): value.strip() for name, _, value in lines}
    features = about.get("flags", "").split()
    unit = next((unit for unit in UNITS if unit in features), "no vector units known")
    name = about.get("model name", "a CPU")
    return f"{name} ({unit}), {torch.get_num_threads()} threads, torch {torch.__version__}"
