"""A kernel's scratch memory: where each tile lies, rows padded to vectors, reused when dead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tvm.tirx import Buffer, Expr, Var

from ..tile import Axes, Axis, Tile
from ..tiled import TiledKernel
from .code import Code, Index, int32, int64, load, number
from .config import TvmConfig
from .schedule import ChunkSchedule, Region

LINE = 16  # float32 numbers in a line of cache


@dataclass(frozen=True, slots=True)
class Place:
    """Where a region lies: its axes as laid out, and how far apart its rows are."""

    offset: int
    axes: Axes
    stride: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a kernel's tiles, in numbers and in vectors."""

    kernel: TiledKernel
    config: TvmConfig

    @property
    def chunk(self) -> int:
        return self.kernel.chunk

    @property
    def lanes(self) -> int:
        return self.config.lanes

    def extent(self, axis: Axis) -> int:
        """Numbers along an axis; of V, one work item's part."""
        return self.kernel.extents[axis]

    def width(self, axis: Axis) -> int:
        """The same in whole vectors."""
        return self.vectors(axis) * self.lanes

    def vectors(self, axis: Axis) -> int:
        """Vectors along an axis."""
        return -(-self.extent(axis) // self.lanes)

    def size(self, axes: Axes) -> int:
        """Numbers that a tile takes in scratch."""
        rows = self.width(axes[0]) if len(axes) == 2 else 1
        return -(-rows * self.stride(axes) // LINE) * LINE

    def stride(self, axes: Axes) -> int:
        """How far apart rows are, or the length of the only one.

        A line more than a power of two, or a column's lines would all want the same few places of
        the cache.
        """
        if not axes:
            return 1
        width = self.width(axes[-1])
        return width + LINE if len(axes) == 2 and width % (4 * LINE) == 0 else width


def allocate(schedule: ChunkSchedule, shapes: Shapes) -> tuple[dict[Region, Place], int]:
    """A place for each region, and how many numbers there are in all.

    What is held from chunk to chunk keeps its place; others give theirs back after the last step
    that reads them.
    """
    places: dict[Region, Place] = {}
    top = 0
    for t in schedule.held:
        places[Region(t)] = placed(Region(t), top, shapes)
        top += shapes.size(t.axes)
    last: dict[Region, int] = {}
    for n, step in enumerate(schedule.steps):
        for region in (*step.reads, *((step.writes,) if step.writes else ())):
            last[region] = n
    dying: dict[int, list[Region]] = {}
    for region, n in last.items():
        # ends of carries are read after the last step
        kept = region.tile in schedule.ends and not region.transposed
        if region not in places and not kept:
            dying.setdefault(n, []).append(region)
    free: list[tuple[int, int]] = []  # (offset, size), by offset, merged
    for n, step in enumerate(schedule.steps):
        region = step.writes
        if region is not None and region not in places:
            if region.tile in schedule.in_place and not region.transposed:
                start = schedule.in_place[region.tile]
                places[region] = places[Region(start)]
            else:
                size = shapes.size(region.axes)
                at = _take(free, size)
                if at is None:
                    at, top = top, top + size
                places[region] = placed(region, at, shapes)
        for dead in dying.get(n, ()):
            if dead.tile not in schedule.in_place:
                _give(free, places[dead].offset, shapes.size(dead.axes))
    return places, top


def placed(region: Region, offset: int, shapes: Shapes) -> Place:
    """The region at `offset`."""
    return Place(offset, region.axes, shapes.stride(region.axes))


def _take(free: list[tuple[int, int]], size: int) -> int | None:
    """The smallest hole that fits."""
    fits = [(hole, at) for at, hole in free if hole >= size]
    if not fits:
        return None
    hole, at = min(fits)
    free.remove((at, hole))
    if hole > size:
        free.append((at + size, hole - size))
    return at


def _give(free: list[tuple[int, int]], at: int, size: int) -> None:
    free.append((at, size))
    free.sort()
    merged: list[tuple[int, int]] = []
    for start, length in free:
        if merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    free[:] = merged


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where a tile lies in a tensor: rows `stride` apart, channels `apart` (1: side by side)."""

    buffer: Buffer
    first: Expr
    stride: Expr
    apart: int = 1


@dataclass(frozen=True, slots=True)
class Ahead:
    """Rows that a statement asks for while it computes as many of its own.

    They lie a page apart: the CPU's own prefetching ends with each row.
    """

    rows: Rows
    write: bool


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The values that the statements of one chunk refer to.

    Attributes:
        valid: how many of the chunk's rows the sequence has (int32).
        first: the number of the chunk's first row within its sequence (int32).
        params: run-time floats by name.
        ahead: rows in memory that will be wanted soon, by the product that asks for them.
        outside: regions that lie in tensors of the call and not in scratch.
    """

    code: Code
    shapes: Shapes
    schedule: ChunkSchedule
    places: Mapping[Region, Place]
    scratch: Buffer
    valid: Expr
    first: Expr
    params: Mapping[str, Var]
    ahead: Mapping[Tile, Sequence[Ahead]]
    outside: Mapping[Region, Rows] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        return self.shapes.lanes

    def _address(self, region: Region, point: Mapping[Axis, Index]) -> tuple[Buffer, Expr]:
        """Where the number at `point` lies."""
        if region in self.outside:
            rows = self.outside[region]
            *row, column = (int64(point[a]) for a in region.axes)
            return rows.buffer, sum((r * rows.stride for r in row), rows.first + column)
        return self.scratch, self._in_scratch(self.places[region], point)

    def _in_scratch(self, place: Place, point: Mapping[Axis, Index]) -> Expr:
        if not place.axes:
            return int32(place.offset)
        if len(place.axes) == 1:
            return int32(point[place.axes[0]]) + place.offset
        row, column = (int32(point[a]) for a in place.axes)
        return row * place.stride + column + place.offset

    def read(self, region: Region, point: Mapping[Axis, Index], lanes: int) -> Expr:
        """Numbers of a region, from `point` on along its last axis."""
        return load(*self._address(region, point), lanes)

    def write(self, region: Region, point: Mapping[Axis, Index], value: Expr, lanes: int) -> None:
        """The same, stored."""
        self.code.store(*self._address(region, point), value, lanes)

    def points(
        self, axes: Axes, rows: tuple[Index, Index] | None = None
    ) -> Iterator[dict[Axis, Index]]:
        """Where each vector of a tile begins, within loops over them; `rows`: in these alone."""
        if not axes:
            yield {}
            return
        *outer, along = axes
        begin, end = rows or (0, self.shapes.extent(outer[0]) if outer else 1)
        with (
            self.code.loop(begin, end, "r") as r,
            self.code.loop(0, self.shapes.vectors(along), "c") as c,
        ):
            yield {**dict.fromkeys(outer, r), along: int32(c) * self.lanes}

    def zero(self, t: Tile, rows: tuple[Index, Index] | None = None) -> None:
        """Zeros in a tile, or in some rows of it."""
        lanes = self.lanes if t.axes else 1
        for point in self.points(t.axes, rows):
            self.write(Region(t), point, number(0.0, lanes), lanes)
