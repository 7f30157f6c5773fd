"""kernels.c, compiled once for this machine by its C compiler and called through ctypes; None where there is no compiler.

The threads are torch's own: a second pool would fight with it for the cores. Results do not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
# No flag that lets the compiler reorder sums: a run has the same bytes every time
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
OPENMP = "-fopenmp"
BLOCK = 256
"""Elements of a block of the rational kernels, as in kernels.c."""


@cache
def library() -> Kernels | None:
    """The compiled kernels, from the cache or fresh; None, and one line in the log, where they cannot be made."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or platform.system() == "Windows":
        return _without("no C compiler was found")
    try:
        return Kernels(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        return _without(f"{compiler} failed: {getattr(error, 'stderr', '') or error}")


def usable(*tensors: Tensor) -> Kernels | None:
    """The kernels, if all of these are contiguous float32 tensors on the CPU."""
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return library() if fits else None


class Kernels:
    """The functions of kernels.c over tensors."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    def call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a function."""
        getattr(self._loaded, name)(*map(_passed, arguments))


def _passed(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor, under $RSAE_CACHE (default ~/.cache/rsae)."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    processor = [line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features"))]
    key = [SOURCE.read_text(), *FLAGS, compiler, version, platform.machine(), platform.platform(), *processor]
    cache = Path(os.environ.get("RSAE_CACHE", Path.home() / ".cache" / "rsae")) / "kernels"
    target = cache / f"{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
            if subprocess.run([*command, OPENMP], **options).returncode != 0:  # a compiler without it: one thread
                subprocess.run(command, **options, check=True)
            os.replace(made, target)
    return target


def _without(reason: str) -> None:
    logging.getLogger("rsae").warning("rsae: %s: training takes the plain path, about twice as slow", reason.strip())
