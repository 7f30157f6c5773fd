"""What a CPU is good at, and how it keeps memory."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # the latter two of ARM


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own.

    Most laptops do not. There torch's products in bfloat16 take 5 to 20 times as long as those in float32, a host 5 times.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return True
    found = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(found.get(name) for name in _BFLOAT16_UNITS)


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
