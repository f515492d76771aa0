"""The eager engine: the derived chunkwise form in torch ops, on any device and in any float dtype.

Computes in float32 (float64 for float64 operands). Sequences are laid out in padded chunks,
[sequence x value head, chunk, token, channel]; the printed kernels do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codegen.config import Dims, EagerConfig, held, padded
from ..codegen.differentiate import GRADIENT
from ..codegen.eager import library as eager_library
from ..codegen.eager.kernel import print_eager
from ..codegen.plan import Hoist, Loop, Plan, Program
from ..codegen.programs import backward_program, forward_program
from ..codegen.tile import Axes, Axis, TileOp
from ..dsl.normal_form import NormalForm
from . import reference
from .call import Call
from .engine import Execute, KernelEngine, Task, chunk_refusal
from .engines import EngineName
from .prepared import Request, Run, Values, Way
from .tuned.artifact import Configuration
from .tuned.selection import call_size_of, select_config

_LONGEST_CHUNK = 64  # where nothing was tuned


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A printed kernel, ready to run.

    `transposed`: it holds states transposed. `arguments`: the name of each, and what it is (None: a
    buffer). `stores`, `ends`: the names and axes of its results, buffers and then carries.
    """

    loop: Loop
    transposed: bool
    run: Callable[..., tuple[Tensor | float, ...]]
    arguments: tuple[tuple[str, TileOp | None], ...]
    stores: tuple[tuple[str, Axes], ...]
    ends: tuple[tuple[str, Axes], ...]


class _Eager(KernelEngine):
    """The chunk form in torch operations."""

    name = EngineName.EAGER
    has_steps = False

    def refusal(self, call: Call) -> str | None:
        return chunk_refusal(call.form)

    def token_refusal(self, call: Call) -> str | None:
        return "it has no kernels of single tokens"

    def prepare(self, request: Request) -> Run:
        if request.way in (Way.TOKENS, Way.POOL):  # short sequences take the reference's token loop
            return reference.ENGINE.prepare(request)
        return super().prepare(request)

    def compile(self, task: Task, config: Configuration | None, segment: int | None) -> Execute:
        if config is None:
            config = self._serving(task)
        assert isinstance(config, EagerConfig)
        kernels = _backward_kernels if task.way is Way.BACKWARD else _forward_kernels
        return _Run(task, config.chunk, kernels(task.call.form))

    def _serving(self, task: Task) -> EagerConfig:
        """The chunk that was tuned, else 64; no longer than sequences of rows need."""
        key, size = self.key(task.call), call_size_of(task.call)
        config = select_config(EagerConfig, key, size, lambda: EagerConfig(_LONGEST_CHUNK))
        return EagerConfig(min(config.chunk, padded(task.rows.T, 1)))


ENGINE = _Eager()


@lru_cache(maxsize=256)
def _forward_kernels(form: NormalForm) -> tuple[_Compiled, ...]:
    return _compile(forward_program(form, Plan(Hoist.ALL)))


@lru_cache(maxsize=256)
def _backward_kernels(form: NormalForm) -> tuple[_Compiled, ...]:
    return _compile(backward_program(form, Plan(Hoist.ALL)))


def _compile(program: Program) -> tuple[_Compiled, ...]:
    compiled = []
    for kernel in program.kernels:
        printed = print_eager(kernel)
        namespace: dict[str, object] = {
            name: getattr(eager_library, name)
            for name in vars(eager_library)
            if not name.startswith("_")
        }
        namespace |= {"torch": torch, "F": F}
        exec(compile(printed.source, f"<chunkwise eager {kernel.name}>", "exec"), namespace)
        run = namespace[kernel.name]
        assert callable(run)
        buffers = kernel.buffers
        arguments = tuple(
            (str(buffers[t]), None) if t in buffers else (str(t.attrs[0]), t.op)
            for _, t in printed.arguments
        )
        stores = tuple((str(name), t.axes) for name, t in printed.stores)
        ends = tuple((name, t.axes) for name, t in printed.ends)
        compiled.append(_Compiled(kernel.loop, kernel.transposed, run, arguments, stores, ends))
    return tuple(compiled)


class _Slots(NamedTuple):
    """Where the tokens of sequences lie in padded chunks.

    `flat`: of each slot the flat token (B*T: none), `[N, chunks*C]`; `valid`: whether it has one;
    `rows`: the same as kernels take it, `[N*HV, chunks, C]`; `at`: `[chunks, C]`, slots numbered.
    """

    flat: Tensor
    valid: Tensor
    rows: Tensor
    at: Tensor


def _slots(call: Call, chunk: int, cu_seqlens: Tensor | None) -> _Slots:
    """Those of calls; a packed batch is read on the host here."""
    device = call.device
    if cu_seqlens is None:
        starts = torch.arange(call.N, dtype=torch.int64, device=device) * call.T
        lengths = torch.full((call.N,), call.T, dtype=torch.int64, device=device)
        longest = call.T
    else:
        cu = cu_seqlens.to(torch.int64)
        starts, lengths = cu[:-1], cu.diff()
        longest = int(lengths.max()) if call.N else 0
    slots = -(-longest // chunk) * chunk
    offset = torch.arange(slots, dtype=torch.int64, device=device)
    valid = offset[None, :] < lengths[:, None]
    index = torch.where(valid, starts[:, None] + offset[None, :], call.B * call.T)
    rows = valid.reshape(call.N, 1, -1, chunk).expand(-1, call.HV, -1, -1)
    return _Slots(
        index, valid, rows.reshape(call.N * call.HV, -1, chunk), offset.reshape(-1, chunk)
    )


class _Run:
    """The kernels of a task, ready to run: which of its tensors each of them takes."""

    def __init__(self, task: Task, chunk: int, kernels: tuple[_Compiled, ...]) -> None:
        self._task, self._chunk, self._kernels = task, chunk, kernels
        call = self._call = task.rows
        self._dtype = call.state_dtype
        dims = Dims(call.K, call.V)
        self._dims = [held(dims, transposed=transposed) for transposed in (False, True)]
        feeds = [(name, f.at, f.make) for name, f in task.operands.items()]
        self._tokens = [x for x in feeds if x[0] not in task.per_head]
        self._heads = [x for x in feeds if x[0] in task.per_head]
        self._starts = []
        for name, f in task.starts.items():
            shape = (call.N * call.HV, *task.carry_shape(name)[2:])
            self._starts.append((name, None if f.like is None else f.at, shape))

    def __call__(self, values: Values) -> list[Tensor | None]:
        """The task's results."""
        call, chunk, dtype, device = self._call, self._chunk, self._dtype, self._call.device
        bounds = self._task.cu_seqlens
        cu_seqlens = (
            None if bounds is None or bounds.make is None else bounds.make(values[bounds.at])
        )
        slots = _slots(call, chunk, cu_seqlens)
        chunks = slots.at.shape[0]
        found: dict[str, Tensor] = {}
        for name, at in self._task.params.items():
            found[name] = torch.full((), values[at], dtype=dtype, device=device)
        for name, at, make in self._heads:
            x = values[at] if make is None else make(values[at])
            found[name] = x.to(dtype).repeat((call.N, *[1] * (x.ndim - 1)))
        for name, at, make in self._tokens:
            # [B,T,heads,...] as [N*HV, chunks, C, ...]; each head repeated for its value heads
            x = values[at] if make is None else make(values[at])
            flat = x.to(dtype).reshape(call.B * call.T, *x.shape[2:])
            flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
            laid = flat[slots.flat].movedim(2, 1).repeat_interleave(call.HV // x.shape[2], 1)
            found[name] = laid.reshape(call.N * call.HV, chunks, chunk, *x.shape[3:])
        starts: dict[str, Tensor] = {}
        for name, place, shape in self._starts:
            if place is None:
                starts[name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                starts[name] = values[place].to(dtype).reshape(shape)
        ends = dict(starts)
        for kernel in self._kernels:
            if kernel.loop is Loop.PARALLEL:
                given = [
                    found[key][:, None] if op is TileOp.HEAD else found[key]
                    for key, op in kernel.arguments
                ]
                results = kernel.run(*given, slots.rows, slots.at, *self._context(kernel))
                for (buffer, axes), y in zip(kernel.stores, results, strict=True):
                    found[buffer] = self._filled(kernel, y, axes, chunks)
            else:
                ends |= self._scan(kernel, found, starts, slots)
        return [self._result(name, found, ends, slots) for name in self._task.results]

    def _scan(
        self,
        kernel: _Compiled,
        found: dict[str, Tensor],
        starts: dict[str, Tensor],
        slots: _Slots,
    ) -> dict[str, Tensor]:
        """Run a scan from `starts`, of all carries: `found` has what it stores then; its ends."""
        stored, carried = kernel.stores, kernel.ends
        layouts = [axes for _, axes in (*stored, *carried)]
        carry = {name: _turned(kernel, starts[name]) for name, _ in carried}
        series: list[list[Tensor]] = [[] for _ in stored]
        steps = range(slots.at.shape[0])
        for n in steps if kernel.loop is Loop.FORWARD else reversed(steps):
            given = []
            for key, op in kernel.arguments:
                if op is TileOp.CARRY:
                    given.append(carry[key])
                else:
                    x = found[key]
                    given.append(x if op in (TileOp.HEAD, TileOp.PARAM) else x[:, n])
            results = kernel.run(*given, slots.rows[:, n], slots.at[n], *self._context(kernel))
            pairs = zip(layouts, results, strict=True)
            full = [self._filled(kernel, y, axes) for axes, y in pairs]
            for own, y in zip(series, full[: len(stored)], strict=True):
                own.append(y)
            carry = {name: y for (name, _), y in zip(carried, full[len(stored) :], strict=True)}
        for (buffer, axes), own in zip(stored, series, strict=True):
            ordered = own if kernel.loop is Loop.FORWARD else own[::-1]
            # of no chunks there is nothing to stack
            nothing = self._filled(kernel, 0.0, axes, 0)
            found[buffer] = torch.stack(ordered, 1) if ordered else nothing
        return {name: _turned(kernel, x) for name, x in carry.items()}

    def _context(self, kernel: _Compiled) -> tuple[int, int, torch.dtype]:
        """Its arguments behind tiles and rows."""
        dims = self._dims[kernel.transposed]
        return dims.K, dims.V, self._dtype

    def _filled(self, kernel: _Compiled, x: Tensor | float, axes: Axes, *chunks: int) -> Tensor:
        """A kernel's result in full, `[N*HV, *chunks, *axes]`; a view where it is constant."""
        call, dims = self._call, self._dims[kernel.transposed]
        size = {Axis.I: self._chunk, Axis.J: self._chunk, Axis.K: dims.K, Axis.V: dims.V}
        x = torch.as_tensor(x, dtype=self._dtype, device=call.device)
        return x.expand(call.N * call.HV, *chunks, *(size[a] for a in axes))

    def _result(
        self,
        name: str,
        found: Mapping[str, Tensor],
        ends: Mapping[str, Tensor],
        slots: _Slots,
    ) -> Tensor | None:
        call = self._call
        if name in ends:
            end = ends[name]
            return end.reshape(call.N, call.HV, *end.shape[1:]).contiguous()
        x = found.get(name)
        if x is None:
            return None
        if name in call.output_shapes:
            return self._tokens_back(x, slots).to(call.dtype)
        if name.removeprefix(GRADIENT) in self._task.per_head:
            channels = call.operands[name.removeprefix(GRADIENT)].shape[1:]
            return x.reshape(call.N, call.HV, -1, *channels).sum((0, 2))[None]
        return self._tokens_back(x, slots)

    def _tokens_back(self, x: Tensor, slots: _Slots) -> Tensor:
        """[N*HV, chunks, C, ...] as [B,T,HV,...]."""
        call = self._call
        x = x.reshape(call.N, call.HV, -1, *x.shape[3:]).movedim(1, 2)
        flat = x.new_zeros(call.B * call.T, *x.shape[2:])
        flat[slots.flat[slots.valid]] = x[slots.valid]
        return flat.reshape(call.B, call.T, *x.shape[2:])


def _turned(kernel: _Compiled, state: Tensor) -> Tensor:
    """A state between the call's layout and that of a kernel."""
    return state.mT if kernel.transposed else state
