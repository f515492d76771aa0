"""Times with their uncertainty: runs interleaved, medians with intervals, losers dropped early.

All runs of a race take turns, so that drift hits all alike, in an order drawn anew for every round,
so that none always follows the same other; and each finds its operands outside the caches, as it
would between other layers of a model.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock

from .tunable import Run

_CONFIDENCE = 0.95
_PRECISE = 0.01  # an interval this narrow, relative to the median, needs no more samples


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds: the median of the samples, and an interval that holds it at 95 %."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def precise(self) -> bool:
        """Whether more samples would say little."""
        return self.high - self.low <= _PRECISE * self.median

    def surely_below(self, other: Timing) -> bool:
        """Faster than `other` by more than the noise of both."""
        return self.high < other.low


class Device(Protocol):
    """Where runs are timed. `alone`: held while nobody else may measure there."""

    @property
    def alone(self) -> AbstractContextManager[object]: ...

    def rounds(self, runs: Sequence[Run], count: int) -> list[list[float]]:
        """Microseconds of each run in each of `count` rounds; in a round, each runs once."""


def timing(samples: Sequence[float]) -> Timing:
    """The median and its interval, by the order of the samples: no distribution is assumed."""
    ordered = sorted(samples)
    n = len(ordered)
    outside = _ranks_outside(n)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Timing(middle, ordered[outside], ordered[n - 1 - outside], n)


def _ranks_outside(n: int) -> int:
    """How many samples at either end the interval leaves out; 0 where there are too few."""
    tail, outside = 0.5**n, 0
    while tail <= (1 - _CONFIDENCE) / 2 and outside < n // 2:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    return max(outside - 1, 0)


def race(
    device: Device, runs: Sequence[Run], *, seconds: float, least: int = 7, most: int = 35
) -> list[Timing]:
    """The time of each of `runs`; those surely slower than the fastest stop early.

    `seconds`: about how long it may take; slow runs then have few samples, 3 at the least.
    """
    with device.alone:  # waiting for it is not measuring
        return _raced(device, runs, seconds, least, most)


def _raced(
    device: Device, runs: Sequence[Run], seconds: float, least: int, most: int
) -> list[Timing]:
    device.rounds(runs, 1)
    started = time.monotonic()
    device.rounds(runs, 1)
    round_s = time.monotonic() - started
    least = max(3, min(least, int(seconds / max(round_s, 1e-6) / 2)))
    samples = device.rounds(runs, least)
    while True:
        timings = [timing(s) for s in samples]
        best = min(timings, key=lambda t: t.high)
        going = [
            n
            for n, t in enumerate(timings)
            if not best.surely_below(t) and not t.precise and t.samples < most
        ]
        if not going or time.monotonic() - started > seconds:
            return timings
        for n, more in zip(going, device.rounds([runs[n] for n in going], least), strict=True):
            samples[n] += more


def _turns(runs: int, count: int) -> Iterator[int]:
    """Whose turn it is in `count` rounds, each in an order of its own."""
    order = list(range(runs))
    for _ in range(count):
        random.shuffle(order)
        yield from order


class CpuDevice:
    """Wall time of the calling thread's runs."""

    alone = nullcontext()

    def rounds(
        self, runs: Sequence[Run], count: int, before: Sequence[Run] = ()
    ) -> list[list[float]]:
        """As `Device.rounds`. `before`: for each run, what precedes it untimed."""
        samples: list[list[float]] = [[] for _ in runs]
        for n in _turns(len(runs), count):
            if before:
                before[n]()
            started = time.perf_counter()
            runs[n]()
            samples[n].append((time.perf_counter() - started) * 1e6)
        return samples


class CudaDevice:
    """The GPU's own clock, its L2 cache overwritten before each run.

    Of a user's processes that tune on one GPU, one measures at a time: the others compile.

    `overwrites`: how often; each takes 50 us or more, together longer than the host needs to queue
    a run: the time is then the device's alone.
    """

    def __init__(self, device: torch.device, overwrites: int = 6) -> None:
        self._device = device
        self._overwrites = overwrites
        about = torch.cuda.get_device_properties(device)
        size = max(4 * about.L2_cache_size, 128 << 20)
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)
        # whatever their caches; other users' files in that folder may not be opened
        name = f"chunkwise-measures-{os.getuid()}-{about.uuid}.lock"
        self.alone = FileLock(Path(tempfile.gettempdir()) / name)

    def rounds(
        self, runs: Sequence[Run], count: int, before: Sequence[Run] = ()
    ) -> list[list[float]]:
        """As `CpuDevice.rounds`; waits for the device once, at the end."""
        with self.alone:
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
