"""The budget of a tuning is kept, however slow runs, compilations and comparisons are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from chunkwise.autotune.deadline import Deadline
from chunkwise.autotune.measure import Lineup, race
from chunkwise.autotune.report import report
from chunkwise.autotune.space import Point
from chunkwise.autotune.tunable import Built, Part, Run
from chunkwise.runtime.tuned.artifact import Certificate, Configuration

from tests.autotune.fake import Clock, Fake, StoodStill, Timed
from tests.autotune.test_tune import tuned

SLOWER = 1e4  # a run of 100 us takes a second of the tests' clock
A_CALL = 7.0  # seconds: the slowest run of a whole configuration, the default


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoodStill:
    stood_still = StoodStill()
    for module in ("search", "deadline", "measure", "compilers"):
        monkeypatch.setattr(f"chunkwise.autotune.{module}.time", stood_still)
    return stood_still


@dataclass(frozen=True)
class Slow(Timed):
    """A run during which the clock goes on."""

    clock: StoodStill

    def __call__(self) -> None:
        self.clock.sleep(self.us * SLOWER * 1e-6)


class SlowDevice(Clock):
    """A device whose runs take their time."""

    def rounds(self, runs: Sequence[Run], count: int) -> list[list[float]]:
        for run in runs:
            for _ in range(count):
                run()
        samples = super().rounds(runs, count)
        return [[us * SLOWER for us in some] for some in samples]


@dataclass
class Busy(Fake):
    """A `Fake` on a busy machine: each of its works takes seconds."""

    clock: StoodStill = None  # type: ignore[assignment]  # fields before it have defaults
    cases: int = 5

    def run(self, part: Part, point: Point) -> Run:
        return Slow(self.true_us(part.key, point), self.clock)

    def whole(self, config: Configuration) -> Run:
        run = super().whole(config)
        assert isinstance(run, Timed)
        return Slow(run.us, self.clock)

    def validate(self, config: Configuration, deadline: Deadline) -> Certificate:
        for _ in range(self.cases):
            deadline.check()
            self.clock.sleep(2.0)
        return super().validate(config, deadline)


@pytest.mark.parametrize("seconds", [5.0, 40.0, 120.0, 300.0, 1000.0])
def test_a_tuning_ends_with_its_budget(clock: StoodStill, seconds: float) -> None:
    """It is late by less than one call; with more time it comes further."""
    device = SlowDevice()
    tuning = tuned(Busy(clock=clock), seconds, device)
    assert clock.now < seconds + A_CALL
    assert "cut by the budget: " in report(tuning)
    if seconds >= 300:
        assert tuning.winner is not None
        assert tuning.winner.combination is not None
    elif tuning.winner is None:
        assert not tuning.artifact.tuned


def test_what_is_not_validated_in_time_is_not_kept(clock: StoodStill) -> None:
    tuning = tuned(Busy(clock=clock, cases=100), 300.0, SlowDevice())
    assert clock.now < 300 + A_CALL
    assert tuning.finalists
    assert tuning.winner is None
    assert tuning.artifact.tuned == tuning.artifact.quarantine == ()
    assert "nothing was validated within the budget" in report(tuning)


@dataclass(frozen=True)
class Hang:
    """A compilation that takes an hour."""

    def __call__(self) -> Built:
        time.sleep(3600)
        return Built()


class Ticking(StoodStill):
    """Half a second passes whenever somebody looks at it."""

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


def test_compilations_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    for module in ("search", "deadline"):
        monkeypatch.setattr(f"chunkwise.autotune.{module}.time", clock)
    started = time.monotonic()
    tuning = tuned(Fake(jobs_of=(Hang(),)), 30.0)
    assert clock.now < 30 + 10  # the deadline, and the looks at the clock after it
    assert time.monotonic() - started < 1800  # real seconds; the compilations would take an hour
    assert tuning.finalists == ()
    assert dict(tuning.cut)["configurations whose compilation was stopped"] == 3
    assert "nothing was measured" in report(tuning)


def test_a_race_begins_no_round_that_would_end_too_late(clock: StoodStill) -> None:
    runs = [Slow(100.0, clock), Slow(200.0, clock)]  # a round takes 3 s
    for left, samples in ((4.0, 1), (10.0, 2), (14.0, 3), (40.0, 7)):
        deadline = Deadline.after(left)
        timings = race(SlowDevice(), runs, seconds=60.0, deadline=deadline)
        assert timings[0].samples == samples
        assert deadline.left >= 0
        assert timings[0].surely_below(timings[1]) == (samples > 2)


def test_runs_join_while_there_is_time(clock: StoodStill) -> None:
    lineup = Lineup(Deadline.after(10.0))
    joined = (lineup.joins(Slow(100.0, clock), 1.0) for _ in itertools.count())
    assert sum(itertools.takewhile(bool, joined)) == 4
    assert lineup.starts
    clock.sleep(2)
    assert not lineup.starts
