"""Launches of a rank's part of sequences: a pause before the scans that start from other ranks.

Kernels that scan segments of sequences compute what each segment makes of a state before any scan
starts from a state (codegen/segments.py). Composed, these maps are the map of the rank's part. So
ranks meet between two kernels, and no kernel runs twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...codegen.buffers import BufferId, BufferKind
from ...codegen.differentiate import GRADIENT
from ...codegen.programs import chunk_program
from ...codegen.segments import segment_transitions
from ..engine import Task
from ..joining import Join, Map, composed, faded
from ..prepared import Values, Way
from .launch import Launch
from .launch_plan import LoadedKernel


class JoinedLaunch(Launch):
    """The launches of one way of calls of a layout, whose last value is a `Join`."""

    def __init__(
        self, task: Task, kernels: tuple[LoadedKernel, ...], chunk: int, segment: int
    ) -> None:
        super().__init__(task, tuple(map(_without_scratch, kernels)), chunk, segment)
        self._reverse = task.way is Way.BACKWARD
        prefix = GRADIENT if self._reverse else ""
        form = task.call.form
        carried = chunk_program(form).carried
        transitions = segment_transitions(carried)
        assert transitions is not None
        found = {c.name: p for c, p in zip(carried, transitions, strict=True)}
        self._states = [(prefix + s.name, found[s.name]) for s in task.call.step.states]
        starts = {("initial", name) for name, _ in self._states}
        first = next(
            n for n, k in enumerate(kernels) if starts.intersection(k.kernel.sources.values())
        )
        self._letters = {b.name: b.shape[2:] for k in kernels[:first] for b in k.kernel.stores}
        self._rows = len(form.micro_steps)
        plan, new = self.plan, range(min(self.plan.results.values()), 1 << 30)
        self._before = replace(plan, launches=plan.launches[:first])
        self._behind = replace(
            plan,
            launches=plan.launches[first:],
            pointed=(*plan.pointed, *new[: len(plan.new)]),
            new=(),
            makers=(),
        )

    def run(self, tensors: list[Any], values: Values) -> None:
        """As `Launch.run`, with a meeting of the ranks."""
        join: Join = values[-1]
        self._before.run(tensors)
        join.meet(self._map(tensors, join))
        self._behind.run(tensors)

    def _map(self, tensors: list[Any], join: Join) -> Map:
        """What the rank's part makes of states, composed of what its segments do."""
        first, count, sequences = self._segments(join)

        def ended(carry: str) -> tuple[Tensor, tuple[str, ...]]:
            """What segments end with, those scanned first in front; and its axes by letter."""
            name = str(BufferId(BufferKind.SEGMENT_END, carry))
            x: Tensor = tensors[self.plan.results[name]]
            x = x[first : first + sequences * count].unflatten(0, (sequences, count))
            return x.flip(1) if self._reverse else x, self._letters[name]

        ends, factors = [], []
        for name, p in self._states:
            end, letters = ended(name)
            turned = letters == ("V", "K")
            factor: Tensor | None = None
            if p is None:
                end = end.sum(1)
            elif p.matrix:
                matrix, _ = ended(p.carried.name)
                factor, end = composed(matrix.mT if self._reverse else matrix, end)
                factor = factor.mT if turned is not self._reverse else factor
            else:
                logs, own = ended(p.carried.name)
                shape = [n if a in own else 1 for n, a in zip(end.shape[3:], letters, strict=True)]
                factor, end = faded(logs.reshape(*logs.shape[:3], *shape), end)
                factor = factor.mT if turned else factor
            ends.append((end.mT if turned else end).float())
            factors.append(None if factor is None else factor.float())
        return Map(tuple(ends), tuple(factors))

    def _segments(self, join: Join) -> tuple[int, int, int]:
        """The first segment of the join's sequences, how many each has, how many those are."""
        rows = self._layout.chunk * self._layout.segment
        if join.bounds is None:
            return 0, -(-self._layout.T // rows), self._layout.N
        lengths = [b - a for a, b in zip(join.bounds, join.bounds[1:], strict=False)]
        counts = [max(-(-n * self._rows // rows), 1) for n in lengths]
        at = range(len(counts))[join.sequences]
        assert len(at) == 1, "of packed sequences one goes over a border"
        return sum(counts[: at[0]]), counts[at[0]], 1


def _without_scratch(loaded: LoadedKernel) -> LoadedKernel:
    """The same kernel, whose buffers are tensors that last from one launch to a later one."""
    stores = tuple(b._replace(scratch=False) for b in loaded.kernel.stores)
    return replace(loaded, kernel=loaded.kernel._replace(stores=stores), gluon=None)
