"""An engine on the CPU for the search: one part, the whole call; axes: its configuration's fields.

Any engine joins whose configuration is a frozen dataclass of numbers: it says which field may take
which values, and what is its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..runtime.call import Call
from ..runtime.engines import EngineName
from ..runtime.tuned.artifact import Certificate, Configuration
from .space import Axis, Point, Rule, broken
from .tunable import Alternative, Chosen, Job, Part, Run
from .validation import Exam, Under, certify

_KEY = "call"


@dataclass(frozen=True, slots=True)
class Space:
    """What is free in an engine.

    Attributes:
        make: the configuration of a point; it takes the axes by name.
        first: points to begin with.
        jobs: what has to be compiled before a configuration runs.
    """

    axes: tuple[Axis, ...]
    make: Callable[..., Configuration]
    default: Configuration
    first: tuple[Point, ...] = ()
    rules: tuple[Rule[Configuration], ...] = ()
    jobs: Callable[[Configuration], tuple[Job, ...]] = lambda config: ()


class CallTunable:
    """The configurations of `engine` for calls like `call`."""

    def __init__(
        self, call: Call, engine: EngineName, space: Space, exam: Callable[[], Exam]
    ) -> None:
        self._call, self._engine, self._space, self._exam = call, engine, space, exam
        self._do = torch.randn(call.output_shape, dtype=call.dtype, device=call.device)
        self.default = space.default
        self.alternatives = (Alternative("", _KEY, "", (_KEY,), (_KEY,)),)

    def part(self, key: str) -> Part:
        """As `Tunable.part`."""
        return Part(key, f"{self._engine.value} {key}", self._space.axes, self._space.first)

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        """As `Tunable.excess`."""
        return broken(self._space.rules, self._made(point))

    def predicted_us(self, part: Part, point: Point) -> float:
        """As `Tunable.predicted_us`: no guess is made."""
        return 0.0

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        """As `Tunable.jobs`."""
        return self._space.jobs(self._made(point))

    def run(self, part: Part, point: Point) -> Run:
        """As `Tunable.run`."""
        return self.whole(self._made(point))

    def configuration(self, chosen: Mapping[str, Alternative], points: Chosen) -> Configuration:
        """As `Tunable.configuration`."""
        return self._made(points[_KEY])

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """As `Tunable.whole_jobs`."""
        return self._space.jobs(config)

    def whole(self, config: Configuration) -> Run:
        """As `Tunable.whole`."""
        under = Under(self._engine, config)
        nothing = (None,) * len(self._call.form.states)

        def both() -> None:
            under.forward(self._call)
            under.backward(self._call, self._do, nothing)

        return both

    def certify_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """As `Tunable.certify_jobs`: kernels take calls of any size."""
        return ()

    def certify(self, config: Configuration) -> Certificate:
        """As `Tunable.certify`."""
        return certify(self._exam(), Under(self._engine, config))

    def _made(self, point: Point) -> Configuration:
        return self._space.make(**dict(point))
