"""Statements other than matrix products: elementwise ones, sums, prefix sums, decays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import tirx

from ...dsl.ir import Op
from ..tile import Axis, Tile, TileOp, Which, summed_axes
from ..tiled import Compute, Use
from .code import Accumulator, Index, broadcast, int32, multiply_add, number, ramp
from .decayed import decayed_apply, decayed_crossing, decayed_dot
from .frame import Frame
from .products import (
    column_blocks,
    compute_matrix,
    horizontal_sum,
    invert,
    solve,
    square_product,
    substitute,
)
from .schedule import Made, Region, Solve, inputs, zero_above
from .values import Values

_SUMS = 8  # vectors that are summed at a time: an addition takes several cycles


def compute(frame: Frame, s: Made) -> None:
    """The statement that fills the region of a value."""
    if isinstance(s, Solve):
        solve(frame, s)
    elif isinstance(s, Compute) and s.value.op in _STATEMENTS:
        _STATEMENTS[s.value.op](frame, s)
    elif len(s.value.axes) == 2:
        compute_matrix(frame, s.value)
    else:
        _vector(frame, s.value)


def _vector(frame: Frame, t: Tile) -> None:
    axis, lanes = (t.axes[0], frame.lanes) if t.axes else (None, 1)
    for point in frame.points(t.axes):
        frame.write(Region(t), point, Values(frame, axis).computed(t, point), lanes)


def _cumsum(frame: Frame, s: Compute) -> None:
    """Row by row; an exclusive sum is stored before its row is added."""
    t = s.value
    reverse, exclusive = t.attrs
    code, chunk = frame.code, frame.shapes.chunk
    along = t.axes[1] if len(t.axes) == 2 else None
    lanes = 1 if along is None else frame.lanes
    (x,) = s.args
    turns = 1 if along is None else frame.shapes.vectors(along)
    with code.loop(0, turns, "c") as c:
        total = code.accumulator(number(0.0, lanes))
        # of a tile that is read below the diagonal only, the vectors from there on
        begin = int32(c) * lanes if t in frame.schedule.half else int32(0)
        with code.loop(begin, int32(chunk), "r") as turn:
            row = int32(chunk - 1) - (turn - begin) if reverse else turn
            point: dict[Axis, Index] = {Axis.I: row}
            if along is not None:
                point[along] = int32(c) * lanes
            value = code.bind("x", Values(frame, along).at(x, point))
            if exclusive:
                frame.write(Region(t), point, total.get(), lanes)
            code.set(total, total.get() + value)
            if not exclusive:
                frame.write(Region(t), point, total.get(), lanes)


def _decay(frame: Frame, s: Compute) -> None:
    """Row by row: each column's sum grows by the row's log-decay below the diagonal."""
    t, (g,) = s.value, s.args
    which, exclusive = t.attrs
    code, lanes = frame.code, frame.lanes
    singles, vectors = Values(frame, None), Values(frame, Axis.J)
    zero = number(0.0, lanes)
    with code.loop(0, frame.shapes.vectors(Axis.J), "c") as c:
        column = int32(c) * lanes
        begin = column if t in frame.schedule.half else int32(0)
        total = code.accumulator(zero)
        with code.loop(begin, int32(frame.shapes.chunk), "r") as r:
            row, columns = broadcast(int32(r), lanes), ramp(column, lanes)
            log = broadcast(singles.at(g, {Axis.I: r}), lanes)
            longer = code.bind("longer", tirx.Select(columns < row, total.get() + log, zero))
            if not exclusive:
                code.set(total, longer)
            keep = columns <= row if which is Which.LOWER else columns < row
            decay = tirx.Select(keep, vectors.exponential(total.get()), zero)
            frame.write(Region(t), {Axis.I: r, Axis.J: column}, decay, lanes)
            if exclusive:
                code.set(total, longer)


def _sum(frame: Frame, s: Compute) -> None:
    (x,) = s.args
    if len(x.axes) == 2 and x.axes[1] not in summed_axes(s.value):
        _sum_of_rows(frame, s.value, x)
    else:
        _sum_along_rows(frame, s.value, x)


def _sum_of_rows(frame: Frame, t: Tile, x: Use) -> None:
    """Over the first axis: vectors along the second, several of them at a time."""
    code, lanes = frame.code, frame.lanes
    row_axis, along = x.axes
    below = zero_above(x.value)
    for columns in column_blocks(frame, along, 1 if below else _SUMS):
        totals = [code.accumulator(number(0.0, lanes)) for _ in columns]
        begin: Index = columns[0] if below else 0
        with code.loop(begin, frame.shapes.extent(row_axis), "r") as r:
            for column, total in zip(columns, totals, strict=True):
                _add(frame, Values(frame, along), x, {row_axis: r, along: column}, total)
        for column, total in zip(columns, totals, strict=True):
            frame.write(Region(t), {along: column}, total.get(), lanes)


def _add(frame: Frame, values: Values, x: Use, point: dict[Axis, Index], to: Accumulator) -> None:
    """Adds `x` at `point`; a product by a multiply-add."""
    t = x.value
    inlined = x.axes == t.axes and t not in frame.schedule.regions
    if inlined and t.is_map(Op.MUL):
        a, b = (values.at(use, point) for use in inputs(frame.schedule.made[t]))
        frame.code.set(to, multiply_add(a, b, to.get()))
    else:
        frame.code.set(to, to.get() + values.at(x, point))


def _sum_along_rows(frame: Frame, t: Tile, x: Use) -> None:
    """Over the last axis, and the first too where `t` has none left."""
    code, lanes = frame.code, frame.lanes
    along = x.axes[-1]
    if t.axes or len(x.axes) == 1:
        rows = x.axes[0] if len(x.axes) == 2 else None
        turns = 1 if rows is None else frame.shapes.extent(rows)
        with code.loop(0, turns, "r") as r:
            at: dict[Axis, Index] = {} if rows is None else {rows: r}
            total = code.accumulator(number(0.0, lanes))
            _add_row(frame, x, at, along, total)
            frame.write(Region(t), at, horizontal_sum(frame, total.get()), 1)
        return
    total = code.accumulator(number(0.0, lanes))
    with code.loop(0, frame.shapes.extent(x.axes[0]), "r") as r:
        _add_row(frame, x, {x.axes[0]: r}, along, total)
    frame.write(Region(t), {}, horizontal_sum(frame, total.get()), 1)


def _add_row(frame: Frame, x: Use, at: dict[Axis, Index], along: Axis, total: Accumulator) -> None:
    """Adds the vectors of one row to `total`; nothing beyond the diagonal, nor the last channel."""
    code, lanes = frame.code, frame.lanes
    extent = frame.shapes.extent(along)
    whole: Index = extent // lanes
    if len(x.axes) == 2 and zero_above(x.value):
        whole = tirx.truncdiv(int32(at[x.axes[0]]), int32(lanes)) + 1
    values = Values(frame, along)
    with code.loop(0, whole, "c") as c:
        _add(frame, values, x, {**at, along: int32(c) * lanes}, total)
    if extent % lanes:
        first = extent - extent % lanes
        value = values.at(x, {**at, along: first})
        inside = ramp(first, lanes) < number(extent, lanes, "int32")
        code.set(total, total.get() + tirx.Select(inside, value, number(0.0, lanes)))


_STATEMENTS: Mapping[TileOp, Callable[[Frame, Compute], None]] = {
    TileOp.INVERSE: invert,
    TileOp.PRODUCT: square_product,
    TileOp.SUBSTITUTE: substitute,
    TileOp.DECAY: _decay,
    TileOp.CUMSUM: _cumsum,
    TileOp.SUM: _sum,
    TileOp.DECAYED_DOT: decayed_dot,
    TileOp.DECAYED_APPLY: decayed_apply,
    TileOp.DECAYED_CROSSING: decayed_crossing,
}
