"""Launching printed Triton kernels: the tensors of one way of a call, put in their places."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from ...codegen.differentiate import GRADIENT
from ...codegen.interface import Buffer
from ..engine import Feed, Task
from ..packing import chunk_bound, chunk_table
from ..prepared import Values, Way
from .launch_plan import Bound, Launched, Layout, New, OperandLayout, plan_launches

_COMPILING = threading.Lock()
Given = Tensor | float | None  # what a kernel is given: a tensor, a float of the call, nothing


class Launch:
    """One way of calls of a layout: where tensors come from, its kernels, the buffers between them.

    Kernels are given the strides of operands; all other tensors are contiguous from here on.
    """

    def __init__(
        self,
        task: Task,
        kernels: tuple[Bound, ...],
        chunk: int,
        segment: int = 0,
        given: tuple[Buffer, ...] = (),
    ) -> None:
        """Lay out what `kernels` launch.

        `segment`: tokens of a segment, for scans that run on those, in whole chunks; else 0.
        `given`: buffers that no kernel stores, new like those that they do.
        """
        self._device = task.call.device
        self._index = self._device.index if self._device.type == "cuda" else None
        feeds = (*task.operands.values(), *(f.dense() for f in task.starts.values()))
        self._feeds = [(f.at, f.make) for f in feeds]
        self._output: tuple[int, ...] | None = None
        if task.way is Way.TOKENS:  # whose output lies by tokens, as chunks of one
            B, *rest = task.call.output_shape
            self._output = (B, *rest) if task.time else (B, *rest[1:])
        self._params = list(task.params.values())
        self._bounds, self._T, self._chunk = task.cu_seqlens, task.rows.T, chunk
        self._segment = -(-segment // chunk) * chunk
        self.layout = _layout(task, chunk, self._segment)
        self.plan = plan_launches(kernels, self.layout, given)
        number = {str(name): n for name, n in (*self.plan.buffers, *self.plan.ends)}
        self._results = [number.get(name) for name in task.results]

    def __call__(self, values: Values) -> list[Any]:
        """Launch the kernels in order; the task's results."""
        tensors = self.tensors(values)
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
        aligned = True
        for p in pointers:
            if isinstance(p, int) and p % 16:
                aligned = False
        if self._index is not None and torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self._launch(tensors, pointers, aligned=aligned)
        else:
            self._launch(tensors, pointers, aligned=aligned)
        made: list[Any] = [None if n is None else tensors[n] for n in self._results]
        if self._output is not None:
            made[0] = made[0][: self._T * self.layout.B].view(self._output)
        return made

    def tensors(self, values: Values) -> list[Any]:
        """What kernels take of a call, as they number it."""
        tensors = [values[at] if make is None else make(values[at]) for at, make in self._feeds]
        if self._bounds is None:
            tensors += (None, None, None, None)
        else:
            tensors += self._tables(values, self._bounds)
        tensors += [values[at] for at in self._params]
        return tensors

    def _tables(self, values: Values, bounds: Feed) -> tuple[Tensor | None, ...]:
        assert bounds.make is not None
        cu_seqlens = bounds.make(values[bounds.at])
        offsets, table = chunk_table(cu_seqlens, self._T, self._chunk)
        of_segments = None
        if self._segment:
            _, of_segments = chunk_table(cu_seqlens, self._T, self._segment, least=1)
        return cu_seqlens, offsets, table, of_segments

    def _launch(self, tensors: list[Given], pointers: list[float | None], *, aligned: bool) -> None:
        plan, device = self.plan, self._device
        if not (aligned and plan.compiled):
            for launched in plan.launches:
                tensors += [_new(b, device) for b in launched.new]
            _compile(plan.launches, tensors, self._index)
            for launched in plan.launches:
                launched.run(tensors, aligned=aligned)
            return
        # one piece of memory for all that is no result, and numbers for arguments: less to do
        scratch = torch.empty(plan.scratch // 4, dtype=torch.float32, device=device)
        free = scratch.data_ptr()
        stream = triton.runtime.driver.active.get_current_stream(self._index or 0)
        for launched in plan.launches:
            for b in launched.new:
                if b.scratch:
                    tensors.append(None)
                    pointers.append(free)
                    free += b.bytes
                else:
                    made = torch.empty(b.shape, dtype=b.dtype, device=device)
                    if b.zeroed:
                        made.zero_()
                    tensors.append(made)
                    pointers.append(made.data_ptr())
            arguments = list(launched.values)
            for argument, number in launched.slots:
                arguments[argument] = pointers[number]
            launched.again(*arguments, stream=stream)


def _layout(task: Task, chunk: int, segment: int) -> Layout:
    call, rows = task.call, task.rows
    shapes = {s.name: call.state_shape(s) for s in call.step.states}
    packed = task.cu_seqlens is not None

    def pieces(length: int) -> int:
        return chunk_bound(rows.T, rows.N, length) if packed else rows.N * -(-rows.T // length)

    return Layout(
        rows.B,
        rows.T,
        rows.HV,
        rows.K,
        rows.V,
        rows.N,
        chunk,
        pieces(chunk),
        segment // chunk,
        pieces(segment) if segment else 0,
        rows.cu_seqlens.dtype if rows.cu_seqlens is not None else None,
        rows.dtype,
        rows.device,
        tuple(
            OperandLayout(name, x.dtype, 0, ())
            if name in task.per_head
            else OperandLayout(name, x.dtype, x.shape[2], x.stride())
            for name, x in ((name, feed.like) for name, feed in task.operands.items())
            if x is not None
        ),
        tuple(
            (name, shapes[name.removeprefix(GRADIENT)], None if f.like is None else f.like.dtype)
            for name, f in task.starts.items()
        ),
        tuple(task.params),
    )


def _current(index: int | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if index is None else torch.cuda.device(index)


def _compile(launches: Sequence[Launched], tensors: Sequence[Given], index: int | None) -> None:
    """Compile kernels that were not before, at the same time: passes and assembler are not Python.

    The first call of a direction then takes as long as its slowest kernel, or as there are cores.
    """
    if all(x.seen for x in launches):
        return

    def compile_one(launched: Launched) -> None:
        with _current(index):  # each thread has its own
            launched.compile(tensors)

    with _COMPILING:  # a first call in another thread would hash while these are parsed
        fresh = [x for x in launches if not x.seen]
        if len(fresh) > 1 and not triton.knobs.runtime.interpret:
            for launched in fresh:
                launched.bound.identify()
            with ThreadPoolExecutor(min(len(fresh), os.cpu_count() or 1)) as pool:
                list(pool.map(compile_one, fresh))
        for launched in fresh:
            launched.seen = True


def _new(b: New, device: torch.device) -> Tensor:
    made = torch.empty(b.shape, dtype=b.dtype, device=device)
    return made.zero_() if b.zeroed else made
