"""Measures times with their uncertainty: interleaved runs, medians with confidence intervals.

The runs of a race take turns, so that drift affects all of them alike. Their order is drawn anew in
every round, so that no run always follows the same other run. Each run finds its operands outside
the caches, as it would between the other layers of a model.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock

from .deadline import NEVER, Deadline
from .tunable import Run

_CONFIDENCE = 0.95
FEWEST = 3  # samples that an interval needs
_PRECISE = 0.01  # an interval this narrow, relative to the median, needs no more samples


@dataclass(frozen=True, slots=True)
class Timing:
    """A time in microseconds: the median of the samples, and its 95 % confidence interval."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def enough(self) -> bool:
        """Whether there are so many samples that the interval says something."""
        return self.samples >= FEWEST

    @property
    def precise(self) -> bool:
        """Whether the interval is so narrow that more samples would add little."""
        return self.enough and self.high - self.low <= _PRECISE * self.median

    def surely_below(self, other: Timing) -> bool:
        """Whether this is faster than `other` by more than the noise: the intervals are apart."""
        return self.enough and other.enough and self.high < other.low


class Device(Protocol):
    """A device on which runs are timed."""

    def alone(self, deadline: Deadline) -> AbstractContextManager[object]:
        """A lock that keeps other processes from measuring; waits until `deadline` at most.

        Raises:
            TimeoutError: others held the lock until then.
        """

    def rounds(self, runs: Sequence[Run], count: int) -> list[list[float]]:
        """Microseconds of each run in each of `count` rounds; in a round, each runs once."""


def timing(samples: Sequence[float]) -> Timing:
    """The median and its interval from order statistics, which assume no distribution."""
    ordered = sorted(samples)
    n = len(ordered)
    outside = _ranks_outside(n)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Timing(middle, ordered[outside], ordered[n - 1 - outside], n)


def _ranks_outside(n: int) -> int:
    """The number of samples that the interval omits at either end; 0 if there are too few."""
    tail, outside = 0.5**n, 0
    while tail <= (1 - _CONFIDENCE) / 2 and outside < n // 2:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    return max(outside - 1, 0)


@dataclass(slots=True)
class Lineup:
    """The runs of a race that ends before `deadline`.

    Attributes:
        rounds: rounds for which there must be time before a run joins.
        runs: those that joined, in order.
        round_s: seconds that a round takes, by their first calls.
    """

    deadline: Deadline
    rounds: int = 1
    runs: list[Run] = field(default_factory=list)
    round_s: float = 0.0

    def joins(self, run: Run, expected_s: float) -> bool:
        """Call `run` for the first time; it joins if the rounds with it end before the deadline.

        `expected_s` is the predicted time of a call in seconds; by it, the call itself is left out
        if there is no time for it.
        """
        if not self._fits(expected_s, first_s=expected_s):
            return False
        started = time.monotonic()
        run()
        took_s = time.monotonic() - started
        if not self._fits(took_s):
            return False
        self.round_s += took_s
        self.runs.append(run)
        return True

    def _fits(self, another_s: float, first_s: float = 0.0) -> bool:
        return self.deadline.allows(first_s + self.rounds * (self.round_s + another_s))

    @property
    def starts(self) -> bool:
        """Whether there are runs, and a round of them ends before the deadline."""
        return bool(self.runs) and self.deadline.allows(self.round_s)


def race(
    device: Device,
    runs: Sequence[Run],
    *,
    seconds: float,
    least: int = 7,
    most: int = 35,
    deadline: Deadline = NEVER,
) -> list[Timing]:
    """The timing of each of `runs`; a run that is surely slower than the fastest stops early.

    The race takes about `seconds`, and begins no round that would end after `deadline`. A run has
    between `least` and about `most` samples. Slow runs may have fewer: at least 3, or where the
    deadline leaves no time for so many, at least one.

    Raises:
        TimeoutError: other processes measured until the deadline.
    """
    with device.alone(deadline):  # the wait for the lock does not count as part of `seconds`
        return _raced(device, runs, seconds, least, most, deadline)


def _raced(
    device: Device, runs: Sequence[Run], seconds: float, least: int, most: int, deadline: Deadline
) -> list[Timing]:
    samples, round_s = _round(device, runs)
    started = time.monotonic()
    if deadline.allows(round_s):  # the first round warmed up
        samples, round_s = _round(device, runs)
    least = max(FEWEST, min(least, int(seconds / round_s / 2)))
    fits = int(min(least, deadline.left / round_s))
    if fits == least:
        samples = device.rounds(runs, least)
    elif fits > 0:
        samples = [a + b for a, b in zip(samples, device.rounds(runs, fits), strict=True)]
    while True:
        timings = [timing(s) for s in samples]
        best = min(timings, key=lambda t: t.high)
        going = [
            n
            for n, t in enumerate(timings)
            if not best.surely_below(t) and not t.precise and t.samples < most
        ]
        over = time.monotonic() - started > seconds or not deadline.allows(least * round_s)
        if not going or over:
            return timings
        for n, more in zip(going, device.rounds([runs[n] for n in going], least), strict=True):
            samples[n] += more


def _round(device: Device, runs: Sequence[Run]) -> tuple[list[list[float]], float]:
    """A sample of each run, and the seconds that they took together."""
    started = time.monotonic()
    samples = device.rounds(runs, 1)
    return samples, max(time.monotonic() - started, 1e-6)


def _turns(runs: int, count: int) -> Iterator[int]:
    """The indices of the runs through `count` rounds, each round in a random order."""
    order = list(range(runs))
    for _ in range(count):
        random.shuffle(order)
        yield from order


class CpuDevice:
    """Measures wall time on the calling thread."""

    def alone(self, deadline: Deadline) -> AbstractContextManager[object]:
        """No lock: processes on a CPU disturb one another whether or not they measure."""
        return nullcontext()

    def rounds(
        self, runs: Sequence[Run], count: int, before: Sequence[Run] = ()
    ) -> list[list[float]]:
        """As `Device.rounds`; `before[n]` is called, untimed, before `runs[n]`."""
        samples: list[list[float]] = [[] for _ in runs]
        for n in _turns(len(runs), count):
            if before:
                before[n]()
            started = time.perf_counter()
            runs[n]()
            samples[n].append((time.perf_counter() - started) * 1e6)
        return samples


class CudaDevice:
    """Measures by the GPU's own events, and overwrites its L2 cache before each run.

    Of a user's processes that tune on one GPU, one measures at a time while the others compile.

    The cache is overwritten `overwrites` times, which takes 50 us or more each time. If this is
    longer than the host needs to queue the run, the measured time contains no wait for the host.
    """

    def __init__(self, device: torch.device, overwrites: int = 6) -> None:
        self._device = device
        self._overwrites = overwrites
        about = torch.cuda.get_device_properties(device)
        size = max(4 * about.L2_cache_size, 128 << 20)
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)
        # all processes of a user share the lock, whatever their caches; users may not open one
        # another's files in that folder
        name = f"chunkwise-measures-{os.getuid()}-{about.uuid}.lock"
        self._lock = FileLock(Path(tempfile.gettempdir()) / name)

    def alone(self, deadline: Deadline) -> AbstractContextManager[object]:
        """As `Device.alone`."""
        return self._lock.acquire(timeout=max(deadline.left, 0.0))

    def rounds(
        self, runs: Sequence[Run], count: int, before: Sequence[Run] = ()
    ) -> list[list[float]]:
        """As `CpuDevice.rounds`; waits for the device once, at the end."""
        with self._lock:
            return self._timed(runs, count, before)

    def _timed(self, runs: Sequence[Run], count: int, before: Sequence[Run]) -> list[list[float]]:
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
        for n in _turns(len(runs), count):
            if before:
                before[n]()
            for _ in range(self._overwrites):
                self._scratch.zero_()
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            runs[n]()
            end.record()
            pairs[n].append((begin, end))
        torch.cuda.synchronize(self._device)
        return [[b.elapsed_time(e) * 1e3 for b, e in pair] for pair in pairs]
