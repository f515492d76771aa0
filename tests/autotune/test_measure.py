"""Intervals hold the median as often as they claim, and a race drops slow runs early."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
from chunkwise.autotune.deadline import Deadline
from chunkwise.autotune.measure import CpuDevice, race, timing
from chunkwise.autotune.tunable import Run

from tests.autotune.fake import StoodStill


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        t = timing([draw.lognormvariate(0, 0.3) for _ in range(15)])
        held += t.low <= 1.0 <= t.high
    assert held / 400 >= 0.93  # 0.95, and what 400 draws may miss


def test_few_samples_leave_nothing_out() -> None:
    t = timing([3.0, 1.0, 2.0])
    assert (t.low, t.median, t.high, t.samples) == (1.0, 2.0, 3.0, 3)


class Noisy:
    """The n-th run takes n + 1 microseconds, and 1 % more or less."""

    def alone(self, deadline: Deadline) -> AbstractContextManager[object]:
        return nullcontext()

    def __init__(self) -> None:
        self.counts: dict[Run, int] = {}
        self._draw = random.Random(1)

    def rounds(self, runs: Sequence[Run], count: int) -> list[list[float]]:
        for run in runs:
            self.counts[run] = self.counts.get(run, 0) + count
        return [
            [float(str(run())) * self._draw.gauss(1, 0.01) for _ in range(count)] for run in runs
        ]


def test_losers_stop_early() -> None:
    near, nearly, far = (lambda: 100.0), (lambda: 100.4), (lambda: 200.0)
    device = Noisy()
    timings = race(device, [near, nearly, far], seconds=60.0)
    assert device.counts[far] < device.counts[near]
    assert timings[2].median == pytest.approx(200, rel=0.02)
    assert timings[0].surely_below(timings[2])
    assert not timings[0].surely_below(timings[1])


def test_slow_runs_have_few_samples() -> None:
    timings = race(Noisy(), [lambda: 1.0, lambda: 1.0], seconds=0.0)
    assert [t.samples for t in timings] == [3, 3]


def test_each_run_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoodStill()
    monkeypatch.setattr("chunkwise.autotune.measure.time", clock)
    runs = [partial(clock.sleep, seconds) for seconds in (1.0, 3.0)]
    untimed = [partial(clock.sleep, 0.5)] * 2
    assert CpuDevice().rounds(runs, 5) == [[1e6] * 5, [3e6] * 5]
    assert CpuDevice().rounds(runs, 2, untimed) == [[1e6] * 2, [3e6] * 2]
