"""The search's view of an engine: parts that are timed alone, and alternatives made of parts.

The times of parts add up. An alternative is a sequence of parts, for example a plan of the forward.
A whole configuration has one alternative per role (forward, backward), all of one group (the same
chunk length). An engine joins by one implementation of `Tunable`; the search does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..runtime.tuned.artifact import Certificate, Configuration, KernelReport
from .deadline import Deadline
from .space import Axis, Point

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Part:
    """A unit that is timed alone: a kernel, or a whole call.

    Attributes:
        key: equal for parts that do the same work, whatever alternative they belong to.
        name: for reports.
        first: the points where the search begins: the default's, those of neighbouring sizes.
    """

    key: str
    name: str
    axes: tuple[Axis, ...]
    first: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to do `role` within `group`: the parts that it takes, one after the other.

    Attributes:
        kernels: the names of the parts in this alternative.
        bound_us: a lower bound of its time in microseconds, over all points; 0 if unknown.
        known: whether the default or a neighbour uses it; such alternatives are tried first.
    """

    group: str
    role: str
    label: str
    parts: tuple[str, ...]
    kernels: tuple[str, ...]
    bound_us: float = 0.0
    known: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """The result of a compilation; `code` is a digest of the machine code, `error` a failure.

    `notes`: what else reports show of a kernel, by name.
    """

    report: KernelReport = field(default_factory=KernelReport)
    code: str | None = None
    error: str | None = None
    seconds: float = 0.0
    notes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def failed(cls, why: Exception, started: float) -> Built:
        """The result of a compiler that raised `why`; `started` by `time.monotonic`."""
        lines = [line for line in str(why).splitlines() if line.strip()]
        text = f"{type(why).__name__}: {lines[-1] if lines else ''}"[:200]
        return cls(error=text, seconds=time.monotonic() - started)


# a compilation; it is pickled and called in another process
Job = Callable[[], Built]
Chosen = Mapping[str, Point]  # by the part's key


class Tunable(Protocol):
    """An engine's configurations for one recurrence, dtype and size of call.

    Attributes:
        alternatives: all of them, at least one per role in every group.
        default: the configuration that serves if nothing was tuned.
    """

    alternatives: tuple[Alternative, ...]
    default: Configuration

    def prepare(self, deadline: Deadline) -> None:
        """Make what `validate` compares with; the search calls it while workers compile.

        Raises:
            TimeoutError: the deadline passed before it was made.
        """

    def part(self, key: str) -> Part:
        """The part that alternatives name by `key`."""

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        """The rules that the point breaks, with the excess of each; empty if it may be built."""

    def predicted_us(self, part: Part, point: Point) -> float:
        """The predicted time in microseconds, for ranking; 0 if no model predicts it."""

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        """The compilations that `run` needs; there may be none."""

    def run(self, part: Part, point: Point) -> Run:
        """The part at `point`, ready to be timed."""

    def configuration(self, chosen: Mapping[str, Alternative], points: Chosen) -> Configuration:
        """The whole configuration: an alternative per role, of one group, and a point per part."""

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """The compilations that `whole` needs."""

    def whole(self, config: Configuration) -> Run:
        """A forward and a backward, ready to be timed."""

    def validation_jobs(self, config: Configuration, deadline: Deadline) -> tuple[Job, ...]:
        """The compilations that `validate` needs.

        Raises:
            TimeoutError: the deadline passed before they were found.
        """

    def validate(self, config: Configuration, deadline: Deadline) -> Certificate:
        """Compare outputs and gradients with the oracle's on this machine.

        Raises:
            TimeoutError: the deadline passed before the last comparison.
        """
