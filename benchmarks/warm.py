"""Compiles ahead: runs each side's first call in a process of its own, many at a time.

Autotuners run each of their configurations once and do not time it, because processes that share a
GPU would disturb one another. The compiled kernels land in Triton's cache on disk. The timing run
then tunes undisturbed and has nothing left to compile.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from . import measure
from .contest import BOTH, FORWARD, OURS, Problem, sides, timed
from .peers import PEERS


@dataclass(frozen=True, slots=True)
class Task:
    """One side's first calls, with every `parts`-th configuration of its autotuners."""

    problem: Problem
    side: str
    part: int = 0
    parts: int = 1

    def run(self) -> None:
        """Compile; what is not compiled says why on stderr."""
        # nothing is measured here, so that the results of tuning must not be cached
        os.environ |= {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
        _compile_only(self.part, self.parts)
        problem = self.problem
        try:
            side = sides(problem, [self.side])[self.side]()
            do = problem.do()
            for mode in (BOTH, FORWARD):  # without gradients a side may choose other kernels
                measure.first_call(timed(side, do, mode), problem.settings.device)
        except Exception as error:  # the contest says why
            name = f"{problem.case.name} {problem.shape.name} {self.side}"
            print(f"warm-up of {name}: {error}".splitlines()[0], file=sys.stderr)


def tasks(problem: Problem, against: Sequence[str]) -> list[Task]:
    """What a contest needs compiled."""
    parts = {peer.name: peer.parts for peer in PEERS.get(problem.case.name, ())}
    return [
        Task(problem, name, part, parts.get(name, 1))
        for name in (OURS, *against)
        for part in range(parts.get(name, 1))
    ]


def warm_all(wanted: Sequence[Task], jobs: int, until: float) -> set[Task]:
    """Compile in `jobs` processes, in this order; returns those that ended until then.

    Args:
        wanted: what to compile.
        jobs: how many processes run at a time.
        until: when processes are killed, of `time.monotonic`.
    """
    context: Any = multiprocessing.get_context("forkserver")
    # not the peers, which ask for the GPU when they are imported, and then cannot be forked
    context.set_forkserver_preload([__name__])

    def warmed(task: Task) -> bool:
        if time.monotonic() >= until:
            return False
        process = context.Process(target=task.run)
        process.start()
        process.join(None if math.isinf(until) else max(0.0, until - time.monotonic()))
        ended = process.exitcode is not None
        if not ended:
            process.kill()
        return ended

    with ThreadPoolExecutor(jobs) as pool:
        ended = pool.map(warmed, wanted)
        return {task for task, done in zip(wanted, ended, strict=True) if done}


def _run_once(call: Callable[[], object], quantiles: Iterable[float] = (), **_: object) -> object:
    call()
    return [1.0 for _ in quantiles] or 1.0


def _compile_only(part: int, parts: int) -> None:
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:  # a CPU without it has nothing to tune
        return
    Autotuner.do_bench = property(lambda self: _run_once)
    every = Autotuner.prune_configs
    Autotuner.prune_configs = lambda *args: every(*args)[part::parts] or every(*args)[:1]
