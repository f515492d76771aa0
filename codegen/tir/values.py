"""Elementwise statements as TIR expressions: a value at a point, or in a vector from it."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.tirx import Expr

from ...dsl.ir import Op
from ..tile import Axis, Tile, TileOp, Which
from ..tiled import Use
from .code import Index, broadcast, int32, number, ramp
from .frame import Frame
from .math import Math
from .schedule import Region, inputs

Point = Mapping[Axis, Index]


def renamed(use: Use) -> tuple[Axis, Axis] | None:
    """The time axis that `use` sees under another name, and that name."""
    if use.axes == use.value.axes:
        return None
    (axis,), (name,) = set(use.value.axes) - set(use.axes), set(use.axes) - set(use.value.axes)
    return axis, name


class Values:
    """Values at points. `along`: the axis of vectors, None for single numbers.

    `known`: values of products at the point, where a statement computes them itself.
    """

    def __init__(
        self, frame: Frame, along: Axis | None, known: Mapping[Tile, Expr] | None = None
    ) -> None:
        self._frame = frame
        self._along = along
        self._lanes = 1 if along is None else frame.lanes
        self._known = known or {}
        self._math = Math(self._lanes, frame.code.bind)

    def at(self, use: Use, point: Point) -> Expr:
        """A value at `point`, whose axes are called as in `use`."""
        changed = renamed(use)
        if changed is None:
            return self.of(use.value, point)
        axis, name = changed
        point = {**point, axis: point[name]}
        if self._along is axis:  # one number of the value for all lanes
            single = Values(self._frame, None, self._known).of(use.value, point)
            return broadcast(single, self._lanes)
        along = axis if self._along is name else self._along
        return Values(self._frame, along, self._known).of(use.value, point)

    def of(self, t: Tile, point: Point) -> Expr:
        """`t` at `point`."""
        if t not in self._known and t in self._frame.schedule.regions:
            return self.region(Region(t), point)
        return self.computed(t, point)

    def computed(self, t: Tile, point: Point) -> Expr:
        """`t` at `point` computed from its arguments, though it may have a region."""
        if t in self._known:
            return self._known[t]
        if t.op is TileOp.CONST:
            return number(t.value, self._lanes)
        if t.op is TileOp.EXTENT:
            return number(self._frame.shapes.extent(t.attr(Axis)), self._lanes)
        if t.op is TileOp.PARAM:
            return broadcast(self._frame.params[str(t.attrs[0])], self._lanes)
        if t.op is TileOp.MAP:
            return self._math.apply(t.attr(Op), self._args(t, point))
        (x,) = self._args(t, point)
        return self._selected(t, x, point)

    def _args(self, t: Tile, point: Point) -> list[Expr]:
        return [self.at(use, point) for use in inputs(self._frame.schedule.made[t])]

    def region(self, region: Region, point: Point) -> Expr:
        """The numbers in scratch at `point`: a vector, or one number in every lane."""
        axes = self._frame.places[region].axes
        if self._along in axes:
            assert axes[-1] is self._along, "vectors lie along the last axis of a region"
            return self._frame.read(region, point, self._lanes)
        return broadcast(self._frame.read(region, point, 1), self._lanes)

    def _index(self, axis: Axis, point: Point) -> Expr:
        """The place along `axis`, for each lane."""
        if axis is self._along:
            return ramp(point[axis], self._lanes)
        return broadcast(int32(point[axis]), self._lanes)

    def _selected(self, t: Tile, x: Expr, point: Point) -> Expr:
        zero = number(0.0, self._lanes)
        if t.op is TileOp.FLOOR:
            return self._math.most(self._frame.code.bind("x", x), t.attr(float))
        if t.op is TileOp.FLUSH:
            return self.flushed(x, t.attr(float))
        if t.op is TileOp.ROUND:
            return self._math.nearest(x)
        if t.op is TileOp.STEP:
            return tirx.Select(x > zero, number(1.0, self._lanes), zero)
        if t.op is TileOp.MASK:
            return tirx.Select(self._within(t, point), x, zero)
        row = self._index(Axis.I, point)
        if t.op is TileOp.ROWS:
            return tirx.Select(row < broadcast(self._frame.valid, self._lanes), x, zero)
        assert t.op is TileOp.PHASE, f"no expression for {t.op.name}"
        micro_step, count = t.attrs
        place = row + broadcast(self._frame.first, self._lanes)
        place = tirx.truncmod(place, number(int(str(count)), self._lanes, "int32"))
        wanted = number(int(str(micro_step)), self._lanes, "int32")
        return tirx.Select(tirx.EQ(place, wanted), x, zero)

    def _within(self, t: Tile, point: Point) -> Expr:
        (which,) = t.attrs
        i, j = self._index(Axis.I, point), self._index(Axis.J, point)
        if which is Which.DIAGONAL:
            return tirx.EQ(i, j)
        return i > j if which is Which.STRICT else i >= j

    def flushed(self, x: Expr, least: float) -> Expr:
        """`x`, but 0 where it is smaller than `least`; NaN stays."""
        x = self._frame.code.bind("x", x)
        small = x < number(least, self._lanes)
        return tirx.Select(small, number(0.0, self._lanes), x)

    def exponential(self, x: Expr) -> Expr:
        """e^x for x <= 0."""
        return self._math.decayed(self._frame.code.bind("d", x))
