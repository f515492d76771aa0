"""A `Tunable` for engines on the CPU: its only part is the whole call.

The axes of the search are the fields of the engine's configuration. An engine joins by a `Space`,
which lists the values that each field may take and gives the default configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.call import Call
from ..runtime.engines import EngineName
from ..runtime.tuned.artifact import Certificate, Configuration
from .space import Axis, Point, Rule, broken
from .tunable import Alternative, Chosen, Job, Part, Run
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


def forward_and_backward(engine: ConfiguredEngine, call: Call, do: Tensor) -> Run:
    """A run of `call` and of its gradients from `do`, the gradient of the output."""
    no_final_gradients = (None,) * len(call.form.states)

    def run() -> None:
        engine.forward(call)
        engine.backward(call, do, no_final_gradients)

    return run


class CallTunable:
    """The configurations of `engine` for calls like `call`; `suite` makes the validation suite."""

    def __init__(
        self, call: Call, engine: EngineName, space: Space, suite: Callable[[], ValidationSuite]
    ) -> None:
        self._call, self._engine, self._space, self._suite = call, engine, space, suite
        self._do = torch.randn(call.output_shape, dtype=call.dtype, device=call.device)
        self.default = space.default
        self.alternatives = (Alternative("", _KEY, "", (_KEY,), (_KEY,)),)

    def prepare(self) -> None:
        """As `Tunable.prepare`."""
        self._suite()

    def part(self, key: str) -> Part:
        """As `Tunable.part`."""
        return Part(key, f"{self._engine.value} {key}", self._space.axes, self._space.first)

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        """As `Tunable.excess`."""
        return broken(self._space.rules, self._made(point))

    def predicted_us(self, part: Part, point: Point) -> float:
        """As `Tunable.predicted_us`: always 0, because no model predicts whole calls."""
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
        return forward_and_backward(ConfiguredEngine(self._engine, config), self._call, self._do)

    def validation_jobs(self, config: Configuration) -> tuple[Job, ...]:
        """As `Tunable.validation_jobs`: none, because compiled kernels take calls of any size."""
        return ()

    def validate(self, config: Configuration) -> Certificate:
        """As `Tunable.validate`."""
        return validate(self._suite(), ConfiguredEngine(self._engine, config))

    def _made(self, point: Point) -> Configuration:
        return self._space.make(**dict(point))
