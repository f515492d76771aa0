"""Matrix products, triangular solves and transposes on tiles in scratch, a register tile at a time.

A product is computed by blocks of rows times vectors of columns: factors with the rows are single
numbers in all lanes, factors with the columns are vectors. Scales and summands of the product are
applied to the block while that is in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from tvm import tirx
from tvm.tirx import Expr

from ..tile import Axis, Tile
from ..tiled import Compute, Product, Use
from .code import Accumulator, Index, broadcast, int32, int64, multiply_add, number, ramp
from .frame import LINE, Ahead, Frame
from .schedule import Region, Solve, columns_exchanged, zero_above
from .values import Values, renamed

Block = list[list[Accumulator]]


def compute_matrix(frame: Frame, t: Tile) -> None:
    """A tile of two axes: an elementwise statement with the products in it, or a product alone."""
    summed = frame.schedule.summed(t)
    for rows, columns in _blocks(frame, t, plain=not summed):
        for ahead in frame.ahead.get(t, ()):
            _ask(frame, ahead, rows, columns)
        sums = [(s.value, _product(frame, s, rows, columns)) for s in summed]
        for a, row in enumerate(rows):
            for b, column in enumerate(columns):
                known = {x: block[a][b].get() for x, block in sums}
                point = {t.axes[0]: row, t.axes[1]: column}
                value = Values(frame, t.axes[1], known).computed(t, point)
                frame.write(Region(t), point, value, frame.lanes)


def _ask(frame: Frame, ahead: Ahead, rows: list[Index], columns: list[Index]) -> None:
    """Prefetch the block's share of `ahead`: for a whole tile, all of it once."""
    for row in rows:
        first = ahead.rows.first + int64(row) * ahead.rows.stride
        for column in range(0, len(columns) * frame.lanes, LINE):
            at = first + int64(int32(columns[0]) + column)
            frame.code.prefetch(ahead.rows.buffer, at, write=ahead.write)


def _blocks(frame: Frame, t: Tile, *, plain: bool) -> Iterator[tuple[list[Index], list[Index]]]:
    """Rows, and first columns of vectors, of each block, within the loops that run over blocks.

    Of a tile that is not read above the diagonal, only vectors that begin no further right than the
    last row of their block of rows: products read no further.
    """
    code, shapes = frame.code, frame.shapes
    row_axis, column_axis = t.axes
    half = t in frame.schedule.half
    if plain:
        with code.loop(0, shapes.extent(row_axis), "r") as r:
            if half:
                last = tirx.min(int32(r) + (shapes.config.rows - 1), int32(shapes.chunk - 1))
                with code.loop(0, tirx.truncdiv(last, int32(frame.lanes)) + 1, "c") as c:
                    yield [r], [int32(c) * frame.lanes]
                return
            for columns in column_blocks(frame, column_axis):
                yield [r], columns
        return
    # columns outside: their panel of the second factor stays in the first level of the cache
    for columns in column_blocks(frame, column_axis):
        for rows in row_blocks(frame, row_axis):
            with code.when(int32(columns[0]) <= rows[-1]) if half else nullcontext():
                yield rows, columns


def _rows(block: Index, height: int, first: int = 0) -> list[Index]:
    return [int32(block) * height + (first + a) for a in range(height)]


def row_blocks(frame: Frame, axis: Axis, *, backwards: bool = False) -> Iterator[list[Index]]:
    """Rows of each block along `axis`, within the loop over blocks of one height.

    As few blocks as the register tile allows, of two heights, one apart.
    """
    extent, most = frame.shapes.extent(axis), frame.shapes.config.rows
    count = -(-extent // most)
    height, taller = divmod(extent, count)
    parts = [(0, taller, height + 1), (taller * (height + 1), count - taller, height)]
    for first, blocks, rows in reversed(parts) if backwards else parts:
        if blocks:
            with frame.code.loop(0, blocks, "r") as turn:
                block = int32(blocks - 1) - turn if backwards else turn
                yield _rows(block, rows, first)


def column_blocks(frame: Frame, axis: Axis, most: int | None = None) -> Iterator[list[Index]]:
    """First columns of the vectors of each block along `axis`, within the loop over blocks.

    `most`: vectors in a block, in place of a product's.
    """
    lanes, wanted = frame.lanes, most or frame.shapes.config.vectors
    turns, rest = divmod(frame.shapes.vectors(axis), wanted)
    if turns:
        with frame.code.loop(0, turns, "c") as c:
            yield [int32(c) * (wanted * lanes) + b * lanes for b in range(wanted)]
    if rest:
        yield [int32((turns * wanted + b) * lanes) for b in range(rest)]


def _product(frame: Frame, s: Product, rows: list[Index], columns: list[Index]) -> Block:
    """The sums of a block of a product, in registers."""
    over = s.over
    row_axis, column_axis = s.value.axes
    exchanged, changed = columns_exchanged(s), renamed(s.right)
    begin: Index = 0
    end: Index = frame.shapes.extent(over)
    if zero_above(s.left.value):  # rows of the block meet nothing beyond the diagonal
        if over is Axis.J:
            end = int32(rows[-1]) + 1
        else:
            begin = rows[0]
    singles, vectors = Values(frame, None), Values(frame, column_axis)

    def single(row: Index, n: Index) -> Expr:
        return singles.at(s.left, {row_axis: row, over: n})

    def vector(n: Index, column: Index) -> Expr:
        point = {over: n, column_axis: column}
        if not exchanged:
            return vectors.at(s.right, point)
        if changed is not None:
            point[changed[0]] = point[changed[1]]
        return frame.read(Region(s.right.value, transposed=True), point, frame.lanes)

    return block_product(frame, rows, columns, (begin, end), single, vector)


def block_product(
    frame: Frame,
    rows: list[Index],
    columns: list[Index],
    terms: tuple[Index, Index],
    single: Callable[[Index, Index], Expr],
    vector: Callable[[Index, Index], Expr],
) -> Block:
    """The sums over s in `terms` of single(row, s) vector(s, column), in registers."""
    code, lanes = frame.code, frame.lanes
    block = [[code.accumulator(number(0.0, lanes)) for _ in columns] for _ in rows]
    with code.loop(*terms, "s") as s:
        ys = [code.bind("y", vector(s, column)) for column in columns]
        for a, row in enumerate(rows):
            one = code.bind("x", broadcast(single(row, s), lanes))
            for b, y in enumerate(ys):
                code.set(block[a][b], multiply_add(one, y, block[a][b].get()))
    return block


def square_product(frame: Frame, s: Compute) -> None:
    """The product of two C x C tiles; terms beyond the diagonal of the left one are left out."""
    left, right = s.args
    of_left, of_right = s.value.attrs  # whether each is transposed first
    singles, vectors = Values(frame, None), Values(frame, Axis.J)

    def single(row: Index, n: Index) -> Expr:
        i, j = (n, row) if of_left else (row, n)
        return singles.at(left, {Axis.I: i, Axis.J: j})

    def vector(n: Index, column: Index) -> Expr:
        if of_right:  # its copy, whose columns lie side by side
            point = {Axis.I: column, Axis.J: n}
            return frame.read(Region(right.value, transposed=True), point, frame.lanes)
        return vectors.at(right, {Axis.I: n, Axis.J: column})

    for columns in column_blocks(frame, Axis.J):
        for rows in row_blocks(frame, Axis.I):
            begin: Index = 0
            end: Index = frame.shapes.chunk
            if zero_above(left.value):
                begin, end = (rows[0], end) if of_left else (0, int32(rows[-1]) + 1)
            block = block_product(frame, rows, columns, (begin, end), single, vector)
            for a, row in enumerate(rows):
                for b, column in enumerate(columns):
                    point = {Axis.I: row, Axis.J: column}
                    frame.write(Region(s.value), point, block[a][b].get(), frame.lanes)


def solve(frame: Frame, s: Solve) -> None:
    """(1 + L)^-1 applied to a tile, or its transpose applied: rows in order, or from the last."""
    row_axis, column_axis = s.value.axes
    # applied to rows named J it gives rows named I; the transpose, the other way round
    given = Axis.J if row_axis is Axis.I else Axis.I
    for columns in column_blocks(frame, column_axis):
        values = Values(frame, column_axis)

        def start(row: Index, column: Index, values: Values = values) -> Expr:
            return values.at(s.right, {given: row, column_axis: column})

        _substitute(frame, s.value, s.lower, columns, start)


def invert(frame: Frame, s: Compute) -> None:
    """(1 + L)^-1 itself: the solution for the unit matrix."""
    (lower,) = s.args
    lanes = frame.lanes

    def unit(row: Index, column: Index) -> Expr:
        here = tirx.EQ(ramp(column, lanes), broadcast(int32(row), lanes))
        return tirx.Select(here, number(1.0, lanes), number(0.0, lanes))

    for columns in column_blocks(frame, Axis.J):
        _substitute(frame, s.value, lower, columns, unit)


def _substitute(
    frame: Frame,
    t: Tile,
    lower: Use,
    columns: list[Index],
    start: Callable[[Index, Index], Expr],
) -> None:
    code, lanes, chunk = frame.code, frame.lanes, frame.shapes.chunk
    row_axis, column_axis = t.axes
    forward = row_axis is Axis.I
    singles, vectors = Values(frame, None), Values(frame, column_axis)

    def factor(row: Index, solved: Index) -> Expr:
        """The multiple of a solved row that is subtracted from another."""
        i, j = (row, solved) if forward else (solved, row)
        return broadcast(singles.at(lower, {Axis.I: i, Axis.J: j}), lanes)

    for rows in row_blocks(frame, row_axis, backwards=not forward):
        block = [[code.accumulator(start(row, c)) for c in columns] for row in rows]
        begin, end = (0, rows[0]) if forward else (rows[-1] + 1, int32(chunk))
        with code.loop(begin, end, "s") as s:
            points = [{row_axis: s, column_axis: c} for c in columns]
            solved = [code.bind("u", vectors.region(Region(t), p)) for p in points]
            for a, row in enumerate(rows):
                one = code.bind("l", -factor(row, s))
                for b, u in enumerate(solved):
                    code.set(block[a][b], multiply_add(one, u, block[a][b].get()))
        order = range(len(rows)) if forward else range(len(rows) - 1, -1, -1)
        for n, a in enumerate(order):
            for done in list(order)[:n]:
                one = code.bind("l", -factor(rows[a], rows[done]))
                for b in range(len(columns)):
                    left = multiply_add(one, block[done][b].get(), block[a][b].get())
                    code.set(block[a][b], left)
            for b, c in enumerate(columns):
                point = {row_axis: rows[a], column_axis: c}
                frame.write(Region(t), point, block[a][b].get(), lanes)


def substitute(frame: Frame, s: Compute) -> None:
    """Each column's own system, a row of all of them at a time: in order, or from the last."""
    t, (lower, b, x) = s.value, s.args
    code, lanes, chunk = frame.code, frame.lanes, frame.shapes.chunk
    transposed = bool(t.attrs[0])
    singles, vectors = Values(frame, None), Values(frame, Axis.V)
    with code.loop(0, frame.shapes.vectors(Axis.V), "c") as c, code.loop(0, chunk, "r") as turn:
        column = int32(c) * lanes
        row = code.bind("row", int32(chunk - 1) - turn if transposed else int32(turn))
        here = {Axis.I: row, Axis.V: column}
        total = code.accumulator(number(0.0, lanes))
        begin, end = (row + 1, int32(chunk)) if transposed else (int32(0), row)
        with code.loop(begin, end, "s") as other:
            at = {Axis.I: other, Axis.V: column}
            i, j = (other, row) if transposed else (row, other)
            one = broadcast(singles.at(lower, {Axis.I: i, Axis.J: j}), lanes)
            solved = vectors.region(Region(t), at)
            scaled = vectors.at(b, at) * solved if transposed else solved
            code.set(total, multiply_add(one, scaled, total.get()))
        seen = total.get() if transposed else vectors.at(b, here) * total.get()
        frame.write(Region(t), here, vectors.at(x, here) - seen, lanes)


def transpose(frame: Frame, t: Tile, rows: Expr | None = None) -> None:
    """A copy with rows and columns exchanged, square blocks of vectors at a time.

    `rows`: how many of them, a multiple of a vector; None for all.
    """
    code, lanes = frame.code, frame.lanes
    row_axis, column_axis = t.axes
    blocks: Index = frame.shapes.vectors(row_axis)
    if rows is not None:
        blocks = tirx.truncdiv(rows, int32(lanes))
    with (
        code.loop(0, blocks, "r") as r,
        code.loop(0, frame.shapes.vectors(column_axis), "c") as c,
    ):
        first, column = int32(r) * lanes, int32(c) * lanes
        block = []
        for a in range(lanes):
            point = {row_axis: first + a, column_axis: column}
            block.append(code.bind("x", frame.read(Region(t), point, lanes)))
        distance = 1
        while distance < lanes:
            block = _exchanged(frame, block, distance)
            distance *= 2
        for a, x in enumerate(block):
            point = {row_axis: first, column_axis: column + a}
            frame.write(Region(t, transposed=True), point, x, lanes)


def _exchanged(frame: Frame, block: list[Expr], distance: int) -> list[Expr]:
    """Pairs of rows that far apart, with their 2 x 2 blocks of that size transposed."""
    lanes = len(block)
    early = [k if not k & distance else lanes + k - distance for k in range(lanes)]
    late = [k + distance if not k & distance else lanes + k for k in range(lanes)]
    result = list(block)
    for a in range(lanes):
        if not a & distance:
            pair = [block[a], block[a + distance]]
            for place, lanes_of in ((a, early), (a + distance, late)):
                shuffled = tirx.Shuffle(pair, [int32(k) for k in lanes_of])
                result[place] = frame.code.bind("x", shuffled)
    return result


def horizontal_sum(frame: Frame, x: Expr) -> Expr:
    """The sum of the lanes of a vector, by halves."""
    lanes = frame.lanes
    while lanes > 1:
        x = frame.code.bind("h", x)
        half = lanes // 2
        low = tirx.Shuffle([x], [int32(k) for k in range(half)])
        high = tirx.Shuffle([x], [int32(half + k) for k in range(half)])
        x, lanes = low + high, half
    return x
