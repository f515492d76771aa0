"""Shares work items among threads of our own: as many as torch would use, and none of TVM's.

A kernel's function releases the interpreter's lock, so plain threads suffice. They belong to the
process that started them: a forked child starts its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

_PIECES = 4  # pieces of work per thread, so that sequences of unequal length even out


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
