"""Shares work items among torch's threads, or threads of our own where torch's cannot be had.

torch's OpenMP threads wait for their next loop by spinning: on the cores that threads of our own
would then want. So they run ours too, by compiled code (`worker.py`). A forked child has none
of its parent's threads: children of multiprocessing start their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .allocator import empty
from .build import Function
from .worker import Arguments, described, worker

_PIECES = 4  # pieces of work per thread, so that sequences of unequal length even out
_PROCESS = os.getpid()
SHARED = 1 << 19  # numbers in the states of tokens from which another thread is worth waking


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A kernel with its arguments: `values`, then the first work item and the one after the last.

    Attributes:
        own: by position among the values, tensors `[threads, ...]`: a thread passes its own row.
        each: work items of the kernel in one item that threads share.
    """

    function: Function
    values: Sequence[object]
    own: Mapping[int, Tensor] = field(default_factory=dict)
    each: int = 1

    def given(self, thread: int) -> list[object]:
        """The arguments of a thread, without the items."""
        values = list(self.values)
        for n, rows in self.own.items():
            values[n] = rows[thread]
        return values


class Room(threading.local):
    """Scratch memory of so many numbers, of each thread its own."""

    def __init__(self, size: int) -> None:
        self.tensor = empty(size)


def run(works: Sequence[Work], items: int, threads: int) -> None:
    """Run `works` on all items, on at most `threads` threads: each item by all works in turn.

    Raises:
        RuntimeError: a kernel failed (what it says is lost in its thread).
    """

    def piece(thread: int, begin: int, end: int) -> None:
        step = 1 if len(works) > 1 else max(end - begin, 1)
        given = [(work.function, work.given(thread), work.each) for work in works]
        for item in range(begin, end, step):
            for function, values, each in given:
                function(*values, item * each, (item + step) * each)

    if min(threads, items) <= 1:
        piece(0, 0, items)
        return
    team = _team()
    if team is None:
        share(items, min(threads, items), piece)
    else:
        _run_by(team, works, items, threads)


def _run_by(team: ctypes.CDLL, works: Sequence[Work], items: int, threads: int) -> None:
    """By the whole team, however few items: OpenMP ends threads that a smaller one leaves out."""
    given = [(Arguments(w.function, w.values, w.own, threads), w.each) for w in works]
    what = described(given)
    address, _ = what.buffer_info()
    size = -(-items // (threads * _PIECES))
    team.GOMP_parallel_loop_dynamic(worker(), address, threads, 0, items, 1, size, 0)
    if what[1]:
        raise RuntimeError("a compiled kernel failed")


def _team() -> ctypes.CDLL | None:
    """torch's threads; None where they cannot be had or cannot be told what to do."""
    forked = os.getpid() != _PROCESS or multiprocessing.parent_process() is not None
    library = None if forked else _openmp()
    return library if library is not None and worker() is not None else None


@lru_cache(maxsize=1)
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch runs its loops on; None: not one with GNU's entry points.

    Of several in a process that is the one whose names come first, for torch and for the worker.
    """
    if sys.platform != "linux":
        return None
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    with contextlib.suppress(OSError):  # by the name it was loaded under; now all may see it
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    library = ctypes.CDLL(None)
    if not hasattr(library, "GOMP_parallel_loop_dynamic"):
        return None
    library.GOMP_parallel_loop_dynamic.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, *(ctypes.c_long,) * 4, ctypes.c_uint,
    )  # fmt: skip
    library.GOMP_parallel_loop_dynamic.restype = None
    return library


@lru_cache(maxsize=4)
def _helpers(process: int, count: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. `process`: no thread survives a fork."""
    del process
    return ThreadPoolExecutor(count, thread_name_prefix="chunkwise")


def share(items: int, threads: int, work: Callable[[int, int, int], None]) -> None:
    """Call `work(thread, begin, end)` until all items are done; the caller is thread 0.

    On threads of our own, which take pieces in order, each the next one when it is done with its
    last.
    """
    if threads <= 1:
        work(0, 0, items)
        return
    size = -(-items // (threads * _PIECES))
    pieces = iter(range(0, items, size))

    def run(thread: int) -> None:
        for begin in _shared(pieces):
            work(thread, begin, min(begin + size, items))

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
