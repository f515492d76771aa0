"""Memory for what calls on a CPU return: kept by the C library, or new in large pages.

The kernel clears every page at its first touch. Of small pages that takes calls longer than their
arithmetic (decision 33).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

LARGE_BLOCK = 32 << 20  # bytes from which glibc maps every block anew; it allows no more
_KEPT = 256 << 20
_LARGE = 2 << 20  # of a large page
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


# glibc's environment variables for the same thresholds: a user's setting stays
_SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc keep what calls free, up to 256 MiB of it, for the next call to take.

    (In threads other than the first it keeps up to 64 MiB in any case.) By itself it gives back
    what was larger than any block freed before, and whatever is free beyond twice as much.
    """
    said = os.environ.keys() & _SAID or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = None if said else getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `torch.empty` on the CPU; in large pages where the memory is new in any case."""
    x = torch.empty(shape, dtype=dtype, device="cpu")
    if x.nbytes >= LARGE_BLOCK:
        in_large_pages(x)
    return x


def in_large_pages(x: Tensor) -> None:
    """Ask for large pages below a tensor that nobody has written to."""
    advise = _madvise()
    if advise is not None:
        begin = -(-x.data_ptr() // _LARGE) * _LARGE
        advise(begin, x.nbytes - (begin - x.data_ptr()), mmap.MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function, where there are large pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast(Callable[[int, int, int], int], function)


def _c_library() -> ctypes.CDLL | None:
    """The functions of this process; None on Windows."""
    return ctypes.CDLL(None) if os.name == "posix" else None
