"""Compiles in worker processes while this process measures; the workers end with the search.

If a compiler crashes or exceeds its time limit, this is reported as its result and the worker is
replaced. Compilations that still run when the search ends are killed.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar

from .tunable import Built, Job

K = TypeVar("K", bound=Hashable)
_AHEAD = 2  # orders queued beyond the number of workers, so that no worker idles
_PRELOADED = "chunkwise.autotune.capture"  # imported once for all compilations


def context() -> ForkServerContext | SpawnContext:
    """The multiprocessing context: where possible, a fork server that has done the imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload([_PRELOADED])
    return chosen


def start_early() -> None:
    """Start the fork server now, so that its imports overlap with the caller's next work."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context()
        from multiprocessing import forkserver

        forkserver.ensure_running()


@dataclass(slots=True)
class _Order(Generic[K]):
    """The jobs of one key: those that wait, the number of unfinished ones, and the results."""

    key: K
    waiting: deque[Job]
    outstanding: int
    built: list[Built] = field(default_factory=list)


@dataclass(slots=True)
class _Worker(Generic[K]):
    """A process and the order whose job it compiles; `started` is when it took the job."""

    process: BaseProcess
    order: _Order[K] | None = None
    started: float = 0.0


class Compilers(Generic[K]):
    """Runs up to `workers` compilations at a time; an order is a key with its jobs.

    A compilation that takes more than `limit_s` seconds is killed and reported as an error.
    """

    def __init__(self, workers: int, limit_s: float = 60.0) -> None:
        self._most = workers
        self._limit = limit_s
        self._context = context()
        self._orders: dict[K, _Order[K]] = {}
        self._workers: dict[Connection, _Worker[K]] = {}

    def __enter__(self) -> Compilers[K]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill the compilations that still run."""
        self.cancel()

    def cancel(self) -> None:
        """Forget all orders, and kill the compilations that still run."""
        for pipe in list(self._workers):
            self._dismiss(pipe)
        self._orders.clear()

    @property
    def orders(self) -> int:
        """The number of unfinished orders."""
        return len(self._orders)

    @property
    def hungry(self) -> bool:
        """Whether the queue has room for another order."""
        return len(self._orders) < self._most + _AHEAD

    def order(self, key: K, jobs: tuple[Job, ...]) -> None:
        """Queue `jobs` under `key`; an order without jobs is done at once."""
        self._orders[key] = _Order(key, deque(jobs), len(jobs))
        self._hand_out()

    def done(self, timeout: float) -> Iterator[tuple[K, tuple[Built, ...]]]:
        """The finished orders with their results; waits up to `timeout` seconds for the first."""
        if self._busy and not any(o.outstanding == 0 for o in self._orders.values()):
            wait([p for p, w in self._workers.items() if w.order is not None], timeout)
        for pipe, worker in list(self._workers.items()):
            order = worker.order
            built = None if order is None else self._outcome(pipe, worker)
            if order is not None and built is not None:
                order.built.append(built)
                order.outstanding -= 1
        self._hand_out()
        for key in [k for k, o in self._orders.items() if o.outstanding == 0]:
            yield key, tuple(self._orders.pop(key).built)

    @property
    def _busy(self) -> int:
        return sum(w.order is not None for w in self._workers.values())

    def _outcome(self, pipe: Connection, worker: _Worker[K]) -> Built | None:
        """The result of the worker's job; None while it compiles."""
        seconds = time.monotonic() - worker.started
        if pipe.poll():
            try:
                received = pipe.recv()
            except (EOFError, ConnectionResetError):
                self._dismiss(pipe)
                return Built(error="the compiler crashed", seconds=seconds)
            assert isinstance(received, Built)
            worker.order = None
            return received
        if seconds > self._limit:
            self._dismiss(pipe)
            return Built(error=f"the compiler took more than {self._limit:.0f} s", seconds=seconds)
        return None

    def _dismiss(self, pipe: Connection) -> None:
        worker = self._workers.pop(pipe)
        worker.process.kill()
        worker.process.join()
        pipe.close()

    def _hand_out(self) -> None:
        for order in self._orders.values():
            while order.waiting:
                pipe = self._idle()
                if pipe is None:
                    return
                worker = self._workers[pipe]
                worker.order, worker.started = order, time.monotonic()
                pipe.send(order.waiting.popleft())

    def _idle(self) -> Connection | None:
        """The pipe of an idle worker, a new one if the limit allows; None if all are busy."""
        for pipe, worker in self._workers.items():
            if worker.order is None:
                return pipe
        if len(self._workers) == self._most:
            return None
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers[mine] = _Worker(process)
        return mine


def _serve(pipe: Connection) -> None:
    """Compile the jobs that arrive until the other end closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search to handle
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(job())
