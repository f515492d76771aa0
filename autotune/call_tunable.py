"""Tunables of a call of one engine; for engines on the CPU, whose only part is the whole call.

There the axes of the search are the fields of the engine's configuration. An engine joins by a
`Space`, which lists the values that each field may take and gives the default configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..runtime.call import Call
from ..runtime.engines import EngineName
from ..runtime.tuned.artifact import Certificate, Configuration
from .deadline import Deadline
from .space import Axis, Point, Rule, broken
from .tunable import Alternative, Chosen, Job, Part, Run, Tunable
from .validation import ConfiguredEngine, ValidationSuite, validate

_KEY = "call"


@dataclass(frozen=True, slots=True)
class Space:
    """The configurations of an engine among which the search chooses.

    Attributes:
        make: builds the configuration of a point from keyword arguments, one per axis.
        first: the points that the search tries first.
        jobs: the compilations that a configuration needs before it runs.
    """

    axes: tuple[Axis, ...]
    make: Callable[..., Configuration]
    default: Configuration
    first: tuple[Point, ...] = ()
    rules: tuple[Rule[Configuration], ...] = ()
    jobs: Callable[[Configuration], tuple[Job, ...]] = lambda config: ()


class WholeCalls(Tunable):
    """What any `Tunable` does with whole configurations of `engine`, for calls like `call`.

    `suite` makes the validation suite by a deadline, when it is first asked for.
    """

    def __init__(
        self, call: Call, engine: EngineName, suite: Callable[[Deadline], ValidationSuite]
    ) -> None:
        self._call, self._engine, self._suite = call, engine, suite
        self._do = torch.randn(call.output_shape, dtype=call.dtype, device=call.device)

    def prepare(self, deadline: Deadline) -> None:
        self._suite(deadline)

    def whole(self, config: Configuration) -> Run:
        engine, call, do = ConfiguredEngine(self._engine, config), self._call, self._do
        no_final_gradients = (None,) * len(call.form.states)

        def run() -> None:
            *_, kept = engine.forward_saving(call)
            engine.backward(call, do, no_final_gradients, kept)

        return run

    def validate(self, config: Configuration, deadline: Deadline) -> Certificate:
        engine = ConfiguredEngine(self._engine, config)
        return validate(self._suite(deadline), engine, deadline)


class CallTunable(WholeCalls):
    """The configurations in `space`; other arguments are those of `WholeCalls`."""

    def __init__(
        self,
        call: Call,
        engine: EngineName,
        space: Space,
        suite: Callable[[Deadline], ValidationSuite],
    ) -> None:
        super().__init__(call, engine, suite)
        self._space = space
        self.default = space.default
        self.alternatives = (Alternative("", _KEY, "", (_KEY,), (_KEY,)),)

    def part(self, key: str) -> Part:
        return Part(key, f"{self._engine.value} {key}", self._space.axes, self._space.first)

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        return broken(self._space.rules, self._made(point))

    def predicted_us(self, part: Part, point: Point) -> float:
        return 0.0  # no model predicts whole calls

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        return self._space.jobs(self._made(point))

    def run(self, part: Part, point: Point) -> Run:
        return self.whole(self._made(point))

    def configuration(self, chosen: Mapping[str, Alternative], points: Chosen) -> Configuration:
        return self._made(points[_KEY])

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        return self._space.jobs(config)

    def validation_jobs(self, config: Configuration, deadline: Deadline) -> tuple[Job, ...]:
        # compiled kernels take calls of any size, but calls of few rows are cut into parts
        engine = ConfiguredEngine(self._engine, config)
        ways = [way.config for way in engine.ways(self._call) if way.config != config]
        return tuple(job for other in ways if other for job in self._space.jobs(other))

    def _made(self, point: Point) -> Configuration:
        return self._space.make(**dict(point))
