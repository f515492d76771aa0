"""The TVM engine: TileIR as machine code for a CPU, on the operands as they lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...codegen.buffers import BufferId
from ...codegen.config import Dims
from ...codegen.interface import Buffer, Role
from ...codegen.plan import Loop, Program
from ...codegen.programs import backward_program, forward_program
from ...codegen.tir.config import TvmConfig, default_config, spread, token_config
from ...codegen.tir.kernel import TirKernel, print_tir
from ...codegen.token import token_kernel
from ...dsl.normal_form import NormalForm
from ...dsl.step import Step
from ..call import Call
from ..engine import Execute, Feed, KernelEngine, Task, chunk_refusal
from ..engines import EngineName
from ..prepared import Values, Way
from ..printed import (
    TORCH,
    Dtypes,
    dtypes_of,
    printed_token_refusal,
    signature_of,
    unsupported_dtype,
)
from ..tuned.artifact import Configuration
from ..tuned.selection import call_size_of, select_config
from .allocator import LARGE_BLOCK, empty, in_large_pages, keep_freed_memory
from .build import Function, functions, host_cpu, lanes_of
from .pool import PooledTokens
from .threads import SHARED, Room, Work, run

Stage: TypeAlias = tuple[tuple[TirKernel, Function], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Compiled:
    """One direction, compiled: stages of kernels in order (codegen/plan.py)."""

    config: TvmConfig
    stages: tuple[Stage, ...]


class _Tvm(KernelEngine):
    """Machine code for this CPU, by TVM."""

    name = EngineName.TVM

    def refusal(self, call: Call) -> str | None:
        why = self.device_refusal(call) or unsupported_dtype(dtypes_of(call))
        return why or chunk_refusal(call.form)

    def device_refusal(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"its code runs on a CPU, and the operands are on {call.device}"
        return None

    def token_refusal(self, call: Call) -> str | None:
        strided = call.pool is not None and any(x.stride(-1) != 1 for x in call.pool.states)
        if strided:
            return "the last axis of a pool has to be contiguous: S.contiguous(), [slots,HV,K,V]"
        return self.device_refusal(call) or printed_token_refusal(call)

    def compile(self, task: Task, config: Configuration | None, segment: int | None) -> Execute:
        call, dims = task.call, Dims(task.call.K, task.call.V)
        if task.way is Way.POOL:
            assert call.pool is not None
            states = zip(task.pools, call.pool.states, strict=True)
            dtypes = (*dtypes_of(task.rows), *((name, x.dtype) for name, x in states))
            made = compiled_token(call.step, dims, call.dtype, dtypes, one_token=True, pooled=True)
            (((kernel, function),),) = made.stages
            return PooledTokens(task, kernel, function)
        if task.way is Way.TOKENS:
            made = compiled_token(
                call.step, dims, call.dtype, dtypes_of(task.rows), one_token=task.one_token
            )
            return _Token(task, made).run if task.one_token else _Run(task, made)
        config = config or served(call)
        assert isinstance(config, TvmConfig)
        backward = task.way is Way.BACKWARD
        return _Run(task, compiled(call.form, dims, call.dtype, dtypes_of(call), config, backward))


ENGINE = _Tvm()


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

    return select_config(TvmConfig, ENGINE.key(call), call_size_of(call), configuration, fewer)


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
    signature = signature_of(dims, dtype, dtypes)
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
    step: Step,
    dims: Dims,
    dtype: torch.dtype,
    dtypes: Dtypes,
    *,
    one_token: bool = False,
    pooled: bool = False,
) -> _Compiled:
    """The kernel that takes a token at a time, or (`one_token`) one in all."""
    keep_freed_memory()
    config = token_config(lanes_of(host_cpu()))
    kernel = print_tir(
        token_kernel(step, pooled=pooled),
        signature_of(dims, dtype, dtypes),
        config,
        one_token=one_token,
    )
    (function,) = functions([kernel], host_cpu())
    return _Compiled(config, (((kernel, function),),))


class _Kernel(NamedTuple):
    """A kernel of a task, its tensors by their numbers among those of a call.

    Attributes:
        own: arguments of which each thread has its own: position, number among the stage's.
        each: work items of the kernel in one of the stage's.
    """

    function: Function
    tensors: list[int | None]
    own: list[tuple[int, int]]
    params: list[int]
    each: int


class _New(NamedTuple):
    """A buffer that is new in each call: a row per token or per chunk, with these axes."""

    by_token: bool
    axes: list[int]
    dtype: torch.dtype


class _Stage(NamedTuple):
    """Kernels that all run for one sequence and head before they run for the next.

    Attributes:
        ends: shapes and dtypes of the carries' last values.
        new: the buffers that these kernels write first.
        passed: the buffers that only they read; each thread has its own.
        parallel: whether a work item is a chunk; else it is a sequence.
        parts: work items along the value axis.
        scratch: float32 numbers of scratch memory that a thread needs.
    """

    kernels: list[_Kernel]
    ends: list[tuple[tuple[int, ...], torch.dtype]]
    new: list[_New]
    passed: list[_New]
    parallel: bool
    parts: int
    scratch: int


class _Run:
    """The kernels of a task, ready to run: which of its tensors each of them takes."""

    def __init__(self, task: Task, compiled: _Compiled) -> None:
        self._task, self._chunk = task, compiled.config.chunk
        rows = self._rows = task.rows
        self._threads = torch.get_num_threads()  # records are of so many
        self._feeds: list[tuple[int, Callable[[Any], Tensor] | None]] = []
        number: dict[tuple[Role, BufferId | str], int] = {}
        for role, feeds in ((Role.OPERAND, _operands(task)), (Role.INITIAL, _starts(task))):
            for name, feed in feeds.items():
                number[role, name] = len(number)
                self._feeds.append((feed.at, feed.make))
        self._stages = [self._numbered(stage, number) for stage in compiled.stages]
        results = {str(of): n for (role, of), n in number.items() if role in _RESULTS}
        self._results = [results.get(name) for name in task.results]
        outputs = {} if task.way is Way.BACKWARD else rows.output_shapes
        self._outputs = tuple(outputs.values())
        self._tables = None if task.cu_seqlens else _tables(rows.B, rows.T, None, self._chunk)

    def _numbered(self, stage: Stage, number: dict[tuple[Role, BufferId | str], int]) -> _Stage:
        ends, new, passed = [], [], {}
        for p in (p for k, _ in stage for p in k.parameters if p.role is Role.FINAL):
            number[p.role, p.of] = len(number)
            ends.append((self._task.carry_shape(str(p.of)), torch.float32))
        for kernel, _ in stage:
            for b in kernel.stores:
                if b.name in kernel.private:
                    passed[b.name] = self._new(b)
                elif (Role.BUFFER, b.name) not in number:
                    number[Role.BUFFER, b.name] = len(number)
                    new.append(self._new(b, self._rows.HV))
        parts = math.gcd(*(kernel.v_programs for kernel, _ in stage))
        kernels = []
        for kernel, function in stage:
            of = [(p.role, p.of) for p in kernel.parameters]
            own = [(n, list(passed).index(b)) for n, (_, b) in enumerate(of) if b in passed]
            params = [self._task.params[name] for name in kernel.numbers]
            each = kernel.v_programs // parts
            kernels.append(_Kernel(function, [number.get(x) for x in of], own, params, each))
        return _Stage(
            kernels,
            ends,
            new,
            list(passed.values()),
            stage[0][0].loop is Loop.PARALLEL,
            parts,
            max(kernel.scratch for kernel, _ in stage),
        )

    def _new(self, b: Buffer, *heads: int) -> _New:
        size = {"K": self._rows.K, "V": self._rows.V, "C": self._chunk}
        channels = [size[n] for n in b.shape[b.shape.index("HV") + 1 :]]
        return _New("T" in b.shape, [*heads, *channels], TORCH[b.dtype])

    def __call__(self, values: Values) -> list[Tensor | None]:
        """The task's results; last values of carries are float32."""
        rows, threads, heads = self._rows, self._threads, self._rows.HV
        given: list[Tensor] = [
            values[at] if make is None else make(values[at]) for at, make in self._feeds
        ]
        sequences, chunks, longest = self._tables or self._packed(values)
        tokens, pieces = rows.B * rows.T, -(-longest // self._chunk)
        for stage in self._stages:
            wanted = list(stage.ends)
            for by_token, axes, dtype in stage.new:
                wanted.append(((tokens if by_token else len(chunks), *axes), dtype))
            for by_token, axes, dtype in stage.passed:
                wanted.append(((threads, longest if by_token else pieces, *axes), dtype))
            wanted.append(((threads, stage.scratch), torch.float32))
            made = [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in wanted]
            for x in made:
                if x.nbytes >= LARGE_BLOCK:
                    in_large_pages(x)
            kept = len(stage.ends) + len(stage.new)
            given += made[:kept]
            *passed, scratch = made[kept:]
            works = []
            for k in stage.kernels:
                tensors = [None if n is None else given[n] for n in k.tensors]
                own = {at: passed[n] for at, n in k.own}
                own[len(tensors) + 2] = scratch
                numbers = [values[at] for at in k.params]
                arguments = (*tensors, sequences, chunks, None, heads, *numbers)
                works.append(Work(k.function, arguments, own, k.each))
            table = chunks if stage.parallel else sequences
            run(works, len(table) * heads * stage.parts, threads)
        results: list[Any] = [None if n is None else given[n] for n in self._results]
        for n, shape in enumerate(self._outputs):
            results[n] = results[n].view(shape)
        return results

    def _packed(self, values: Values) -> tuple[Tensor, Tensor, int]:
        bounds = self._task.cu_seqlens
        assert bounds is not None
        assert bounds.make is not None
        contents = tuple(bounds.make(values[bounds.at]).tolist())
        return _tables(self._rows.B, self._rows.T, contents, self._chunk)


_RESULTS = (Role.BUFFER, Role.FINAL)


class _Token:
    """The kernel of single tokens, whose tensors have no time axis."""

    def __init__(self, task: Task, compiled: _Compiled) -> None:
        (((kernel, function),),) = compiled.stages
        call = task.call
        feeds, starts = _operands(task), _starts(task)
        states = [s.name for s in call.step.states]
        outputs = call.output_shapes
        self._outputs = tuple(enumerate(outputs.values())) if task.time else ()
        self._new = [empty(B, *rest, dtype=call.dtype) for B, _, *rest in outputs.values()]
        results = [*outputs, *states]
        self._new += [empty(*call.state_shape(s)) for s in call.step.states]
        self._function, self._scratch = function, kernel.scratch
        self._room = Room(kernel.scratch)
        self._items = call.N * call.HV * kernel.v_programs
        sequences, chunks, _ = _tables(call.B, 1, None, 1)
        self._fixed = (sequences, chunks, call.HV, 0, self._items)
        # the function's arguments are taken from these: results, scratch, the tables and numbers
        # that are fixed, tensors made of values, values
        every = [*feeds.values(), *starts.values()]
        self._made = [(f.at, f.make) for f in every if f.make is not None]
        room = len(results)
        values = room + 1 + len(self._fixed) + len(self._made)
        made = iter(range(values - len(self._made), values))
        places = {
            name: values + f.at if f.make is None else next(made)
            for name, f in (*feeds.items(), *starts.items())
        }
        taken = []
        for p in kernel.parameters:
            own = p.role in _RESULTS
            taken.append(results.index(str(p.of)) if own else places[str(p.of)])
        self._scratch_at = len(taken) + 2
        taken += [room + 1, room + 2, room, room + 3]
        taken += [values + task.params[n] for n in kernel.numbers]
        self._take = itemgetter(*taken, room + 4, room + 5)
        numbers = sum(math.prod(call.state_shape(s)) for s in call.step.states)
        self._alone = self._items == 1 or numbers < SHARED

    def run(self, values: Values) -> list[Tensor]:
        """The output and new states."""
        made = [*map(torch.empty_like, self._new)]
        fed = [make(values[at]) for at, make in self._made] if self._made else ()
        arguments = self._take((*made, self._room.tensor, *self._fixed, *fed, *values))
        if self._alone:
            self._function(*arguments)
        else:
            threads = torch.get_num_threads()
            own = {self._scratch_at: empty(threads, self._scratch)}
            run([Work(self._function, arguments[:-2], own)], self._items, threads)
        for n, shape in self._outputs:
            made[n] = made[n].view(shape)
        return made


def _operands(task: Task) -> dict[str, Feed]:
    """Operands; of single tokens without a time axis."""
    if not task.one_token:
        return task.operands
    feeds = {}
    for name, feed in task.operands.items():
        if name not in task.per_head:
            assert feed.like is not None
            after = feed.then(lambda x: x.select(1, 0))
            feed = after if task.time else replace(feed, like=after.like)
        feeds[name] = feed
    return feeds


def _starts(task: Task) -> dict[str, Feed]:
    """First values of carries, in float32: of chunks an empty tensor says zero."""
    feeds = {}
    for name, feed in task.starts.items():
        shape = task.carry_shape(name)
        if feed.like is not None:
            if feed.like.dtype is not torch.float32:
                feed = feed.then(Tensor.float)
            feeds[name] = feed.dense()
        elif task.one_token:
            feeds[name] = replace(feed, make=partial(_zeros, shape))
        else:
            feeds[name] = replace(feed, make=partial(_nothing, empty(0, *shape[1:])))
    return feeds


def _zeros(shape: tuple[int, ...], _: None) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _nothing(zero: Tensor, _: None) -> Tensor:
    return zero


@lru_cache(maxsize=64)
def _tables(
    B: int, T: int, bounds: tuple[int, ...] | None, chunk: int
) -> tuple[Tensor, Tensor, int]:
    """The tables of sequences and of chunks (codegen/tir/kernel.py); the longest sequence."""
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
        max((length for _, _, length, _ in starts), default=0),
    )
