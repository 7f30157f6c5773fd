"""Have the C library keep freed memory: mapping fresh pages for every large tensor costs up to half of a step on CPU."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_pages() -> None:
    """Ask glibc to serve large tensors from its heap and not to shrink it by less than 1 GiB. Elsewhere nothing is done."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        except (OSError, AttributeError):  # another C library: slower, and right all the same
            pass
