"""Loads and stores of a TIR kernel: tensors of the call as they lie, rows in and out of scratch.

Parameters are tensors with their strides (1 along channels), and every call checks shapes and
dtypes. A buffer of tokens is [tokens, HV, channels], one of chunks [chunks, HV, channels], states
are [N, HV, K, V] ([N, HV, V, K] if held transposed), all without gaps, but those of a pool have
strides; a private buffer has room for one sequence and head, and no axis HV. Scratch holds float32,
for every dtype of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from tvm import tirx
from tvm.tirx import Buffer, Expr, Var

from ..buffers import BufferId
from ..interface import Buffer as Stored
from ..interface import Parameter, Role, Signature, Storage
from ..tile import TIMES, Axes, Axis, Tile
from ..tiled import Begin, Finish, Load, Source, Store, TiledKernel, Use
from .code import Code, Index, int32, int64, load, number
from .frame import Frame, Rows
from .schedule import Region
from .values import Point, Values

STORAGE = Storage(wide=True, transposed=False)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}  # callers align tensors to no more
_PREFIX = {
    Role.INITIAL: "first_",
    Role.FINAL: "last_",
    Role.POOL: "pool_",
    Role.SLOTS: "slots_",
}


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """The part of a call that an iteration works on: numbers in int64.

    Attributes:
        heads, head: value heads, and the one at work.
        batch: of the operands; `row`: the chunk's first token in it.
        flat: the same among the tokens of all batches; `start`: among the sequence's tokens.
        index: the chunk's number among all chunks; `chunk`: among the sequence's chunks.
        value: the first channel along the value axis.
    """

    heads: Expr
    head: Expr
    batch: Expr
    row: Expr
    flat: Expr
    start: Expr
    index: Expr
    chunk: Expr
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A parameter: as callers see it, and flat, as statements address it."""

    declared: Buffer
    flat: Buffer
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]


@dataclass(slots=True, eq=False)
class Transfers:
    """The tensors of one kernel, gathered as its statements need them.

    `_buffers`: those that it loads or stores; `_private`: those of one sequence and head at a time.
    `_has_time`: whether tensors of tokens have an axis for them; else they hold one token.
    """

    _signature: Signature
    _buffers: Mapping[BufferId, Stored]
    _kernel: TiledKernel
    _entry: Code
    _heads: Expr
    _private: frozenset[BufferId]
    _has_time: bool
    _sizes: dict[Axis, int] = field(init=False)
    tensors: dict[Parameter, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dims = self._kernel.dims
        self._sizes = dict.fromkeys(TIMES, self._kernel.chunk) | {Axis.K: dims.K, Axis.V: dims.V}

    def tensor(
        self,
        role: Role,
        of: BufferId | str,
        shape: tuple[Expr | int | None, ...],
        *,
        dtype: str = "float32",
        strided: int = 0,
    ) -> Tensor:
        """A parameter of that shape, sizes of None being the caller's.

        `strided`: of how many axes the strides are the caller's too; channels lie side by side.
        """
        parameter = Parameter(f"{_PREFIX.get(role, '')}{of}", role, of)
        if parameter in self.tensors:
            return self.tensors[parameter]
        name = "".join(c if c.isalnum() else "_" for c in parameter.name)
        sizes = tuple(
            Var(f"{name}_n{d}", "int64") if n is None else int64(n) if isinstance(n, int) else n
            for d, n in enumerate(shape)
        )
        strides: tuple[Expr, ...] = tuple(Var(f"{name}_s{d}", "int64") for d in range(strided))
        if strided and strided < len(shape):
            strides = (*strides, int64(1))
        declared = tirx.decl_buffer(
            sizes, dtype, name, strides=list(strides), data_alignment=_BYTES[dtype], layout=None
        )
        self.tensors[parameter] = Tensor(declared, self._entry.flat(declared), sizes, strides)
        return self.tensors[parameter]

    # ---- statements ----------------------------------------------------------------------------

    def load(self, frame: Frame, s: Load, work: WorkItem) -> None:
        """Bring a value into scratch; rows beyond the sequence's end become zero."""
        _copy_in(frame, s.value, s.mask, self.source(s, work))

    def store(self, frame: Frame, s: Store, work: WorkItem) -> None:
        """Write a value to its buffer; rows beyond the sequence's end are left alone."""
        rows = self.buffer(s.buffer, s.axes, work)
        with _by_first(frame, work, once=s.once):
            _copy_out(frame, s.use, s.axes, s.mask, rows)

    def begin(self, frame: Frame, s: Begin, work: WorkItem, sequence: Expr) -> None:
        """The initial state, where the call gives one (its tensor is not empty), else zero."""
        state = self.state(Role.INITIAL, s.value, work, sequence)
        given = self._state(Role.INITIAL, s.value).shape[0]
        frame.zero(s.value)
        with frame.code.when(given > int64(0)):
            _copy_in(frame, s.value, s.mask, state)

    def finish(self, frame: Frame, s: Finish, work: WorkItem, sequence: Expr) -> None:
        """The final state."""
        state = self.state(Role.FINAL, s.value, work, sequence)
        with _by_first(frame, work, once=s.once):
            _copy_out(frame, Use(s.value, s.value.axes), s.value.axes, s.mask, state)

    # ---- where they lie ------------------------------------------------------------------------

    def source(self, s: Load, work: WorkItem) -> Rows:
        """Rows of what is loaded."""
        if isinstance(s.of, BufferId):
            return self.buffer(s.of, s.value.axes, work)
        per_head = s.source is Source.HEADS
        return (self._per_head if per_head else self._per_token)(s.of, s.value.axes, work)

    def _channels(self, axes: Axes) -> tuple[int, ...]:
        return tuple(self._sizes[a] for a in axes if a not in TIMES)

    def _per_token(self, name: str, axes: Axes, work: WorkItem) -> Rows:
        outer = 3 if self._has_time else 2  # batches, tokens, heads
        shape = ((None,) * outer) + self._channels(axes)
        dtype = self._signature.of(name).value
        x = self.tensor(Role.OPERAND, name, shape, dtype=dtype, strided=outer)
        per_batch, per_head = x.strides[0], x.strides[outer - 1]
        per_token = x.strides[1] if self._has_time else int64(0)
        head = tirx.truncdiv(work.head, tirx.truncdiv(self._heads, x.shape[outer - 1]))
        first = work.batch * per_batch + work.row * per_token + head * per_head
        return Rows(x.flat, first + _value_offset(axes, work), per_token)

    def _per_head(self, name: str, axes: Axes, work: WorkItem) -> Rows:
        shape = (self._heads, *self._channels(axes))
        dtype = self._signature.of(name).value
        x = self.tensor(Role.OPERAND, name, shape, dtype=dtype, strided=len(shape))
        return Rows(x.flat, work.head * x.strides[0] + _value_offset(axes, work), int64(0))

    def buffer(self, name: BufferId, axes: Axes, work: WorkItem) -> Rows:
        """Rows of a buffer."""
        own = self._buffers[name]
        times, dtype = [a for a in own.axes if a in TIMES][:1], own.dtype.value
        sizes = tuple(self._sizes[a] for a in own.axes if a not in times)
        size = math.prod(sizes)
        if name in self._private:
            x = self.tensor(Role.BUFFER, name, (None, *sizes), dtype=dtype)
            at, between = work.start if times else work.chunk, int64(size)
        else:
            x = self.tensor(Role.BUFFER, name, (None, self._heads, *sizes), dtype=dtype)
            at = (work.flat if times else work.index) * self._heads + work.head
            between = self._heads * size
        stride = between if times else int64(self._sizes[Axis.V])
        return Rows(x.flat, at * size + _value_offset(axes, work), stride)

    def _state(self, role: Role, start: Tile) -> Tensor:
        sizes = self._channels(start.axes)
        lying = sizes[::-1] if self._kernel.transposed else sizes
        if self._kernel.pooled:
            name = str(start.attrs[0])
            shape, dtype = (None, self._heads, *sizes), self._signature.of(name).value
            return self.tensor(Role.POOL, name, shape, dtype=dtype, strided=len(shape) - 1)
        return self.tensor(role, str(start.attrs[0]), (None, self._heads, *lying))

    def slot(self, when: str, sequence: Expr) -> Expr:
        """The slot of a pool that a sequence's state is in, before the token or after it."""
        x = self.tensor(Role.SLOTS, when, (None,), dtype="int64", strided=1)
        return load(x.flat, sequence * x.strides[0], 1)

    def state(self, role: Role, start: Tile, work: WorkItem, sequence: Expr) -> Rows:
        """The first or the last value of a carry; `sequence`: its number, or that of its slot."""
        x = self._state(role, start)
        if self._kernel.pooled:
            place = sequence * x.strides[0] + work.head * x.strides[1]
            return Rows(x.flat, place + _value_offset(start.axes, work), x.strides[2])
        at = sequence * self._heads + work.head
        for n in self._channels(start.axes):
            at = at * n
        if self._kernel.transposed and Axis.V in start.axes:  # a tile's rows are columns in memory
            keys = self._sizes[Axis.K]
            return Rows(x.flat, at + work.value * keys, int64(1), keys)
        first = at + _value_offset(start.axes, work)
        return Rows(x.flat, first, int64(self._sizes[Axis.V]))


def _value_offset(axes: Axes, work: WorkItem) -> Expr:
    return work.value if Axis.V in axes else int64(0)


def _by_first(frame: Frame, work: WorkItem, *, once: bool) -> AbstractContextManager[None]:
    """`once`: by the item of the first part of the value axis alone."""
    return frame.code.when(tirx.EQ(work.value, int64(0))) if once else nullcontext()


def _grid(axes: Axes) -> tuple[Axis | None, Axis | None]:
    """The axes of a tile's rows and of the channels in a row."""
    if len(axes) == 2:
        return axes
    if not axes:
        return None, None
    (axis,) = axes
    return (axis, None) if axis in TIMES else (None, axis)


def _rows(frame: Frame, axes: Axes, mask: Axes, memory: Rows) -> Iterator[tuple[Point, Expr]]:
    """Within the loop over a tile's rows that exist: the row, and where it begins in memory."""
    rows, _ = _grid(axes)
    if rows is None:
        yield {}, memory.first
        return
    end: Index = frame.valid if rows in mask else frame.shapes.extent(rows)
    with frame.code.loop(0, end, "r") as r:
        yield {rows: r}, memory.first + int64(r) * memory.stride


def _vectors(
    frame: Frame, at: Point, along: Axis | None, first: Expr, apart: int
) -> Iterator[tuple[Point, Expr, int]]:
    """Within loops over a row: point, place in memory and lanes of vectors, then of the rest."""
    if along is None:
        yield at, first, 1
        return
    first = frame.code.bind("at", first)
    extent = frame.shapes.extent(along)
    whole, rest = divmod(extent, frame.lanes) if apart == 1 else (0, extent)
    ends = whole * frame.lanes, whole * frame.lanes + rest
    for begin, end, lanes in ((0, whole, frame.lanes), (*ends, 1)):
        if begin < end:
            with frame.code.loop(begin, end, "c") as c:
                yield {**at, along: int32(c) * lanes}, first + int64(c) * (lanes * apart), lanes


def _copy_in(frame: Frame, t: Tile, mask: Axes, source: Rows) -> None:
    rows, columns = _grid(t.axes)
    if rows is not None and columns is None:
        frame.zero(t)
    for at, first in _rows(frame, t.axes, mask, source):
        if columns is not None and frame.shapes.extent(columns) % frame.lanes:
            last: Point = {**at, columns: (frame.shapes.vectors(columns) - 1) * frame.lanes}
            frame.write(Region(t), last, number(0.0, frame.lanes), frame.lanes)
        for point, place, lanes in _vectors(frame, at, columns, first, source.apart):
            frame.write(Region(t), point, load(source.buffer, place, lanes), lanes)
    if rows in mask and rows is not None and columns is not None:
        frame.zero(t, (frame.valid, int32(frame.shapes.extent(rows))))


def _copy_out(frame: Frame, use: Use, axes: Axes, mask: Axes, target: Rows) -> None:
    _, columns = _grid(axes)
    for at, first in _rows(frame, axes, mask, target):
        for point, place, lanes in _vectors(frame, at, columns, first, target.apart):
            along = columns if lanes > 1 else None
            frame.code.store(target.buffer, place, Values(frame, along).at(use, point), lanes)
