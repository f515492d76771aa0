"""The TVM engine: TileIR as machine code for a CPU, on the operands as they lie in memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...codegen.buffers import OUTPUT, BufferId, gradient
from ...codegen.config import Dims, Precision
from ...codegen.differentiate import GRADIENT
from ...codegen.interface import Buffer, Parameter, Role, Signature
from ...codegen.plan import Loop, Program
from ...codegen.programs import backward_program, chunk_program, forward_program
from ...codegen.tir.config import TvmConfig, default_config, spread, token_config
from ...codegen.tir.kernel import TirKernel, print_tir
from ...codegen.token import token_kernel
from ...dsl.errors import NotLowered
from ...dsl.ir import Per
from ...dsl.normal_form import NormalForm
from ...dsl.step import Step
from ..call import Call
from ..engines import EngineName
from ..micro_steps import coarse, coarse_gradients, refined, refined_cotangent
from ..printed import PRINTED, TORCH, Dtypes, dtypes_of, own_gradient, unprinted
from ..tokens import Convert, Serve, Token, of_tokens
from ..tuned.artifact import Key
from ..tuned.selection import call_size_of, key_here, select_config, token_loop_wins
from .allocator import empty, keep_freed_memory
from .build import Function, functions, host_cpu, lanes_of
from .threads import Work, run

Stage: TypeAlias = tuple[tuple[TirKernel, Function], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Compiled:
    """One direction, compiled: stages of kernels in order (codegen/plan.py)."""

    config: TvmConfig
    stages: tuple[Stage, ...]


def supports(call: Call) -> str | None:
    """Why this engine cannot serve the call; None if it can."""
    if call.device.type != "cpu":
        return f"its code runs on a CPU, and the operands are on {call.device}"
    why = unprinted(dtypes_of(call))
    if why is not None:
        return why
    try:
        chunk_program(call.form)
    except NotLowered as refusal:
        return str(refusal)
    return None


def forward(call: Call, config: TvmConfig | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o [B,T,HV,V] in the call's dtype; final states [N,HV,K,V] (or [N,HV,K]) in float32.

    `config`: instead of the one that serves such calls.
    """
    if config is None and token_loop_wins(_key(call), call_size_of(call)):
        return forward_by_token(call)
    rows = refined(call)
    run = _Run(rows, _compiled(call, config, backward=False), {})
    states = [s.name for s in call.form.states]
    ends = run.execute(dict(zip(states, call.initial, strict=True)))
    o = run.buffers[OUTPUT].view(rows.B, rows.T, rows.HV, rows.V)
    return coarse(call, o), tuple(ends[name] for name in states)


def forward_by_token(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `forward` returns, one token at a time; for any legal step."""
    rows = of_tokens(call)
    compiled = compiled_token(call.step, Dims(call.K, call.V), call.dtype, dtypes_of(rows))
    run = _Run(rows, compiled, {})
    states = [s.name for s in call.step.states]
    ends = run.execute(dict(zip(states, call.initial, strict=True)))
    return run.buffers[OUTPUT].view(call.output_shape), tuple(ends[name] for name in states)


def prepare_step(token: Token) -> Serve | str:
    """What computes single tokens of a layout, or why no kernel does."""
    call = token.call
    why = unprinted(dtypes_of(call))
    if why is not None:
        return why
    dims = Dims(call.K, call.V)
    dtypes = dtypes_of(of_tokens(call))
    try:
        compiled = compiled_token(call.step, dims, call.dtype, dtypes, one_token=True)
    except NotLowered as refused:
        return str(refused)
    (((kernel, function),),) = compiled.stages
    names = [s.name for s in call.step.states]
    results = token.first_state + len(names)  # o, then the new states, follow the values

    def slot(role: Role, of: BufferId | str) -> tuple[int, Convert | None]:
        if isinstance(of, BufferId):
            return results, None
        if role is Role.OPERAND:
            return token.source(of)
        if role is Role.INITIAL:
            return token.state(names.index(of))
        return results + 1 + names.index(of), None

    slots = [slot(p.role, p.of) for p in kernel.parameters]
    B, _, *channels = call.output_shape
    shapes = [call.state_shape(s) for s in call.step.states]
    items = call.N * call.HV * kernel.v_programs
    tables = _tables(call.B, 1, None, 1)
    rest = (call.HV, *(call.params[n] for n in kernel.numbers))
    alone = items == 1 or sum(map(math.prod, shapes)) < _SHARED

    like = empty(B, *channels, dtype=call.dtype)
    states = tuple(empty(*shape) for shape in shapes)

    def serve(values: Sequence[object]) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        o = torch.empty_like(like)
        new = tuple(map(torch.empty_like, states))
        given: list[Any] = [*values, o, *new]
        arguments = [given[n] if make is None else make(given[n]) for n, make in slots]
        if alone:
            function(*arguments, *tables, _room(kernel.scratch), *rest, 0, items)
        else:
            threads = torch.get_num_threads()
            own = {len(arguments) + 2: empty(threads, kernel.scratch)}
            work = Work(function, (*arguments, *tables, None, *rest), own)
            run([work], items, threads)
        if token.has_time:
            o = o.unsqueeze(1)
        return o, new[0] if len(new) == 1 else new

    return serve


_SHARED = 1 << 19  # numbers in states from which another thread is worth waking
_ROOMS = threading.local()


def _room(size: int) -> Tensor:
    """This thread's scratch memory."""
    room: Tensor | None = getattr(_ROOMS, "tensor", None)
    if room is None or room.shape[0] < size:
        room = _ROOMS.tensor = empty(size)
    return room


def backward(
    call: Call,
    do: Tensor,
    dfinals: tuple[Tensor | None, ...],
    config: TvmConfig | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """Gradients of every operand, in its shape and dtype, and of the initial states."""
    extra = {GRADIENT + "o": refined_cotangent(call, do)}
    run = _Run(refined(call), _compiled(call, config, backward=True), extra)
    states = [s.name for s in call.form.states]
    starts: dict[str, Tensor | None] = dict(zip(states, call.initial, strict=True))
    starts |= {GRADIENT + name: d for name, d in zip(states, dfinals, strict=True)}
    ends = run.execute(starts)
    gradients = coarse_gradients(call, {n: run.gradient(n) for n in call.operands})
    initials = tuple(
        None if x is None else ends[GRADIENT + name].to(x.dtype)
        for name, x in zip(states, call.initial, strict=True)
    )
    return gradients, initials


def configuration() -> TvmConfig:
    """What serves calls of many rows on this CPU, untuned."""
    return default_config(lanes_of(host_cpu()))


def fitted(config: TvmConfig, call: Call) -> TvmConfig:
    """`config` as it serves calls like `call`, whose rows may be few for these threads."""
    return spread(config, call_size_of(call).rows, call.V, torch.get_num_threads())


def served(call: Call) -> TvmConfig:
    """What serves calls like `call`."""

    def fewer(config: TvmConfig) -> TvmConfig:
        return fitted(config, call)

    return select_config(TvmConfig, _key(call), call_size_of(call), configuration, fewer)


def _compiled(call: Call, config: TvmConfig | None, *, backward: bool) -> _Compiled:
    config = config or served(call)
    dims = Dims(call.K, call.V)
    return compiled(call.form, dims, call.dtype, dtypes_of(call), config, backward)


def _key(call: Call) -> Key:
    return key_here(call.form, EngineName.TVM, call.dtype, Dims(call.K, call.V), call.device)


@lru_cache(maxsize=512)
def compiled(
    form: NormalForm,
    dims: Dims,
    dtype: torch.dtype,
    dtypes: Dtypes,
    config: TvmConfig,
    backward: bool,
) -> _Compiled:
    keep_freed_memory()
    signature = _signature(dims, dtype, dtypes)
    program: Program = (
        backward_program(form, config.backward)
        if backward
        else forward_program(form, config.forward)
    )
    printed = [
        [print_tir(k, signature, config, program.passed(stage)) for k in stage]
        for stage in program.stages
    ]
    built = iter(functions([k for stage in printed for k in stage], host_cpu()))
    return _Compiled(config, tuple(tuple((k, next(built)) for k in stage) for stage in printed))


@lru_cache(maxsize=512)
def compiled_token(
    step: Step, dims: Dims, dtype: torch.dtype, dtypes: Dtypes, *, one_token: bool = False
) -> _Compiled:
    """The kernel that takes a token at a time, or (`one_token`) one in all."""
    keep_freed_memory()
    config = token_config(lanes_of(host_cpu()))
    kernel = print_tir(
        token_kernel(step), _signature(dims, dtype, dtypes), config, one_token=one_token
    )
    (function,) = functions([kernel], host_cpu())
    return _Compiled(config, (((kernel, function),),))


def _signature(dims: Dims, dtype: torch.dtype, dtypes: Dtypes) -> Signature:
    named = tuple((name, PRINTED[d]) for name, d in dtypes)
    return Signature(dims, PRINTED[dtype], named, Precision.IEEE)


class _Run:
    """One direction of one call: its tensors, and the buffers between its kernels."""

    def __init__(self, call: Call, compiled: _Compiled, extra: Mapping[str, Tensor]) -> None:
        self._call = call
        self._compiled = compiled
        self._chunk = compiled.config.chunk
        self._per_head = {o.name for o in call.step.operands if o.per is Per.HEAD}
        self._operands = {
            name: x if x.stride(-1) == 1 or x.ndim == 3 else x.contiguous()
            for name, x in {**call.operands, **extra}.items()
        }
        self.buffers: dict[BufferId, Tensor] = {}
        bounds = None if call.cu_seqlens is None else tuple(call.cu_seqlens.tolist())
        self._sequences, self._chunks = _tables(call.B, call.T, bounds, self._chunk)
        self._longest = max(self._sequences[:, 2].tolist(), default=0)

    def execute(self, starts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Run the kernels in order; returns the last value of every carry, float32."""
        ends: dict[str, Tensor] = {}
        for stage in self._compiled.stages:
            self._run(stage, starts, ends)
        return ends

    def _run(
        self, stage: Stage, starts: Mapping[str, Tensor | None], ends: dict[str, Tensor]
    ) -> None:
        """Kernels of one stage: all of them for one sequence and head, then for the next."""
        threads, heads = torch.get_num_threads(), self._call.HV
        passed: dict[BufferId | str, Tensor] = {}
        for kernel, _ in stage:
            for buffer in kernel.stores:
                if buffer.name in kernel.private:
                    passed[buffer.name] = self._new(buffer, threads)
                elif buffer.name not in self.buffers:
                    self.buffers[buffer.name] = self._new(buffer)
        scratch = empty(threads, max(kernel.scratch for kernel, _ in stage))
        parts = min(kernel.v_programs for kernel, _ in stage)
        works = []
        for kernel, function in stage:
            tensors = [self._argument(p, starts, ends) for p in kernel.parameters]
            own = {n: passed[p.of] for n, p in enumerate(kernel.parameters) if tensors[n] is None}
            own[len(tensors) + 2] = scratch
            numbers = (self._call.params[n] for n in kernel.numbers)
            values = (*tensors, self._sequences, self._chunks, None, heads, *numbers)
            works.append(Work(function, values, own, kernel.v_programs // parts))
        table = self._chunks if stage[0][0].loop is Loop.PARALLEL else self._sequences
        run(works, len(table) * heads * parts, threads)

    def _new(self, buffer: Buffer, threads: int | None = None) -> Tensor:
        """Room for a buffer: [tokens, HV, ...] or [chunks, HV, ...].

        With `threads`, one of a sequence and head for each: [threads, tokens or chunks, ...].
        """
        call, dtype = self._call, TORCH[buffer.dtype]
        size = {"K": call.K, "V": call.V, "C": self._chunk}
        times = "T" in buffer.shape
        channels = tuple(size[n] for n in buffer.shape[buffer.shape.index("HV") + 1 :])
        if threads is not None:
            longest = self._longest if times else -(-self._longest // self._chunk)
            return empty(threads, longest, *channels, dtype=dtype)
        rows = call.B * call.T if times else len(self._chunks)
        return empty(rows, call.HV, *channels, dtype=dtype)

    def _argument(
        self, parameter: Parameter, starts: Mapping[str, Tensor | None], ends: dict[str, Tensor]
    ) -> Tensor | None:
        """The tensor of a parameter; None for a buffer of which each thread has its own."""
        role, of = parameter.role, parameter.of
        if isinstance(of, BufferId):
            return self.buffers.get(of)
        if role is Role.OPERAND:
            return self._operands[of]
        call = self._call
        (state,) = (s for s in call.step.states if s.name == of.removeprefix(GRADIENT))
        shape = call.state_shape(state)
        if role is Role.FINAL:
            ends[of] = empty(*shape)
            return ends[of]
        given = starts[of]
        return empty(0, *shape[1:]) if given is None else given.float().contiguous()

    def gradient(self, name: str) -> Tensor:
        """The gradient of an operand in its own shape and dtype."""
        call = self._call
        g = self.buffers.get(gradient(name))
        return own_gradient(g, call.operands[name], call.HV, per_head=name in self._per_head)


@lru_cache(maxsize=64)
def _tables(B: int, T: int, bounds: tuple[int, ...] | None, chunk: int) -> tuple[Tensor, Tensor]:
    """The tables of sequences and of chunks (codegen/tir/kernel.py)."""
    if bounds is None:
        starts = [(b, 0, T, b * T) for b in range(B)]
    else:
        starts = [(0, a, b - a, a) for a, b in pairwise(bounds)]
    sequences: list[tuple[int, ...]] = []
    chunks: list[tuple[int, int]] = []
    for n, (batch, first, length, flat) in enumerate(starts):
        sequences.append((batch, first, length, flat, len(chunks)))
        chunks += [(n, c) for c in range(-(-length // chunk))]
    return (
        torch.tensor(sequences, dtype=torch.int64, device="cpu").reshape(-1, 5),
        torch.tensor(chunks, dtype=torch.int64, device="cpu").reshape(-1, 2),
    )
