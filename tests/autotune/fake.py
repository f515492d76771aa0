"""A tunable without an engine: its points have known times, and some are broken on purpose.

`python -m tests.autotune.fake JOURNAL SECONDS_PER_TRIAL` runs one worker, which appends a line to
JOURNAL.measured for every measurement.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from chunkwise.autotune.deadline import Deadline
from chunkwise.autotune.search import Budget, Findings, search
from chunkwise.autotune.space import Axis, Point, points
from chunkwise.autotune.storage import open_storage
from chunkwise.autotune.tunable import Alternative, Built, Job, Part, Run
from chunkwise.codegen.config import Config, EagerConfig, KernelConfig
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.runtime.tuned.artifact import Certificate, Configuration

GENEROUS = 4000.0  # more seconds than any search of a test takes, even on a busy machine
AXES = (Axis("chunk", (16, 32, 64, 128)), Axis("warps", (1, 2, 4)))
TOO_MUCH = ("chunk", 128), ("warps", 4)  # the one point that is not legal


def microseconds(part: str, point: Point) -> float:
    """The true time of a point: 32 and 2 are the best choices, and part b takes twice part a."""
    chosen = dict(point)
    distance = abs(chosen["chunk"].bit_length() - 6) + abs(chosen["warps"].bit_length() - 2)
    return (200.0 if part.endswith("b") else 100.0) * (1 + distance)


DEFAULT = EagerConfig(16)


def made(chunk: int, warps: int) -> Config:
    """The configuration of a point."""
    plan = Plan(Hoist.NOTHING)
    return Config(chunk, plan, plan, KernelConfig(warps=warps))


@dataclass
class Fake:
    """Two roles of one part each in two groups; the parts of group `slow` are ten times slower."""

    spend: float = 0.0
    note: Callable[[str, Point], None] = lambda part, point: None
    wrong: Callable[[Configuration], bool] = lambda config: False
    default: Configuration = DEFAULT
    jobs_of: tuple[Job, ...] = ()
    alternatives: tuple[Alternative, ...] = (
        Alternative("fast", "forward", "a", ("fast/a",), ("a",)),
        Alternative("fast", "backward", "b", ("fast/b",), ("b",)),
        Alternative("slow", "forward", "a", ("slow/a",), ("a",)),
        Alternative("slow", "backward", "b", ("slow/b",), ("b",)),
    )
    first: tuple[Point, ...] = ()
    current: dict[int, float] = field(default_factory=dict)

    def part(self, key: str) -> Part:
        return Part(key, key, AXES, self.first)

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        return {"too much": 1.0} if point == TOO_MUCH else {}

    def predicted_us(self, part: Part, point: Point) -> float:
        return self.true_us(part.key, point)

    def true_us(self, key: str, point: Point) -> float:
        return microseconds(key, point) * (10 if key.startswith("slow") else 1)

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        return self.jobs_of

    def run(self, part: Part, point: Point) -> Run:
        if self.spend:
            time.sleep(self.spend)
        self.note(part.key, point)
        return Timed(self.true_us(part.key, point))

    def configuration(
        self, chosen: Mapping[str, Alternative], points: Mapping[str, Point]
    ) -> Configuration:
        (forward,) = chosen["forward"].parts
        warps = dict(points[forward])["warps"]
        return made(dict(points[forward])["chunk"], warps)

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        return self.jobs_of

    def whole(self, config: Configuration) -> Run:
        if config == self.default:
            return Timed(700.0)
        assert isinstance(config, Config)
        point = (("chunk", config.chunk), ("warps", config.default.warps))
        return Timed(3 * microseconds("fast/a", point))

    def prepare(self, deadline: Deadline) -> None:
        deadline.check()

    def validation_jobs(self, config: Configuration, deadline: Deadline) -> tuple[Job, ...]:
        return self.jobs_of

    def validate(self, config: Configuration, deadline: Deadline) -> Certificate:
        return Certificate((), ("fake",), ("d k: wrong",) if self.wrong(config) else ())


@dataclass(frozen=True)
class Timed:
    """A run that advances `Clock` by its own duration."""

    us: float

    def __call__(self) -> None:
        return


class Clock:
    """A device that reports the durations of runs with 2 % of noise, equal in every test."""

    def alone(self, deadline: Deadline) -> AbstractContextManager[object]:
        return nullcontext()

    def rounds(self, runs: Sequence[Run], count: int) -> list[list[float]]:
        noise = [1 + 0.02 * ((7 * n) % 5 - 2) / 2 for n in range(count)]
        return [[run.us * x for x in noise] for run in runs if isinstance(run, Timed)]


@dataclass
class StoodStill:
    """A replacement for a module's `time`, on which seconds pass when a test says so."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fails() -> Built:
    """A compilation that finds an error."""
    return Built(error="no such instruction")


def legal() -> set[Point]:
    """The points that may be built."""
    return {p for p in points(AXES) if p != TOO_MUCH}


def worker(journal: Path, spend: float) -> Findings:
    """Search the whole space, and record the measurements of this process."""
    budget = Budget(GENEROUS, exhaustive=True)
    with journal.with_suffix(".measured").open("a", encoding="utf-8") as notes:

        def note(part: str, point: Point) -> None:
            notes.write(f"{part} {point}\n")
            notes.flush()

        tunable = Fake(spend=spend, note=note)
        return search(tunable, Clock(), open_storage(str(journal)), "fake", budget)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), float(sys.argv[2]))
