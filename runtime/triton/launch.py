"""Launching printed Triton kernels: the tensors of one direction of a call, put in their places."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from ...codegen.buffers import BufferId, gradient
from ...codegen.differentiate import GRADIENT
from ...codegen.interface import Buffer
from ...dsl.ir import Per
from ..call import Call
from ..packing import chunk_table
from ..printed import own_gradient
from .launch_plan import Bound, Launched, Layout, New, OperandLayout, Schedule, schedule

_COMPILING = threading.Lock()


class Launch:
    """One direction of one call: its operands, its chunks, and the buffers between its kernels.

    Kernels are given the strides of operands; all other tensors are contiguous from here on.
    """

    def __init__(
        self, call: Call, chunk: int, extra: Mapping[str, Tensor], segment: int = 0
    ) -> None:
        """`segment`: tokens of a segment, for scans that run on those, in whole chunks; else 0."""
        self._call = call
        self._per_head = {o.name for o in call.step.operands if o.per is Per.HEAD}
        self._operands = {
            name: x.contiguous() if name in self._per_head or x.stride(-1) != 1 else x
            for name, x in {**call.operands, **extra}.items()
        }
        self.buffers: dict[BufferId, Tensor] = {}
        self._chunk = chunk
        self._tables: tuple[Tensor | None, ...] = (None, None, None, None)
        self._chunks = call.N * -(-call.T // chunk)
        self._segment = -(-segment // chunk)
        segment = self._segment * chunk
        self._segments = call.N * -(-call.T // segment) if segment else 0
        if call.cu_seqlens is not None:
            cu_seqlens = call.cu_seqlens.contiguous()
            offsets, table = chunk_table(cu_seqlens, call.T, chunk)
            of_segments = None
            if segment:
                _, of_segments = chunk_table(cu_seqlens, call.T, segment, least=1)
                self._segments = of_segments.shape[0]
            self._tables = (cu_seqlens, offsets, table, of_segments)
            self._chunks = table.shape[0]

    def run(
        self, kernels: tuple[Bound, ...], starts: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Launch `kernels` in order; returns the last value of every carry, float32."""
        planned, tensors = self.prepare(kernels, starts)
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
        aligned = all(p % 16 == 0 for p in pointers if isinstance(p, int))
        device = self._call.device
        with _current(device):
            if aligned and planned.compiled:
                self._run_again(planned, tensors, pointers)
            else:
                for launched in planned.launches:
                    tensors += [_new(b, device) for b in launched.new]
                _compile(planned.launches, tensors, device)
                for launched in planned.launches:
                    launched.run(tensors, aligned=aligned)
        self.buffers = {name: _tensor(tensors[i]) for name, i in planned.buffers}
        return {name: _tensor(tensors[i]) for name, i in planned.ends}

    def _run_again(
        self,
        planned: Schedule,
        tensors: list[Tensor | float | None],
        pointers: list[float | None],
    ) -> None:
        """One piece of memory for all that is no result, and numbers for arguments: less to do."""
        device = self._call.device
        scratch = torch.empty(planned.scratch // 4, dtype=torch.float32, device=device)
        free = scratch.data_ptr()
        for launched in planned.launches:
            for b in launched.new:
                if b.scratch:
                    tensors.append(None)
                    pointers.append(free)
                    free += b.bytes
                else:
                    made = _new(b, device)
                    tensors.append(made)
                    pointers.append(made.data_ptr())
            launched.run_again(pointers)

    def prepare(
        self,
        kernels: tuple[Bound, ...],
        starts: Mapping[str, Tensor | None],
        given: tuple[Buffer, ...] = (),
    ) -> tuple[Schedule, list[Tensor | float | None]]:
        """What `kernels` launch, and the tensors of the call that they take, in their order.

        `given`: buffers that none of them stores, new like those that they do.
        """
        initial = {name: None if x is None else x.contiguous() for name, x in starts.items()}
        tensors: list[Tensor | float | None] = [
            *self._operands.values(),
            *initial.values(),
            *self._tables,
            *self._call.params.values(),
        ]
        return schedule(kernels, self._layout(initial), given), tensors

    def _layout(self, initial: Mapping[str, Tensor | None]) -> Layout:
        call = self._call
        shapes = {s.name: call.state_shape(s) for s in call.step.states}
        return Layout(
            call.B,
            call.T,
            call.HV,
            call.K,
            call.V,
            call.N,
            self._chunk,
            self._chunks,
            self._segment,
            self._segments,
            None if call.cu_seqlens is None else call.cu_seqlens.dtype,
            call.dtype,
            call.device,
            tuple(
                OperandLayout(name, x.dtype, 0, ())
                if name in self._per_head
                else OperandLayout(name, x.dtype, x.shape[2], x.stride())
                for name, x in self._operands.items()
            ),
            tuple(
                (name, shapes[name.removeprefix(GRADIENT)], None if x is None else x.dtype)
                for name, x in initial.items()
            ),
            tuple(call.params),
        )

    def gradient(self, name: str) -> Tensor:
        """The gradient of an operand in its own shape and dtype."""
        call = self._call
        g = self.buffers.get(gradient(name))
        return own_gradient(g, call.operands[name], call.HV, per_head=name in self._per_head)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _compile(
    launches: Sequence[Launched], tensors: Sequence[Tensor | float | None], device: torch.device
) -> None:
    """Compile kernels that were not before, at the same time: passes and assembler are not Python.

    The first call of a direction then takes as long as its slowest kernel, or as there are cores.
    """
    if all(x.seen for x in launches):
        return

    def compile_one(launched: Launched) -> None:
        with _current(device):  # each thread has its own
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


def _tensor(x: Tensor | float | None) -> Tensor:
    assert isinstance(x, Tensor)
    return x
