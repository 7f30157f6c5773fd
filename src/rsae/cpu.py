"""What a CPU is good at, and how it keeps memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_BFLOAT16_UNITS = ("amx_bf16", "bf16", "sve_bf16")  # of Intel and of ARM


@cache
def prefers_bfloat16() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32.

    Most laptops have no instructions for it: there torch's products take 5 to 20 times as long in bfloat16, a host 5 times. Intel's
    AVX-512 instructions do as many products a cycle in both, AMD's twice as many in bfloat16.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return True
    found = torch.cpu.get_capabilities()
    has_units = any(found.get(name) for name in _BFLOAT16_UNITS)
    has_avx512 = found.get("avx512_bf16", False) and "Intel" not in str(found.get("cpu_name"))
    return torch.backends.mkldnn.is_available() and (has_units or has_avx512)


@cache
def keep_pages() -> None:
    """Have the C library keep freed memory: mapping fresh pages for every large tensor costs up to half of a step.

    glibc is asked to serve large tensors from its heap and not to shrink it by less than 1 GiB. Elsewhere nothing is done.
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        except (OSError, AttributeError):  # another C library: slower, and right all the same
            pass
