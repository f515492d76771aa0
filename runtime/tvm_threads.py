"""Shares work items among torch's threads, or threads of our own where torch's cannot be had.

torch's OpenMP threads wait for their next loop by spinning: on the cores that threads of our own
would then want. So we hand our work to them. A kernel's function releases the interpreter's lock.
A forked child has none of its parent's threads: children of multiprocessing start their own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

_PIECES = 4  # pieces of work per thread, so that sequences of unequal length even out
_PROCESS = os.getpid()
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs its loops on; None: not one with GNU's entry points."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for name in ("libgomp.so.1", None):  # by the name it was loaded under, or as all may see it
        try:
            library = ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
            library.GOMP_parallel.argtypes = (
                _CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint,
            )  # fmt: skip
            library.GOMP_parallel.restype = None
            library.omp_get_thread_num.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None


def _torchs(threads: int, run: Callable[[int], None]) -> bool:
    """Call `run` in each of that many of torch's threads; False where they cannot be had."""
    forked = os.getpid() != _PROCESS or multiprocessing.parent_process() is not None
    library = None if forked else _openmp()
    if library is None:
        return False
    failed: list[BaseException] = []

    def body(_: object) -> None:
        try:
            run(library.omp_get_thread_num())
        except BaseException as error:  # noqa: BLE001: raised below, in the caller's thread
            failed.append(error)

    library.GOMP_parallel(_CALLBACK(body), None, threads, 0)
    if failed:
        raise failed[0]
    return True


@lru_cache(maxsize=4)
def _helpers(process: int, count: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. `process`: no thread survives a fork."""
    del process
    return ThreadPoolExecutor(count, thread_name_prefix="chunkwise")


def share(items: int, threads: int, work: Callable[[int, int, int], None]) -> None:
    """Call `work(thread, begin, end)` until all items are done; the caller is thread 0.

    The threads take pieces in order, each the next one when it is done with its last.
    """
    threads = min(threads, items)
    if threads <= 1:
        work(0, 0, items)
        return
    size = -(-items // (threads * _PIECES))
    pieces = iter(range(0, items, size))

    def run(thread: int) -> None:
        for begin in _shared(pieces):
            work(thread, begin, min(begin + size, items))

    if _torchs(threads, run):
        return
    helpers = _helpers(os.getpid(), threads - 1)
    others = [helpers.submit(run, thread) for thread in range(1, threads)]
    run(0)
    for other in others:
        other.result()


def _shared(pieces: Iterator[int]) -> Iterator[int]:
    """What is left of an iterator that several threads draw from."""
    while True:
        begin = next(pieces, None)
        if begin is None:
            return
        yield begin
