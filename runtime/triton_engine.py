"""The Triton engine: emits the kernels of a call, allocates their buffers and launches them.

Runs on a GPU; on a CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..codegen.config import Config, Dims, Precision
from ..codegen.defaults import default_config
from ..codegen.differentiate import GRADIENT
from ..codegen.emit import Emitted, chunk_body, emit
from ..codegen.plan import Loop
from ..codegen.print_triton import Dtype, Role, Signature, TritonKernel, buffer_dtype
from ..codegen.tile import Axes, Axis
from ..dsl.errors import NotLowered
from ..dsl.ir import Per
from .cache import import_source
from .call import Call
from .packing import chunk_table

_DTYPES = {
    torch.float32: Dtype.FLOAT32,
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
}
_TORCH = {low: dtype for dtype, low in _DTYPES.items()}


def supports(call: Call) -> str | None:
    """Why this engine cannot serve the call; None if it can."""
    interpreted = triton.knobs.runtime.interpret
    if call.device.type != "cuda" and not interpreted:
        return f"its kernels run on a GPU, and the operands are on {call.device}"
    for name, x in call.operands.items():
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; Triton kernels take float32, bfloat16 and float16"
        if interpreted and x.dtype is torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly: use float32 or float16"
    try:
        chunk_body(call.form)
    except NotLowered as refusal:
        return str(refusal)
    return None


def forward(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o [B,T,HV,V] in the call's dtype; final states [N,HV,K,V] (or [N,HV,K]) in float32."""
    config = configuration(call)
    emitted = _emitted(call, config)
    launch = _Launch(call, config, {})
    finals = launch.run(emitted, emitted.forward, dict(zip(_states(call), call.initial, strict=True)))
    return launch.buffers["o"], tuple(finals[name] for name in _states(call))


def backward(
    call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """Gradients of every operand, in its shape and dtype, and of the initial states."""
    config = configuration(call)
    emitted = _emitted(call, config)
    launch = _Launch(call, config, {GRADIENT + "o": do})
    starts: dict[str, Tensor | None] = dict(zip(_states(call), call.initial, strict=True))
    for name, dfinal in zip(_states(call), dfinals, strict=True):
        starts[GRADIENT + name] = dfinal
    ends = launch.run(emitted, emitted.backward, starts)
    gradients = {name: launch.gradient(name) for name in call.operands}
    initials = tuple(
        None if x is None else ends[GRADIENT + name].to(x.dtype)
        for name, x in zip(_states(call), call.initial, strict=True)
    )
    return gradients, initials


def configuration(call: Call) -> Config:
    """The configuration that serves a call."""
    wide = call.dtype is torch.float32
    return _configuration(call.form, Dims(call.K, call.V), wide)


@lru_cache(maxsize=512)
def _configuration(form: object, dims: Dims, wide: bool) -> Config:
    return default_config(chunk_body(form), dims, wide_dtype=wide, programs=0)  # type: ignore[arg-type]


def _states(call: Call) -> tuple[str, ...]:
    return tuple(s.name for s in call.form.states)


def _emitted(call: Call, config: Config) -> Emitted:
    dtypes = tuple((name, _DTYPES[x.dtype]) for name, x in call.operands.items())
    signature = Signature(Dims(call.K, call.V), _DTYPES[call.dtype], dtypes, _precision())
    return emit(call.form, signature, config)


@lru_cache(maxsize=1)
def _precision() -> Precision:
    return Precision.IEEE if torch.version.hip or triton.knobs.runtime.interpret else Precision.TF32X3


class _Launch:
    """The kernels of one direction of one call, and the buffers between them."""

    def __init__(self, call: Call, config: Config, extra: Mapping[str, Tensor]) -> None:
        self._call = call
        per = {o.name: o.per for o in call.form.operands}
        self._per_head = {n for n in call.operands if per[n] is Per.HEAD}
        self._operands = {
            name: x.contiguous() if name in self._per_head or x.stride(-1) != 1 else x
            for name, x in {**call.operands, **extra}.items()
        }
        self.buffers: dict[str, Tensor] = {}
        self._chunk = config.chunk
        self._per_sequence = -(-call.T // config.chunk)
        self._offsets: Tensor | None = None
        self._table: Tensor | None = None
        self._chunks = call.N * self._per_sequence
        if call.cu_seqlens is not None:
            self._offsets, self._table = chunk_table(call.cu_seqlens, call.T, config.chunk)
            self._chunks = self._table.shape[0]

    def run(
        self, emitted: Emitted, kernels: tuple[TritonKernel, ...], starts: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Launch `kernels` in order; returns the last value of every carry, float32."""
        call = self._call
        module = import_source(emitted.source)
        initial = {name: None if x is None else x.contiguous() for name, x in starts.items()}
        ends: dict[str, Tensor] = {}
        guard = torch.cuda.device(call.device) if call.device.type == "cuda" else contextlib.nullcontext()
        with guard:
            for kernel in kernels:
                self._allocate(kernel)
                arguments = self._arguments(kernel, initial, ends)
                programs = self._chunks if kernel.loop is Loop.PARALLEL else call.N
                grid = (programs * call.HV * kernel.v_programs,)
                if grid[0] == 0:
                    continue
                getattr(module, kernel.name)[grid](
                    **arguments,
                    **dict(kernel.constants),
                    cu_seqlens=call.cu_seqlens,
                    chunk_offsets=self._offsets,
                    chunk_table=self._table,
                    TOKENS=call.T,
                    chunks=self._per_sequence,
                    HV=call.HV,
                    PACKED=call.cu_seqlens is not None,
                    num_warps=kernel.config.warps,
                    num_stages=kernel.config.stages,
                )
        return ends

    def _allocate(self, kernel: TritonKernel) -> None:
        for name, axes in kernel.stores:
            if name not in self.buffers:
                self.buffers[name] = self._buffer(name, axes)

    def _buffer(self, name: str, axes: Axes) -> Tensor:
        call = self._call
        size = {Axis.K: call.K, Axis.V: call.V, Axis.I: self._chunk, Axis.J: self._chunk}
        times = [a for a in axes if a in (Axis.I, Axis.J)]
        channels = [size[a] for a in axes if a not in times[:1]]
        operand = name.removeprefix(GRADIENT)
        if name == "o":
            dtype = call.dtype
        elif name.startswith(GRADIENT) and operand in call.operands and not name.endswith("_chunk"):
            return self._gradient_buffer(operand, bool(times), channels)
        else:
            dtype = _TORCH[buffer_dtype(axes, _DTYPES[call.dtype])]
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

    def _arguments(
        self, kernel: TritonKernel, initial: Mapping[str, Tensor | None], ends: dict[str, Tensor]
    ) -> dict[str, object]:
        call = self._call
        values: dict[str, object] = {}
        for p in kernel.parameters:
            if p.role is Role.BUFFER:
                values[p.name] = self.buffers[p.of]
            elif p.role is Role.INITIAL:
                values[p.name] = initial[p.of]
            elif p.role is Role.FINAL:
                values[p.name] = ends[p.of] = self._final(p.of)
            elif p.role is Role.PARAM:
                values[p.name] = call.params[p.of]
            else:
                x = self._operands[p.of]
                values[p.name] = {
                    Role.OPERAND: lambda x=x: x,
                    Role.STRIDE_BATCH: lambda x=x: x.stride(0),
                    Role.STRIDE_TOKEN: lambda x=x: x.stride(1),
                    Role.STRIDE_HEAD: lambda x=x: x.stride(2),
                    Role.GROUP: lambda x=x: call.HV // x.shape[2],
                }[p.role]()
        return values

    def _final(self, carry: str) -> Tensor:
        call = self._call
        state = next(s for s in call.form.states if s.name == carry.removeprefix(GRADIENT))
        return torch.empty(call.state_shape(state), dtype=torch.float32, device=call.device)

    def gradient(self, name: str) -> Tensor:
        """The gradient of an operand in its own shape and dtype, partial sums added in fixed order."""
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
