"""Loads and stores of a TIR kernel: tensors of the call as they lie, rows in and out of scratch.

Parameters are tensors with their strides (1 along channels), and every call checks shapes and
dtypes. A buffer of tokens is [tokens, HV, channels], one of chunks [chunks, HV, channels], states
are [N, HV, K, V], all without gaps; a private buffer has room for one sequence and head, and no
axis HV. Scratch holds float32, for every dtype of the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx import Buffer, Expr, Var

from ..buffers import BufferId
from ..interface import Parameter, Role, Signature, Storage
from ..interface import buffer as buffer_of
from ..tile import Axis, Tile, TileOp
from .code import Code, Index, int32, int64, load, number
from .frame import Frame, Rows
from .schedule import Region
from .values import Values

STORAGE = Storage(wide=True, transposed=False)
_TIMES = (Axis.I, Axis.J)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # callers align tensors to no more
_PREFIX = {Role.INITIAL: "first_", Role.FINAL: "last_"}


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """The part of a call that an iteration works on: numbers in int64.

    Attributes:
        heads, head: value heads, and the one at work.
        batch: of the operands; `row`: the chunk's first token in it.
        flat: the same among the tokens of all batches; `start`: among the sequence's tokens.
        index: the chunk's number among all chunks; `chunk`: among the sequence's chunks.
        value: the first channel along the value axis; `split`: whether there are several.
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
    split: bool


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A parameter: as callers see it, and flat, as statements address it."""

    declared: Buffer
    flat: Buffer
    shape: tuple[Expr, ...]
    strides: tuple[Expr, ...]


class Transfers:
    """The tensors of one kernel, gathered as its statements need them.

    `private`: buffers of one sequence and head at a time. `has_time`: whether tensors of tokens
    have an axis for them; else they hold one token.
    """

    def __init__(
        self,
        signature: Signature,
        chunk: int,
        entry: Code,
        heads: Expr,
        private: frozenset[BufferId],
        *,
        has_time: bool,
    ) -> None:
        self._signature = signature
        self._private = private
        self._chunk = chunk
        self._has_time = has_time
        self._entry = entry
        self._heads = heads
        self.tensors: dict[Parameter, Tensor] = {}

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

    # ---- leaves and results --------------------------------------------------------------------

    def load(self, frame: Frame, t: Tile, work: WorkItem, buffer: BufferId | None) -> None:
        """Bring a leaf into scratch; rows beyond the sequence's end become zero."""
        _copy_in(frame, t, self.source(t, work, buffer))

    def store(self, frame: Frame, t: Tile, work: WorkItem, buffer: BufferId) -> None:
        """Write a tile to its buffer; rows beyond the sequence's end are left alone."""
        rows = self.buffer(buffer, t, work)
        if work.split and Axis.V not in t.axes:
            with frame.code.when(tirx.EQ(work.value, int64(0))):
                _copy_out(frame, t, rows)
        else:
            _copy_out(frame, t, rows)

    def first_carry(self, frame: Frame, start: Tile, work: WorkItem, sequence: Expr) -> None:
        """The initial state, where the call gives one (its tensor is not empty), else zero."""
        state = self.state(Role.INITIAL, start, work, sequence)
        (given,) = (x.shape[0] for p, x in self.tensors.items() if x.flat.same_as(state.buffer))
        _zero(frame, start)
        with frame.code.when(given > int64(0)):
            _copy_in(frame, start, state)

    def last_carry(self, frame: Frame, start: Tile, work: WorkItem, sequence: Expr) -> None:
        """The final state."""
        state = self.state(Role.FINAL, start, work, sequence)
        if work.split and Axis.V not in start.axes:
            with frame.code.when(tirx.EQ(work.value, int64(0))):
                _copy_out(frame, start, state)
        else:
            _copy_out(frame, start, state)

    # ---- where they lie ------------------------------------------------------------------------

    def source(self, t: Tile, work: WorkItem, buffer: BufferId | None) -> Rows:
        """Rows of a leaf: of a buffer, or of an operand."""
        if buffer is not None:
            return self.buffer(buffer, t, work)
        return self._per_head(t, work) if t.op is TileOp.HEAD else self._per_token(t, work)

    def _channels(self, t: Tile) -> tuple[int, ...]:
        dims = self._signature.dims
        sizes = {Axis.K: dims.K, Axis.V: dims.V}
        return tuple(sizes[a] for a in t.axes if a in sizes)

    def _per_token(self, t: Tile, work: WorkItem) -> Rows:
        name = str(t.attrs[0])
        outer = 3 if self._has_time else 2  # batches, tokens, heads
        shape = ((None,) * outer) + self._channels(t)
        dtype = self._signature.of(name).value
        x = self.tensor(Role.OPERAND, name, shape, dtype=dtype, strided=outer)
        per_batch, per_head = x.strides[0], x.strides[outer - 1]
        per_token = x.strides[1] if self._has_time else int64(0)
        head = tirx.truncdiv(work.head, tirx.truncdiv(self._heads, x.shape[outer - 1]))
        first = work.batch * per_batch + work.row * per_token + head * per_head
        return Rows(x.flat, first + _value_offset(t, work), per_token)

    def _per_head(self, t: Tile, work: WorkItem) -> Rows:
        name = str(t.attrs[0])
        shape = (self._heads, *self._channels(t))
        dtype = self._signature.of(name).value
        x = self.tensor(Role.OPERAND, name, shape, dtype=dtype, strided=len(shape))
        return Rows(x.flat, work.head * x.strides[0] + _value_offset(t, work), int64(0))

    def buffer(self, name: BufferId, t: Tile, work: WorkItem) -> Rows:
        """Rows of a buffer."""
        own = buffer_of(name, t, self._signature, STORAGE)
        times, dtype = "T" in own.shape, own.dtype.value
        size_of = {"C": self._chunk, "K": self._signature.dims.K, "V": self._signature.dims.V}
        sizes = tuple(size_of[n] for n in own.shape[own.shape.index("HV") + 1 :])
        size = math.prod(sizes)
        if name in self._private:
            x = self.tensor(Role.BUFFER, name, (None, *sizes), dtype=dtype)
            at, between = work.start if times else work.chunk, int64(size)
        else:
            x = self.tensor(Role.BUFFER, name, (None, self._heads, *sizes), dtype=dtype)
            at = (work.flat if times else work.index) * self._heads + work.head
            between = self._heads * size
        stride = between if times else int64(self._signature.dims.V)
        return Rows(x.flat, at * size + _value_offset(t, work), stride)

    def state(self, role: Role, start: Tile, work: WorkItem, sequence: Expr) -> Rows:
        """The first or the last value of a carry."""
        sizes = self._channels(start)
        x = self.tensor(role, str(start.attrs[0]), (None, self._heads, *sizes))
        at = sequence * self._heads + work.head
        for n in sizes:
            at = at * n
        return Rows(x.flat, at + _value_offset(start, work), int64(self._signature.dims.V))


def _value_offset(t: Tile, work: WorkItem) -> Expr:
    return work.value if Axis.V in t.axes else int64(0)


def _grid(t: Tile) -> tuple[Axis | None, Axis | None]:
    """The axes of a tile's rows and of the channels in a row."""
    if len(t.axes) == 2:
        return t.axes
    if not t.axes:
        return None, None
    (axis,) = t.axes
    return (axis, None) if axis in _TIMES else (None, axis)


def _zero(frame: Frame, t: Tile) -> None:
    """Zeros everywhere."""
    rows, columns = (t.axes[0] if len(t.axes) == 2 else None), t.axes[-1] if t.axes else None
    turns = 1 if rows is None else frame.shapes.extent(rows)
    with frame.code.loop(0, turns, "r") as r:
        _zero_row(frame, t, {} if rows is None else {rows: r}, columns)


def _zero_row(frame: Frame, t: Tile, at: dict[Axis, Index], columns: Axis | None) -> None:
    if columns is None:
        frame.write(Region(t), at, number(0.0, 1), 1)
        return
    with frame.code.loop(0, frame.shapes.vectors(columns), "c") as c:
        point = {**at, columns: int32(c) * frame.lanes}
        frame.write(Region(t), point, number(0.0, frame.lanes), frame.lanes)


def _copy_in(frame: Frame, t: Tile, source: Rows) -> None:
    code = frame.code
    rows, columns = _grid(t)
    if rows is None:
        _copy_row_in(frame, t, {}, columns, source.buffer, source.first)
        return
    extent = frame.shapes.extent(rows)
    end: Index = frame.valid if rows in _TIMES else extent
    if columns is None:
        _zero(frame, t)
    with code.loop(0, end, "r") as r:
        first = source.first + int64(r) * source.stride
        _copy_row_in(frame, t, {rows: r}, columns, source.buffer, first)
    if rows in _TIMES and columns is not None:
        with code.loop(end, int32(extent), "r") as r:
            _zero_row(frame, t, {rows: r}, columns)


def _copy_row_in(
    frame: Frame,
    t: Tile,
    at: dict[Axis, Index],
    columns: Axis | None,
    buffer: Buffer,
    first: Expr,
) -> None:
    code, lanes = frame.code, frame.lanes
    if columns is None:
        frame.write(Region(t), at, load(buffer, first, 1), 1)
        return
    first = code.bind("at", first)
    whole, rest = divmod(frame.shapes.extent(columns), lanes)
    with code.loop(0, whole, "c") as c:
        point = {**at, columns: int32(c) * lanes}
        value = load(buffer, first + int64(c) * lanes, lanes)
        frame.write(Region(t), point, value, lanes)
    if rest:
        frame.write(Region(t), {**at, columns: whole * lanes}, number(0.0, lanes), lanes)
        with code.loop(whole * lanes, whole * lanes + rest, "c") as c:
            frame.write(Region(t), {**at, columns: c}, load(buffer, first + int64(c), 1), 1)


def _copy_out(frame: Frame, t: Tile, target: Rows) -> None:
    rows, columns = _grid(t)
    if rows is None:
        _copy_row_out(frame, t, {}, columns, target.buffer, target.first)
        return
    end: Index = frame.valid if rows in _TIMES else frame.shapes.extent(rows)
    with frame.code.loop(0, end, "r") as r:
        first = target.first + int64(r) * target.stride
        _copy_row_out(frame, t, {rows: r}, columns, target.buffer, first)


def _copy_row_out(
    frame: Frame,
    t: Tile,
    at: dict[Axis, Index],
    columns: Axis | None,
    buffer: Buffer,
    first: Expr,
) -> None:
    code, lanes = frame.code, frame.lanes
    if columns is None:
        code.store(buffer, first, Values(frame, None).at(t, at), 1)
        return
    first = code.bind("at", first)
    whole, rest = divmod(frame.shapes.extent(columns), lanes)
    with code.loop(0, whole, "c") as c:
        value = Values(frame, columns).at(t, {**at, columns: int32(c) * lanes})
        code.store(buffer, first + int64(c) * lanes, value, lanes)
    if rest:
        with code.loop(whole * lanes, whole * lanes + rest, "c") as c:
            code.store(buffer, first + int64(c), Values(frame, None).at(t, {**at, columns: c}), 1)
