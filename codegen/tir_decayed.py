"""Products under a vector gate: exponents are differences of prefixes, and none is above 0.

Blocks on the diagonal are summed pair by pair. What lies below is halved: rows of a block's later
half meet columns of its earlier half, both decayed to the last row of the earlier half, and each
such pair of halves is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm import tirx
from tvm.tirx import Expr

from . import tile
from .tile import Axis, Tile, TileOp
from .tir_code import Index, broadcast, int32, number, ramp
from .tir_frame import Frame
from .tir_products import block_product, column_blocks, horizontal_sum, transpose
from .tir_schedule import Region
from .tir_values import Values

# rows of an earlier and of a later half, decayed: room in scratch that such statements share
EARLY, LATE = tile.token("early half", (Axis.K,)), tile.token("late half", (Axis.K,))
DECAYED = (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY)


class _Decayed:
    """The operands of one statement, on axes I for rows and J for columns, and their decays."""

    def __init__(self, frame: Frame, prefix: Tile, key_prefix: Tile) -> None:
        self.frame = frame
        self.least = max(8, frame.lanes)
        # of a block of a product: what divides every half
        self.height = min(self.least, 1 << frame.shapes.config.rows.bit_length() - 1)
        self._p, self._q = prefix, key_prefix
        self._values = Values(frame, Axis.K)

    def value(self, t: Tile, row: Index, column: Index) -> Expr:
        """A vector of an operand: of row `row` on whichever time axis it has."""
        return self._values.at(t, {Axis.I: row, Axis.J: row, Axis.K: column})

    def between(self, late: Index, early: Index, column: Index) -> Expr:
        """e^(P_late - Q_early)."""
        p, q = self.value(self._p, late, column), self.value(self._q, early, column)
        return self._values.exponential(p - q)

    def to_anchor(self, early: Index, anchor: Index, column: Index) -> Expr:
        """e^(Q_anchor - Q_early)."""
        end, start = (self.value(self._q, row, column) for row in (anchor, early))
        return self._values.exponential(end - start)

    def halves(self) -> Iterator[tuple[Expr, Expr]]:
        """(rows of a half, first row of the pair), within the loops over sizes and pairs."""
        code, chunk = self.frame.code, self.frame.shapes.chunk
        sizes = (chunk // self.least).bit_length() - 1
        if not sizes:
            return
        with code.loop(0, sizes, "size") as size:
            half = code.bind("half", tirx.shift_left(int32(self.least), int32(size)))
            pairs = tirx.truncdiv(int32(chunk // 2), half)
            with code.loop(0, pairs, "pair") as pair:
                yield half, code.bind("first", pair * (half * 2))

    def diagonal(self) -> Iterator[tuple[Expr, Expr, Expr]]:
        """(row, first row and row after the last of its block), within the loops over rows."""
        code, least = self.frame.code, self.least
        with (
            code.loop(0, self.frame.shapes.chunk // least, "block") as block,
            code.loop(0, least, "r") as r,
        ):
            first = int32(block) * least
            yield first + r, first, first + least


def decayed_dot(frame: Frame, t: Tile) -> None:
    """A_ij = sum_k x_ik y_jk e^(P_ik - Q_jk) for i > j; zero elsewhere."""
    x, y, p, q = t.args
    code, lanes = frame.code, frame.lanes
    d = _Decayed(frame, p, q)
    with (
        code.loop(0, frame.shapes.chunk, "r") as r,
        code.loop(0, frame.shapes.vectors(Axis.J), "c") as c,
    ):
        point = {Axis.I: r, Axis.J: int32(c) * lanes}
        frame.write(Region(t), point, number(0.0, lanes), lanes)
    for row, first, _ in d.diagonal():
        with code.loop(first, row, "j") as j:
            total = code.accumulator(number(0.0, lanes))
            with code.loop(0, frame.shapes.vectors(Axis.K), "c") as c:
                column = int32(c) * lanes
                pair = d.value(x, row, column) * d.value(y, j, column)
                pair = _inside(frame, pair * d.between(row, j, column), column)
                code.set(total, total.get() + pair)
            total_sum = horizontal_sum(frame, total.get())
            frame.write(Region(t), {Axis.I: row, Axis.J: j}, total_sum, 1)
    for half, first in d.halves():
        _early(d, y, half, first)
        _late(d, x, half, first)
        transpose(frame, EARLY, half)
        singles, vectors = Values(frame, None), Values(frame, Axis.I)
        height = d.height
        with (
            code.loop(0, tirx.truncdiv(half, int32(height)), "r") as r,
            code.loop(0, tirx.truncdiv(half, int32(lanes)), "c") as c,
        ):
            rows: list[Index] = [int32(r) * height + a for a in range(height)]
            column = int32(c) * lanes

            def single(row: Index, s: Index, values: Values = singles) -> Expr:
                return values.region(Region(LATE), {Axis.I: row, Axis.K: s})

            def vector(s: Index, column: Index, values: Values = vectors) -> Expr:
                return values.region(Region(EARLY, True), {Axis.K: s, Axis.I: column})

            channels = (0, frame.shapes.extent(Axis.K))
            block = block_product(frame, rows, [column], channels, single, vector)
            for row, (total,) in zip(rows, block, strict=True):
                point = {Axis.I: first + half + row, Axis.J: first + column}
                frame.write(Region(t), point, total.get(), lanes)


def decayed_apply(frame: Frame, t: Tile) -> None:
    """z_ik = sum_j A_ij y_jk e^(P_ik - Q_jk), or z_jk = sum_i A_ij x_ik e^(P_ik - Q_jk); i > j."""
    a, y, p, q = t.args
    code, lanes = frame.code, frame.lanes
    d = _Decayed(frame, p, q)
    to_rows = t.attrs == (Axis.I,)
    side = Axis.I if to_rows else Axis.J
    singles = Values(frame, None)

    def score(late: Index, early: Index) -> Expr:
        return singles.at(a, {Axis.I: late, Axis.J: early})

    for row, first, end in d.diagonal():
        with code.loop(0, frame.shapes.vectors(Axis.K), "c") as c:
            column = int32(c) * lanes
            total = code.accumulator(number(0.0, lanes))
            with code.loop(*((first, row) if to_rows else (row + 1, end)), "s") as s:
                late, early = (row, s) if to_rows else (s, row)
                one = broadcast(score(late, early), lanes)
                term = one * d.value(y, s, column) * d.between(late, early, column)
                code.set(total, total.get() + term)
            frame.write(Region(t), {side: row, Axis.K: column}, total.get(), lanes)
    for half, first in d.halves():
        anchor = first + (half - 1)
        if to_rows:
            _early(d, y, half, first)
        else:
            _late(d, y, half, first)
        source = Region(EARLY if to_rows else LATE)
        own = first + half if to_rows else first  # the half whose rows are summed into
        height = d.height
        with code.loop(0, tirx.truncdiv(half, int32(height)), "r") as r:
            rows: list[Index] = [int32(r) * height + n for n in range(height)]
            for columns in column_blocks(frame, Axis.K):

                def single(row: Index, s: Index, first: Expr = first, half: Expr = half) -> Expr:
                    late, early = (row, s) if to_rows else (s, row)
                    return score(first + half + late, first + early)

                def vector(s: Index, column: Index, source: Region = source) -> Expr:
                    return frame.read(source, {Axis.I: s, Axis.K: column}, lanes)

                block = block_product(frame, rows, columns, (0, half), single, vector)
                for row, sums in zip(rows, block, strict=True):
                    for column, total in zip(columns, sums, strict=True):
                        at = own + row
                        point = {side: at, Axis.K: column}
                        if to_rows:
                            decay = d.between(at, anchor, column)
                        else:
                            decay = d.to_anchor(at, anchor, column)
                        before = frame.read(Region(t), point, lanes)
                        frame.write(Region(t), point, before + decay * total.get(), lanes)


def _early(d: _Decayed, y: Tile, half: Expr, first: Expr) -> None:
    """Rows of an earlier half, decayed to its last row."""
    frame = d.frame
    with (
        frame.code.loop(0, half, "r") as r,
        frame.code.loop(0, frame.shapes.vectors(Axis.K), "c") as c,
    ):
        column = int32(c) * frame.lanes
        value = d.value(y, first + r, column)
        value = value * d.to_anchor(first + r, first + (half - 1), column)
        frame.write(Region(EARLY), {Axis.I: r, Axis.K: column}, value, frame.lanes)


def _late(d: _Decayed, x: Tile, half: Expr, first: Expr) -> None:
    """Rows of a later half, decayed from the last row of the earlier one."""
    frame = d.frame
    with (
        frame.code.loop(0, half, "r") as r,
        frame.code.loop(0, frame.shapes.vectors(Axis.K), "c") as c,
    ):
        column = int32(c) * frame.lanes
        row = first + half + r
        value = d.value(x, row, column) * d.between(row, first + (half - 1), column)
        frame.write(Region(LATE), {Axis.I: r, Axis.K: column}, value, frame.lanes)


def _inside(frame: Frame, x: Expr, column: Expr) -> Expr:
    """`x` with zeros beyond the last channel."""
    extent = frame.shapes.extent(Axis.K)
    if extent % frame.lanes == 0:
        return x
    inside = ramp(column, frame.lanes) < number(extent, frame.lanes, "int32")
    return tirx.Select(inside, x, number(0.0, frame.lanes))
