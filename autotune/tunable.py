"""What the search knows of an engine: parts that are timed alone, and alternatives made of them.

Times of parts add up. Parts are grouped into alternatives (a plan of the forward, say), of which a
whole configuration takes one per role (forward, backward) within a group (what both must share: the
chunk). An engine joins by one implementation of `Tunable`; the search does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..runtime.tuned.artifact import Certificate, Configuration, KernelReport
from .space import Axis, Point

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Part:
    """What is timed alone: a kernel, or a whole call.

    Attributes:
        key: equal for parts that are the same work, whatever alternative they belong to.
        first: where the search begins: the default, what served neighbours.
    """

    key: str
    name: str
    axes: tuple[Axis, ...]
    first: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to do `role` within `group`: the parts that it takes, one after the other.

    Attributes:
        kernels: what the parts are called within it.
        bound_us: no choice of points can make it faster; 0 where nobody knows.
        known: the default's, or a neighbour's: tried before all others.
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
    """What a compilation left. `code`: a digest of the machine code; `error`: why there is none."""

    report: KernelReport = field(default_factory=KernelReport)
    code: str | None = None
    error: str | None = None
    seconds: float = 0.0


# a compilation; it is pickled and called in another process
Job = Callable[[], Built]
Chosen = Mapping[str, Point]  # by the part's key


class Tunable(Protocol):
    """An engine's configurations for one recurrence, dtype and size of call."""

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """All of them, whatever is worth trying; at least one per role in every group."""

    @property
    def default(self) -> Configuration:
        """What serves where nothing was tuned."""

    def part(self, key: str) -> Part:
        """The part that alternatives name by `key`."""

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        """The rules that the point breaks, each by how much; empty if it may be built."""

    def predicted_us(self, part: Part, point: Point) -> float:
        """A guess of its time, for ranking."""

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        """What has to be compiled before `run`; may be nothing."""

    def run(self, part: Part, point: Point) -> Run:
        """The part, ready to be timed."""

    def configuration(self, chosen: Mapping[str, Alternative], points: Chosen) -> Configuration:
        """The whole: an alternative per role, all of one group, and a point per part of them."""

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """What has to be compiled before `whole`."""

    def whole(self, config: Configuration) -> Run:
        """A forward and a backward, ready to be timed."""

    def validation_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """What has to be compiled before `validate`."""

    def validate(self, config: Configuration) -> Certificate:
        """Whether outputs and gradients are right, on this machine."""
