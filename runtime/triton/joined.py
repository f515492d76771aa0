"""Launches of a rank's part of sequences: a pause before the scans that start from other ranks.

Kernels that scan segments of sequences compute what each segment makes of a state before any scan
starts from a state (codegen/segments.py). Composed, these maps are the map of the rank's part. So
ranks meet between two kernels, and no kernel runs twice. A backward computes the states again from
the maps that its forward left, so that kernels for those are left out.
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
from .launch_plan import LaunchPlan, LoadedKernel, plan_launches


class JoinedLaunch(Launch):
    """The launches of one way of calls of a layout, whose last value is a `Join`."""

    def __init__(
        self, task: Task, kernels: tuple[LoadedKernel, ...], chunk: int, segment: int
    ) -> None:
        kernels = tuple(map(_without_scratch, kernels))
        of_maps = [k.kernel.stores for k in kernels if _stores_maps(k)]
        # of states, not of gradients: what forward and backward both compute
        self._kept = tuple(b for x in of_maps for b in x if not b.name.startswith(GRADIENT))
        super().__init__(task, kernels, chunk, segment, self._kept)
        self._reverse = task.way is Way.BACKWARD
        prefix = GRADIENT if self._reverse else ""
        form = task.call.form
        carried = chunk_program(form).carried
        transitions = segment_transitions(carried)
        assert transitions is not None
        found = {c.name: p for c, p in zip(carried, transitions, strict=True)}
        self._states = [(prefix + s.name, found[s.name]) for s in task.call.step.states]
        self._rows = len(form.micro_steps)
        # a scan behind the meeting may have a buffer of that name with other axes
        before = kernels[: self._first(kernels)]
        self._letters = {b.name: b.shape[2:] for k in before for b in k.kernel.stores}
        self._halves = self._cut(self.plan, kernels, 0)
        names = {b.name for b in self._kept}
        rest = tuple(k for k in kernels if not (_stores_maps(k) and _stored(k) <= names))
        short = plan_launches(rest, self._layout, self._kept)
        self._halves_after_forward = self._cut(short, rest, len(self._kept))

    def _first(self, kernels: tuple[LoadedKernel, ...]) -> int:
        """The first kernel that starts from what other ranks make."""
        starts = {("initial", name) for name, _ in self._states}
        return next(
            n for n, k in enumerate(kernels) if starts.intersection(k.kernel.sources.values())
        )

    def _cut(
        self, plan: LaunchPlan, kernels: tuple[LoadedKernel, ...], there: int
    ) -> tuple[LaunchPlan, LaunchPlan]:
        """The launches before ranks meet and behind; `there`: how many buffers are given."""
        first = self._first(kernels)
        new = range(min(plan.results.values()), 1 << 30)
        before = replace(
            plan,
            launches=plan.launches[:first],
            pointed=(*plan.pointed, *new[:there]),
            new=plan.new[there:],
            makers=plan.makers[there:],
        )
        behind = replace(
            plan,
            launches=plan.launches[first:],
            pointed=(*plan.pointed, *new[: len(plan.new)]),
            new=(),
            makers=(),
        )
        return before, behind

    def run(self, tensors: list[Any], values: Values) -> None:
        """As `Launch.run`, with a meeting of the ranks."""
        join: Join = values[-1]
        ends, rows = join.ends, self._layout.chunk * self._layout.segment
        halves = self._halves
        if self._reverse and ends.rows == rows and ends.tensors.keys() == {*self._kept}:
            tensors += (ends.tensors[b] for b in self._kept)
            halves = self._halves_after_forward
        before, behind = halves
        before.run(tensors)
        join.meet(self._map(tensors, join))
        behind.run(tensors)
        if not self._reverse:
            ends.rows = rows
            ends.tensors = {b: tensors[self.plan.results[b.name]] for b in self._kept}

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


def _stored(loaded: LoadedKernel) -> set[str]:
    """The names of the buffers that a kernel stores."""
    return {b.name for b in loaded.kernel.stores}


def _stores_maps(loaded: LoadedKernel) -> bool:
    """Whether a kernel stores what segments make of states, and nothing else."""
    suffix = str(BufferId(BufferKind.SEGMENT_END, ""))
    names = _stored(loaded)
    return bool(names) and all(n.endswith(suffix) for n in names)


def _without_scratch(loaded: LoadedKernel) -> LoadedKernel:
    """The same kernel, whose buffers are tensors that last from one launch to a later one."""
    stores = tuple(b._replace(scratch=False) for b in loaded.kernel.stores)
    return replace(loaded, kernel=loaded.kernel._replace(stores=stores), gluon=None)
