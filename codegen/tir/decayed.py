"""Products under a vector gate: exponents are sums of log-decays between two rows, none above 0.

Blocks on the diagonal are summed pair by pair. The part below is halved: rows of a block's later
half meet columns of its earlier half, both decayed to the last row of the earlier half, and each
such pair of halves is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm import tirx
from tvm.tirx import Expr

from .. import tile
from ..gates import DECAYED, LEAST_DECAY
from ..tile import Axis, Tile, TileOp
from ..tiled import Compute, Use
from .code import Index, broadcast, int32, multiply_add, number, ramp
from .frame import Frame, Shapes
from .products import block_product, column_blocks, horizontal_sum, transpose
from .schedule import ChunkSchedule, Region
from .values import Values


def _rooms(axis: Axis) -> tuple[Tile, Tile]:
    """Of rows of an earlier and of a later half, decayed: scratch that such statements share."""
    return tile.token("early half", (axis,)), tile.token("late half", (axis,))


def rooms(schedule: ChunkSchedule, shapes: Shapes) -> dict[Region, int]:
    """The scratch that such statements need, in numbers: halves, and the decays of each gate."""
    decayed = _computed(schedule)
    found: dict[Region, int] = {}
    for early, late in (_rooms(axis) for axis in {tile.gated_axis(t): None for t in decayed}):
        halves = (Region(early), Region(late), Region(early, transposed=True))
        found |= {region: shapes.size(region.axes) for region in halves}
    least = _least(shapes)
    blocks, sizes = shapes.chunk // least, (shapes.chunk // least).bit_length() - 1
    for t in sorted(decayed, key=lambda t: t.key):
        pairs, anchored = _tables(t)
        stride = shapes.stride(pairs.axes)
        found[pairs] = blocks * (least * (least - 1) // 2) * stride
        found[anchored] = sizes * shapes.chunk * stride
    return found


def _computed(schedule: ChunkSchedule) -> list[Tile]:
    """The statements of this module, in order; tiles of other kernels are loaded like any tile."""
    return [t for t in schedule.computed if t.op in DECAYED]


def _tables(t: Tile) -> tuple[Region, Region]:
    """Decays of pairs within a block, and of rows to the last row of an earlier half."""
    gate = f"{t.args[-1].key} {t.attrs[-1]}"
    axes = (tile.gated_axis(t),)
    pairs, anchored = (tile.token(f"{name} {gate}", axes) for name in ("pairs", "anchored"))
    return Region(pairs), Region(anchored)


def _least(shapes: Shapes) -> int:
    """Rows of a block on the diagonal."""
    return max(8, shapes.lanes)


class _Decayed:
    """The operands of one statement, on axes I for rows and J for columns, and their decays.

    Decays are computed once for all statements under the same gate, by the first of them.
    """

    def __init__(self, frame: Frame, made: Compute) -> None:
        t = made.value
        self._g, self._exclusive = made.args[-1], t.attrs[-1]
        self._flush = t.op is not TileOp.DECAYED_CROSSING and t.attrs[-2]
        self.frame = frame
        self.least = _least(frame.shapes)
        # of a block of a product: it divides every half
        self.height = min(self.least, 1 << frame.shapes.config.rows.bit_length() - 1)
        self.axis = tile.gated_axis(t)
        self.early, self.late = _rooms(self.axis)
        self._values = Values(frame, self.axis)
        self._pairs, self._anchored = _tables(t)
        gates = {_tables(other): other for other in reversed(_computed(frame.schedule))}
        if gates[_tables(t)] == t:
            self._fill()

    def value(self, x: Use, row: Index, column: Index) -> Expr:
        """A vector of an operand: of row `row` on whichever time axis it has."""
        return self._values.at(x, {Axis.I: row, Axis.J: row, self.axis: column})

    def between(self, late: Index, early: Index, first: Expr, column: Index) -> Expr:
        """e^(P_late - Q_early), of rows of the block that begins with `first`."""
        pair = self._pair(late, early, first, column)
        return self._flushed(self.frame.read(self._pairs, pair, self._lanes))

    def anchored(self, size: Index, row: Index, column: Index) -> Expr:
        """e^(Q_anchor - Q_row) of a row of an earlier half, e^(P_row - Q_anchor) of a later one."""
        point = self._anchored_at(size, row, column)
        return self._flushed(self.frame.read(self._anchored, point, self._lanes))

    def _flushed(self, decay: Expr) -> Expr:
        """Decays by factors become 0 below LEAST_DECAY, except in sums over crossing entries."""
        return self._values.flushed(decay, LEAST_DECAY) if self._flush else decay

    @property
    def _lanes(self) -> int:
        return self.frame.lanes

    def _pair(self, late: Index, early: Index, first: Expr, column: Index) -> dict[Axis, Index]:
        row = late - first
        before = tirx.truncdiv(row * (row - 1), int32(2)) + (early - first)
        blocks = tirx.truncdiv(first, int32(self.least)) * (self.least * (self.least - 1) // 2)
        return {Axis.I: blocks + before, self.axis: column}

    def _anchored_at(self, size: Index, row: Index, column: Index) -> dict[Axis, Index]:
        return {Axis.I: int32(size) * self.frame.shapes.chunk + row, self.axis: column}

    def _fill(self) -> None:
        """The decays of this gate."""
        frame, code = self.frame, self.frame.code
        vectors, zero = frame.shapes.vectors(self.axis), number(0.0, self._lanes)
        for row, first, _ in self.diagonal():
            with code.loop(0, vectors, "c") as c:
                column = int32(c) * self._lanes
                total = code.accumulator(zero if self._exclusive else self._log(row, column))
                with code.loop(first, row, "s") as s:
                    j = row - 1 - (s - first)
                    decay = self._values.exponential(total.get())
                    frame.write(self._pairs, self._pair(row, j, first, column), decay, self._lanes)
                    code.set(total, total.get() + self._log(j, column))
        for size, half, first in self.halves():
            with code.loop(0, vectors, "c") as c:
                column = int32(c) * self._lanes
                after, since = code.accumulator(zero), code.accumulator(zero)
                with code.loop(0, half, "r") as r:
                    early, late = first + (half - 1 - r), first + half + r
                    self._write_anchored(size, early, column, after.get())
                    code.set(after, after.get() + self._log(early, column))
                    if self._exclusive:
                        self._write_anchored(size, late, column, since.get())
                    code.set(since, since.get() + self._log(late, column))
                    if not self._exclusive:
                        self._write_anchored(size, late, column, since.get())

    def _log(self, row: Index, column: Index) -> Expr:
        return self.value(self._g, row, column)

    def _write_anchored(self, size: Index, row: Index, column: Index, log: Expr) -> None:
        decay = self._values.exponential(log)
        self.frame.write(self._anchored, self._anchored_at(size, row, column), decay, self._lanes)

    def halves(self) -> Iterator[tuple[Index, Expr, Expr]]:
        """(number of the size, rows of a half, first row of the pair), within loops over them."""
        code, chunk = self.frame.code, self.frame.shapes.chunk
        sizes = (chunk // self.least).bit_length() - 1
        if not sizes:
            return
        with code.loop(0, sizes, "size") as size:
            half = code.bind("half", tirx.shift_left(int32(self.least), int32(size)))
            pairs = tirx.truncdiv(int32(chunk // 2), half)
            with code.loop(0, pairs, "pair") as pair:
                yield size, half, code.bind("first", pair * (half * 2))

    def diagonal(self) -> Iterator[tuple[Expr, Expr, Expr]]:
        """(row, first row and row after the last of its block), within the loops over rows."""
        code, least = self.frame.code, self.least
        with (
            code.loop(0, self.frame.shapes.chunk // least, "block") as block,
            code.loop(0, least, "r") as r,
        ):
            first = int32(block) * least
            yield first + r, first, first + least


def decayed_dot(frame: Frame, made: Compute) -> None:
    """A_ij = sum_k x_ik y_jk e^(P_ik - Q_jk) for i > j; zero elsewhere."""
    t, (x, y) = made.value, made.args[:2]
    code, lanes = frame.code, frame.lanes
    d = _Decayed(frame, made)
    frame.zero(t)
    for row, first, _ in d.diagonal():
        with code.loop(first, row, "j") as j:
            total = code.accumulator(number(0.0, lanes))
            with code.loop(0, frame.shapes.vectors(d.axis), "c") as c:
                column = int32(c) * lanes
                pair = d.value(x, row, column) * d.value(y, j, column)
                pair = _inside(d, pair * d.between(row, j, first, column), column)
                code.set(total, total.get() + pair)
            total_sum = horizontal_sum(frame, total.get())
            frame.write(Region(t), {Axis.I: row, Axis.J: j}, total_sum, 1)
    for size, half, first in d.halves():
        _half(d, d.early, y, size, half, first)
        _half(d, d.late, x, size, half, first + half)
        transpose(frame, d.early, half)
        singles, vectors = Values(frame, None), Values(frame, Axis.I)
        height = d.height
        with (
            code.loop(0, tirx.truncdiv(half, int32(height)), "r") as r,
            code.loop(0, tirx.truncdiv(half, int32(lanes)), "c") as c,
        ):
            rows: list[Index] = [int32(r) * height + a for a in range(height)]
            column = int32(c) * lanes

            def single(row: Index, s: Index, values: Values = singles) -> Expr:
                return values.region(Region(d.late), {Axis.I: row, d.axis: s})

            def vector(s: Index, column: Index, values: Values = vectors) -> Expr:
                return values.region(Region(d.early, True), {d.axis: s, Axis.I: column})

            channels = (0, frame.shapes.extent(d.axis))
            block = block_product(frame, rows, [column], channels, single, vector)
            for row, (total,) in zip(rows, block, strict=True):
                point = {Axis.I: first + half + row, Axis.J: first + column}
                frame.write(Region(t), point, total.get(), lanes)


def decayed_apply(frame: Frame, made: Compute) -> None:
    """z_ik = sum_j A_ij y_jk e^(P_ik - Q_jk), or z_jk = sum_i A_ij x_ik e^(P_ik - Q_jk); i > j."""
    t, (a, y) = made.value, made.args[:2]
    code, lanes = frame.code, frame.lanes
    d = _Decayed(frame, made)
    to_rows = t.attrs[0] is Axis.I
    side = Axis.I if to_rows else Axis.J
    singles = Values(frame, None)

    def score(late: Index, early: Index) -> Expr:
        return singles.at(a, {Axis.I: late, Axis.J: early})

    for row, first, end in d.diagonal():
        with code.loop(0, frame.shapes.vectors(d.axis), "c") as c:
            column = int32(c) * lanes
            total = code.accumulator(number(0.0, lanes))
            with code.loop(*((first, row) if to_rows else (row + 1, end)), "s") as s:
                late, early = (row, s) if to_rows else (s, row)
                one = broadcast(score(late, early), lanes)
                term = one * d.value(y, s, column) * d.between(late, early, first, column)
                code.set(total, total.get() + term)
            frame.write(Region(t), {side: row, d.axis: column}, total.get(), lanes)
    for size, half, first in d.halves():
        room = d.early if to_rows else d.late
        _half(d, room, y, size, half, first if to_rows else first + half)
        source = Region(room)
        own = first + half if to_rows else first  # the half whose rows are summed into
        height = d.height
        with code.loop(0, tirx.truncdiv(half, int32(height)), "r") as r:
            rows: list[Index] = [int32(r) * height + n for n in range(height)]
            for columns in column_blocks(frame, d.axis):

                def single(row: Index, s: Index, first: Expr = first, half: Expr = half) -> Expr:
                    late, early = (row, s) if to_rows else (s, row)
                    return score(first + half + late, first + early)

                def vector(s: Index, column: Index, source: Region = source) -> Expr:
                    return frame.read(source, {Axis.I: s, d.axis: column}, lanes)

                block = block_product(frame, rows, columns, (0, half), single, vector)
                for row, sums in zip(rows, block, strict=True):
                    for column, total in zip(columns, sums, strict=True):
                        at = own + row
                        point = {side: at, d.axis: column}
                        decay = d.anchored(size, at, column)
                        before = frame.read(Region(t), point, lanes)
                        frame.write(Region(t), point, before + decay * total.get(), lanes)


def decayed_crossing(frame: Frame, made: Compute) -> None:
    """z_tk = sum of A_ij x_ik y_jk e^(P_ik - Q_jk) over i >= t > j; without i if it is left out.

    Where no decay of the chunk is stronger than the limit, a difference of sums.
    """
    limit = made.value.attr(float)
    code, lanes = frame.code, frame.lanes
    d = _Decayed(frame, made)
    strong = code.accumulator(number(0.0, lanes))
    for point in frame.points((Axis.I, d.axis)):
        row, column = point[Axis.I], int32(point[d.axis])
        g = d.value(made.args[-1], row, column)
        beyond = tirx.Select(g > number(limit, lanes), number(0.0, lanes), number(1.0, lanes))
        code.set(strong, strong.get() + _inside(d, beyond, column))
    strong_sum = code.bind("strong", horizontal_sum(frame, strong.get()))
    mild = tirx.EQ(strong_sum, number(0.0, 1))
    with code.when(mild):
        _difference(d, made)
    with code.when(tirx.Not(mild)):
        _crossing(d, made)


def _difference(d: _Decayed, made: Compute) -> None:
    """The sums, from each row on, of x times its gradient less y times its own."""
    t, (_, x, y, dx, dy) = made.value, made.args[:5]
    exclusive = bool(t.attrs[-1])
    frame, code, lanes = d.frame, d.frame.code, d.frame.lanes
    with code.loop(0, frame.shapes.vectors(d.axis), "c") as c:
        column = int32(c) * lanes
        total = code.accumulator(number(0.0, lanes))
        with code.loop(0, frame.shapes.chunk, "r") as r:
            row = code.bind("row", int32(frame.shapes.chunk - 1) - r)
            taken = code.bind("taken", d.value(x, row, column) * d.value(dx, row, column))
            given = d.value(y, row, column) * d.value(dy, row, column)
            point = {Axis.I: row, d.axis: column}
            if exclusive:
                frame.write(Region(t), point, total.get() - given, lanes)
            code.set(total, total.get() + (taken - given))
            if not exclusive:
                frame.write(Region(t), point, total.get(), lanes)


def _crossing(d: _Decayed, made: Compute) -> None:
    """Sums that do not cancel, of blocks on the diagonal and of pairs of halves."""
    t, (a, x, y) = made.value, made.args[:3]
    exclusive = bool(t.attrs[-1])
    frame, code, lanes = d.frame, d.frame.code, d.frame.lanes
    singles = Values(frame, None)
    nothing = number(0.0, lanes)

    def add(row: Index, column: Index, value: Expr) -> None:
        point = {Axis.I: row, d.axis: column}
        frame.write(Region(t), point, frame.read(Region(t), point, lanes) + value, lanes)

    def score(late: Index, early: Index) -> Expr:
        return singles.at(a, {Axis.I: late, Axis.J: early})

    frame.zero(t)
    for row, first, _ in d.diagonal():  # a score with an earlier row crosses the rows after it
        with code.loop(0, frame.shapes.vectors(d.axis), "c") as c:
            column = int32(c) * lanes
            crossing = code.accumulator(nothing)
            to = code.bind("x", d.value(x, row, column))
            last = tirx.Select(row > first, row - 1, first) if exclusive else row
            with code.loop(first, last, "j") as j:
                given = d.value(y, j, column) * d.between(row, j, first, column)
                one = broadcast(score(row, j), lanes)
                code.set(crossing, crossing.get() + one * to * given)
                add(int32(j) + 1, column, crossing.get())
    for size, half, first in d.halves():
        middle = code.bind("middle", first + half)
        _half(d, d.early, y, size, half, first)
        _half(d, d.late, x, size, half, middle)
        for late in (True, False):
            with code.loop(0, frame.shapes.vectors(d.axis), "c") as c:
                column = int32(c) * lanes
                crossing = code.accumulator(nothing)
                with code.loop(0, half, "r") as r:
                    # late rows from the last one on, early rows from the first
                    row = code.bind("row", half - 1 - r if late else int32(r))
                    total = code.accumulator(nothing)
                    with code.loop(0, half, "s") as s:
                        i, j = (row, s) if late else (s, row)
                        one = broadcast(score(middle + i, first + j), lanes)
                        point = {Axis.I: s, d.axis: column}
                        seen = frame.read(Region(d.early if late else d.late), point, lanes)
                        code.set(total, multiply_add(one, seen, total.get()))
                    own = {Axis.I: row, d.axis: column}
                    value = total.get() * frame.read(
                        Region(d.late if late else d.early), own, lanes
                    )
                    to = (middle if late else first) + row
                    if late and not exclusive:
                        code.set(crossing, crossing.get() + value)
                        add(to, column, crossing.get())
                    else:
                        add(to, column, crossing.get())
                        code.set(crossing, crossing.get() + value)


def _half(d: _Decayed, room: Tile, x: Use, size: Index, half: Expr, first: Expr) -> None:
    """The rows of a half, decayed to or from the last row of the earlier half of the pair."""
    for point in d.frame.points((Axis.I, d.axis), (0, half)):
        row, column = first + point[Axis.I], int32(point[d.axis])
        value = d.value(x, row, column) * d.anchored(size, row, column)
        d.frame.write(Region(room), point, value, d.frame.lanes)


def _inside(d: _Decayed, x: Expr, column: Expr) -> Expr:
    """`x` with zeros beyond the last channel."""
    frame = d.frame
    extent = frame.shapes.extent(d.axis)
    if extent % frame.lanes == 0:
        return x
    inside = ramp(column, frame.lanes) < number(extent, frame.lanes, "int32")
    return tirx.Select(inside, x, number(0.0, frame.lanes))
