"""Memory for what calls on a CPU return: kept by the C library, or new in large pages.

The kernel clears every page at its first touch. Of small pages that takes calls longer than their
arithmetic (docs/decisions.md, 33).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache

import torch
from torch import Tensor

_KEPT = 32 << 20  # bytes; glibc maps anew whatever is larger
_LARGE = 2 << 20  # of a large page


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have the C library keep what calls free, up to 64 MiB, for the next call to take.

    glibc gives the kernel back what was larger than any block freed before (up to 32 MiB), and
    whatever is free beyond twice as much. The block is never touched.
    """
    torch.empty(_KEPT - (1 << 13), dtype=torch.uint8)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `torch.empty`; in large pages where the memory is new in any case."""
    x = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if x.nbytes >= _KEPT and advise is not None:
        begin = -(-x.data_ptr() // _LARGE) * _LARGE
        advise(begin, x.nbytes - (begin - x.data_ptr()), mmap.MADV_HUGEPAGE)
    return x


@lru_cache(maxsize=1)
def _madvise() -> ctypes._FuncPointer | None:
    """The C library's function, where there are large pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
