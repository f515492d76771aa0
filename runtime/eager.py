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
        return _Run(task, config.chunk, _kernels(task.call.form, task.way))

    def _serving(self, task: Task) -> EagerConfig:
        """The chunk that was tuned, else 64; no longer than sequences of rows need."""
        key, size = self.key(task.call), call_size_of(task.call)
        config = select_config(EagerConfig, key, size, lambda: EagerConfig(_LONGEST_CHUNK))
        return EagerConfig(min(config.chunk, padded(task.rows.T, 1)))


ENGINE = _Eager()


@lru_cache(maxsize=512)
def _kernels(form: NormalForm, way: Way) -> tuple[_Compiled, ...]:
    program = backward_program if way is Way.BACKWARD else forward_program
    return _compile(program(form, Plan(Hoist.ALL)))


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

    `at`: slots by number, `[chunks, C]`; `valid`: whether slots have a token, `[N, chunks*C]` of a
    packed batch, `[chunks*C]` of others; `rows`: the same as kernels take it, `[N*HV, chunks, C]`;
    `flat`: of a packed batch, the token of each slot (T: none), `[N, chunks*C]`.
    """

    at: Tensor
    valid: Tensor
    rows: Tensor
    flat: Tensor | None = None


def _slots(call: Call, chunk: int, cu_seqlens: Tensor | None) -> _Slots:
    """Those of calls; a packed batch is read on the host here."""
    lengths: Tensor | int = call.T
    longest, flat = call.T, None
    if cu_seqlens is not None:
        cu = cu_seqlens.to(torch.int64)
        lengths = cu.diff()[:, None]
        longest = int(lengths.max()) if call.N else 0
    slots = -(-longest // chunk) * chunk
    at = torch.arange(slots, dtype=torch.int64, device=call.device)
    valid = at < lengths
    rows = valid.reshape(-1, 1, slots // chunk, chunk).expand(call.N, call.HV, -1, -1)
    rows = rows.reshape(call.N * call.HV, -1, chunk)
    if cu_seqlens is not None:
        flat = torch.where(valid, cu[:-1, None] + at, call.T)
    return _Slots(at.reshape(-1, chunk), valid, rows, flat)


class _Kernel(NamedTuple):
    """A kernel of a task: as compiled, and with shapes for the axes of its results."""

    compiled: _Compiled
    stores: list[tuple[str, tuple[int, ...]]]
    ends: list[tuple[str, tuple[int, ...]]]
    context: tuple[int, int, torch.dtype]  # arguments behind tiles and rows


class _Run:
    """The kernels of a task, ready to run: which of its tensors each of them takes."""

    def __init__(self, task: Task, chunk: int, kernels: tuple[_Compiled, ...]) -> None:
        self._task, self._chunk = task, chunk
        call = self._call = task.rows
        self._rows = call.N * call.HV
        self._dtype = call.state_dtype
        self._kernels = [self._kernel(k) for k in kernels]
        feeds = [(name, f.at, f.make) for name, f in task.operands.items()]
        self._tokens = [x for x in feeds if x[0] not in task.per_head]
        self._heads = [x for x in feeds if x[0] in task.per_head]
        self._starts = []
        for name, f in task.starts.items():
            shape = (self._rows, *task.carry_shape(name)[2:])
            self._starts.append((name, None if f.like is None else f.at, shape))

    def _kernel(self, compiled: _Compiled) -> _Kernel:
        dims = held(Dims(self._call.K, self._call.V), transposed=compiled.transposed)
        size = {Axis.I: self._chunk, Axis.J: self._chunk, Axis.K: dims.K, Axis.V: dims.V}
        stores, ends = (
            [(name, tuple(size[a] for a in axes)) for name, axes in named]
            for named in (compiled.stores, compiled.ends)
        )
        return _Kernel(compiled, stores, ends, (dims.K, dims.V, self._dtype))

    def __call__(self, values: Values) -> list[Tensor | None]:
        """The task's results."""
        call, dtype, device = self._call, self._dtype, self._call.device
        bounds = self._task.cu_seqlens
        cu_seqlens = (
            None if bounds is None or bounds.make is None else bounds.make(values[bounds.at])
        )
        slots = _slots(call, self._chunk, cu_seqlens)
        found: dict[str, Tensor] = {}
        for name, at in self._task.params.items():
            found[name] = torch.full((), values[at], dtype=dtype, device=device)
        for name, at, make in self._heads:
            x = values[at] if make is None else make(values[at])
            found[name] = x.to(dtype).repeat((call.N, *[1] * (x.ndim - 1)))
        chunks, length = len(slots.at), slots.at.numel()
        for name, at, make in self._tokens:
            # [B,T,heads,...] as [N*HV, chunks, C, ...]; each head repeated for its value heads
            x = (values[at] if make is None else make(values[at])).to(dtype)
            if slots.flat is not None:  # behind the last token one of zeros
                x = F.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1))[slots.flat]
            x = x.movedim(2, 1)
            if x.shape[2] < length:
                x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, length - x.shape[2]))
            if x.shape[1] < call.HV:
                x = x.repeat_interleave(call.HV // x.shape[1], 1)
            found[name] = x.reshape(self._rows, chunks, self._chunk, *x.shape[3:])
        starts: dict[str, Tensor] = {}
        for name, place, shape in self._starts:
            if place is None:
                starts[name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                starts[name] = values[place].to(dtype).reshape(shape)
        ends = dict(starts)
        for kernel in self._kernels:
            compiled = kernel.compiled
            if compiled.loop is Loop.PARALLEL:
                given = [
                    found[key][:, None] if op is TileOp.HEAD else found[key]
                    for key, op in compiled.arguments
                ]
                results = compiled.run(*given, slots.rows, slots.at, *kernel.context)
                for (buffer, shape), y in zip(kernel.stores, results, strict=True):
                    found[buffer] = self._filled(y, (self._rows, chunks, *shape))
            else:
                ends |= self._scan(kernel, found, starts, slots)
        return [self._result(name, found, ends, slots) for name in self._task.results]

    def _scan(
        self,
        kernel: _Kernel,
        found: dict[str, Tensor],
        starts: dict[str, Tensor],
        slots: _Slots,
    ) -> dict[str, Tensor]:
        """Run a scan from `starts`, of all carries: `found` has what it stores then; its ends."""
        compiled, stored, carried = kernel.compiled, kernel.stores, kernel.ends
        shapes = [(self._rows, *shape) for _, shape in (*stored, *carried)]
        carry = {name: _turned(compiled, starts[name]) for name, _ in carried}
        series: list[list[Tensor]] = [[] for _ in stored]
        rows, at = slots.rows.unbind(1), slots.at.unbind(0)
        same = (TileOp.HEAD, TileOp.PARAM)  # for all chunks
        columns = [
            None
            if op is TileOp.CARRY
            else [found[key]] * len(at)
            if op in same
            else found[key].unbind(1)
            for key, op in compiled.arguments
        ]
        steps = range(len(at))
        for n in steps if compiled.loop is Loop.FORWARD else reversed(steps):
            given = [
                carry[key] if column is None else column[n]
                for (key, _), column in zip(compiled.arguments, columns, strict=True)
            ]
            results = compiled.run(*given, rows[n], at[n], *kernel.context)
            full = [self._filled(y, shape) for y, shape in zip(results, shapes, strict=True)]
            for own, y in zip(series, full, strict=False):
                own.append(y)
            carry = {name: y for (name, _), y in zip(carried, full[len(stored) :], strict=True)}
        for (buffer, shape), own in zip(stored, series, strict=True):
            ordered = own if compiled.loop is Loop.FORWARD else own[::-1]
            # of no chunks there is nothing to stack
            empty = (self._rows, 0, *shape)
            found[buffer] = torch.stack(ordered, 1) if ordered else self._filled(0.0, empty)
        return {name: _turned(compiled, x) for name, x in carry.items()}

    def _filled(self, x: Tensor | float, shape: tuple[int, ...]) -> Tensor:
        """A kernel's result in full; a view where it is constant."""
        if not isinstance(x, Tensor):
            x = torch.full((), x, dtype=self._dtype, device=self._call.device)
        return x if x.shape == shape else x.expand(shape)

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
        if name.removeprefix(GRADIENT) in self._task.per_head:
            channels = call.operands[name.removeprefix(GRADIENT)].shape[1:]
            return x.reshape(call.N, call.HV, -1, *channels).sum((0, 2))[None]
        return self._tokens_back(
            x, slots, call.dtype if name in call.output_shapes else self._dtype
        )

    def _tokens_back(self, x: Tensor, slots: _Slots, dtype: torch.dtype) -> Tensor:
        """[N*HV, chunks, C, ...] as [B,T,HV,...], a tensor of its own."""
        call = self._call
        x = x.reshape(call.N, call.HV, -1, *x.shape[3:]).movedim(1, 2)
        if slots.flat is None:
            x = x[:, : call.T]
            return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        flat = x.new_zeros(call.T, *x.shape[2:], dtype=dtype)
        flat[slots.flat[slots.valid]] = x[slots.valid].to(dtype)
        return flat[None]


def _turned(kernel: _Compiled, state: Tensor) -> Tensor:
    """A state between the call's layout and that of a kernel."""
    return state.mT if kernel.transposed else state
