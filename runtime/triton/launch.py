"""Launching printed Triton kernels: the tensors of one way of a call, put in their places."""

from __future__ import annotations

from typing import Any

from ..engine import Task
from ..prepared import Values, Way
from .kernels import Buffer
from .launch_plan import NO_TABLES, Layout, LoadedKernel, OperandLayout, plan_launches


class Launch:
    """One way of calls of a layout: where tensors come from, its kernels, the buffers between them.

    Kernels are given the strides of operands; all other tensors are contiguous from here on.
    """

    def __init__(
        self,
        task: Task,
        kernels: tuple[LoadedKernel, ...],
        chunk: int,
        segment: int = 0,
        given: tuple[Buffer, ...] = (),
    ) -> None:
        """Lay out what `kernels` launch.

        `segment`: tokens of a segment, for scans that run on those, in whole chunks; else 0.
        `given`: buffers that no kernel stores, new like those that they do.
        """
        pools = (*task.pools.values(), *task.slots)  # as they lie
        feeds = (*task.operands.values(), *pools, *(f.dense() for f in task.starts.values()))
        self._feeds = [(f.at, f.make) for f in feeds]
        self._params = list(task.params.values())
        self._bounds = task.cu_seqlens
        layout = self._layout = _layout(task, chunk, -(-segment // chunk))
        self.plan = plan_launches(kernels, layout, given)
        self._results = [self.plan.results.get(name) for name in task.results]
        # outputs of single tokens lie by tokens, as chunks of one: by number, another shape
        self._outputs: list[tuple[int, tuple[int, ...]]] = []
        if task.way in (Way.TOKENS, Way.POOL):
            lie = {b.source[1]: b.shape for b in self.plan.new}
            shapes = zip(task.results, task.call.output_shapes.values(), strict=False)
            for n, (name, (B, *rest)) in enumerate(shapes):
                shape = (B, *rest) if task.time else (B, *rest[1:])
                if lie.get(name) != shape:
                    self._outputs.append((n, shape))

    def __call__(self, values: Values) -> list[Any]:
        """Launch the kernels in order; the task's results."""
        tensors = self.tensors(values)
        self.run(tensors, values)
        made: list[Any] = [None if n is None else tensors[n] for n in self._results]
        for n, shape in self._outputs:
            made[n] = made[n][: self._layout.T * self._layout.B].view(shape)
        return made

    def run(self, tensors: list[Any], values: Values) -> None:
        """Launch the kernels on what `tensors` returned, to which new tensors are added."""
        self.plan.run(tensors)

    def tensors(self, values: Values) -> list[Any]:
        """What kernels take of a call, as they number it."""
        tensors = [values[at] if make is None else make(values[at]) for at, make in self._feeds]
        if self._bounds is None:
            tensors += NO_TABLES
        else:
            assert self._bounds.make is not None
            tensors += self._layout.tables(self._bounds.make(values[self._bounds.at]))
        if self._params:
            tensors += [values[at] for at in self._params]
        return tensors


def _layout(task: Task, chunk: int, segment: int) -> Layout:
    rows, pool = task.rows, task.call.pool
    operands = ((name, feed.like) for name, feed in task.operands.items())
    return Layout(
        *(rows.B, rows.T, rows.HV, rows.K, rows.V, rows.N, chunk, segment),
        packed=None if rows.cu_seqlens is None else rows.cu_seqlens.dtype,
        device=rows.device,
        operands=tuple(
            OperandLayout.of(name, x, per_head=name in task.per_head)
            for name, x in operands
            if x is not None
        )
        + _pools(task),
        carries=tuple(
            (name, task.carry_shape(name), None if f.like is None else f.like.dtype)
            for name, f in task.starts.items()
        ),
        params=tuple(task.params),
        pool=(0, 0) if pool is None else (pool.slots, pool.width),
    )


def _pools(task: Task) -> tuple[OperandLayout, ...]:
    """The layouts of a pool's states, of its indices and of numbers of tokens, as kernels ask."""
    pool = task.call.pool
    if pool is None:
        return ()
    slots, heads = pool.indices.stride(), task.rows.HV
    states = []
    for name, x in zip(task.pools, pool.states, strict=True):
        strides = x.stride()[0], 0, *x.stride()[1:]
        states.append(OperandLayout(name, x.dtype, heads, strides))
    accepted = pool.indices[..., 0] if pool.accepted is None else pool.accepted
    return (
        *states,
        OperandLayout(".slots", pool.indices.dtype, 0, (slots[0], *(slots[1:] or (0,)))),
        OperandLayout(".accepted", accepted.dtype, 0, accepted.stride() or (0,)),
    )
