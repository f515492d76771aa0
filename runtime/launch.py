"""Launching printed Triton kernels: buffers, arguments and grids of one direction of a call.

What does not change from call to call (which parameter takes which tensor) is worked out once per
emitted kernel; a call only fills it in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codegen.config import Config
from ..codegen.differentiate import GRADIENT
from ..codegen.plan import Loop
from ..codegen.tile import Axes, Axis
from ..codegen.triton_types import Dtype, Role, TritonKernel, buffer_dtype
from ..dsl.ir import Per
from .call import Call
from .packing import chunk_table

TORCH = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
_STRIDED = (Role.STRIDE_BATCH, Role.STRIDE_TOKEN, Role.STRIDE_HEAD, Role.GROUP)


@dataclass(frozen=True, slots=True)
class Bound:
    """An emitted kernel with its function, and its parameters sorted by what fills them.

    `tokens`: operand, then the names of its pointer, three strides and group.
    """

    kernel: TritonKernel
    function: Any  # a triton.JITFunction: Triton has no types
    constants: Mapping[str, object]
    tokens: tuple[tuple[str, str, str, str, str, str], ...]
    heads: tuple[tuple[str, str], ...]
    buffers: tuple[tuple[str, str], ...]
    firsts: tuple[tuple[str, str], ...]
    lasts: tuple[tuple[str, str], ...]
    params: tuple[tuple[str, str], ...]


def bind_kernel(kernel: TritonKernel, function: Any) -> Bound:
    """Sort the parameters of `kernel` by what fills them."""
    by_role: dict[Role, list[tuple[str, str]]] = {role: [] for role in Role}
    for p in kernel.parameters:
        by_role[p.role].append((p.name, p.of))
    strided = {
        of: [name for r in _STRIDED for name, o in by_role[r] if o == of]
        for _, of in by_role[Role.STRIDE_BATCH]
    }
    constants = {
        **dict(kernel.constants),
        "num_warps": kernel.config.warps,
        "num_stages": kernel.config.stages,
    }
    return Bound(
        kernel=kernel,
        function=function,
        constants=constants,
        tokens=tuple(
            (of, name, *strided[of])  # type: ignore[misc]
            for name, of in by_role[Role.OPERAND]
            if of in strided
        ),
        heads=tuple(x for x in by_role[Role.OPERAND] if x[1] not in strided),
        buffers=tuple(by_role[Role.BUFFER]),
        firsts=tuple(by_role[Role.INITIAL]),
        lasts=tuple(by_role[Role.FINAL]),
        params=tuple(by_role[Role.PARAM]),
    )


class Launch:
    """One direction of one call: its operands, its chunks, and the buffers between its kernels."""

    def __init__(self, call: Call, config: Config, extra: Mapping[str, Tensor]) -> None:
        self._call = call
        self._per_head = {o.name for o in call.form.operands if o.per is Per.HEAD}
        self._operands = {
            name: x.contiguous() if name in self._per_head or x.stride(-1) != 1 else x
            for name, x in {**call.operands, **extra}.items()
        }
        self.buffers: dict[str, Tensor] = {}
        self._chunk = config.chunk
        self._per_sequence = -(-call.T // config.chunk)
        offsets: Tensor | None = None
        table: Tensor | None = None
        self._chunks = call.N * self._per_sequence
        if call.cu_seqlens is not None:
            offsets, table = chunk_table(call.cu_seqlens, call.T, config.chunk)
            self._chunks = table.shape[0]
        self._common = {
            "cu_seqlens": call.cu_seqlens,
            "chunk_offsets": offsets,
            "chunk_table": table,
            "TOKENS": call.T,
            "chunks": self._per_sequence,
            "HV": call.HV,
            "PACKED": call.cu_seqlens is not None,
        }

    def run(
        self, kernels: tuple[Bound, ...], starts: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Launch `kernels` in order; returns the last value of every carry, float32."""
        call = self._call
        initial = {name: None if x is None else x.contiguous() for name, x in starts.items()}
        ends: dict[str, Tensor] = {}
        on_gpu = call.device.type == "cuda"
        with torch.cuda.device(call.device) if on_gpu else contextlib.nullcontext():
            for bound in kernels:
                arguments = self._arguments(bound, initial, ends)
                parallel = bound.kernel.loop is Loop.PARALLEL
                programs = self._chunks if parallel else call.N
                grid = (programs * call.HV * bound.kernel.v_programs,)
                if grid[0]:
                    bound.function[grid](**arguments)
        return ends

    def _arguments(
        self, bound: Bound, initial: Mapping[str, Tensor | None], ends: dict[str, Tensor]
    ) -> dict[str, object]:
        call, values = self._call, {**bound.constants, **self._common}
        for name, axes in bound.kernel.stores:
            if name not in self.buffers:
                self.buffers[name] = self._buffer(name, axes)
        for operand, pointer, batch, token, head, group in bound.tokens:
            x = self._operands[operand]
            values[pointer] = x
            values[batch], values[token], values[head] = x.stride()[:3]
            values[group] = call.HV // x.shape[2]
        for pointer, operand in bound.heads:
            values[pointer] = self._operands[operand]
        for pointer, name in bound.buffers:
            values[pointer] = self.buffers[name]
        for pointer, name in bound.firsts:
            values[pointer] = initial[name]
        for pointer, name in bound.lasts:
            values[pointer] = ends[name] = self._final(name)
        for name, of in bound.params:
            values[name] = call.params[of]
        return values

    def _buffer(self, name: str, axes: Axes) -> Tensor:
        call = self._call
        size = {Axis.K: call.K, Axis.V: call.V, Axis.I: self._chunk, Axis.J: self._chunk}
        times = [a for a in axes if a in (Axis.I, Axis.J)]
        channels = [size[a] for a in axes if a not in times[:1]]
        operand = name.removeprefix(GRADIENT)
        if name == "o":
            dtype = call.dtype
        elif name.startswith(GRADIENT) and operand in call.operands:
            return self._gradient_buffer(operand, bool(times), channels)
        else:
            dtype = TORCH[buffer_dtype(axes, _low(call.dtype))]
        if times:
            return torch.empty(call.B, call.T, call.HV, *channels, dtype=dtype, device=call.device)
        shape = (self._chunks, call.HV, *reversed(channels))
        return torch.empty(shape, dtype=dtype, device=call.device)

    def _gradient_buffer(self, operand: str, per_token: bool, channels: list[int]) -> Tensor:
        """Per value head; float32 where more is summed over it (groups of heads, chunks)."""
        call, x = self._call, self._call.operands[operand]
        if not per_token:  # partial sums: programs beyond the last chunk write none
            shape = (self._chunks, call.HV, *channels)
            return torch.zeros(shape, dtype=torch.float32, device=call.device)
        dtype = x.dtype if x.shape[2] == call.HV else torch.float32
        return torch.empty(call.B, call.T, call.HV, *channels, dtype=dtype, device=call.device)

    def _final(self, carry: str) -> Tensor:
        call = self._call
        state = next(s for s in call.form.states if s.name == carry.removeprefix(GRADIENT))
        return torch.empty(call.state_shape(state), dtype=torch.float32, device=call.device)

    def gradient(self, name: str) -> Tensor:
        """The gradient of an operand in its own shape and dtype, partial sums in fixed order."""
        call, x = self._call, self._call.operands[name]
        g = self.buffers.get(GRADIENT + name)
        if g is None:
            return torch.zeros_like(x)
        if name in self._per_head:
            return g.sum(0).to(x.dtype)
        heads = x.shape[2]
        if heads != call.HV:
            g = g.reshape(call.B, call.T, heads, call.HV // heads, *x.shape[3:]).sum(3)
        return g.to(x.dtype)


def _low(dtype: torch.dtype) -> Dtype:
    return next(low for low, torch_dtype in TORCH.items() if torch_dtype is dtype)
