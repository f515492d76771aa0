"""The padding of a tile's channel axes: only zeros may enter a sum over channels.

A power-of-two tile wider than the operand is loaded with zeros beyond the last channel. Arithmetic
keeps them zero or not: `softplus(k)` is log 2 there, and `log(k)` is not even finite.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

from ..dsl.elementwise import at_zeros
from ..dsl.ir import Op
from .tile import Axis, Tile, TileOp


class Padding(Enum):
    """The values beyond the last channel."""

    ZERO = 0
    FINITE = 1
    UNSAFE = 2


@lru_cache(maxsize=65536)  # a tile that is used twice is asked about twice, and so its arguments
def padding(x: Tile, axis: Axis) -> Padding:
    """The values of `x` beyond the last channel of `axis`; FINITE for a tile without that axis."""
    if axis not in x.axes:
        return Padding.FINITE
    if x.op in (TileOp.TOKEN, TileOp.HEAD, TileOp.CARRY):
        return Padding.ZERO
    if x.op is TileOp.MAP:
        return _of_map(x, axis)
    if x.op is TileOp.STEP:
        return Padding.FINITE
    if x.op is TileOp.FLUSH:
        return padding(x.args[0], axis)
    if x.op is TileOp.FLOOR:
        inside = padding(x.args[0], axis)
        return Padding.FINITE if inside is Padding.ZERO and x.attr(float) > 0.0 else inside
    if x.op is TileOp.DECAYED_APPLY:  # scaled by its own y (side I) or x (side J)
        return padding(x.args[1], axis)
    if x.op is TileOp.DECAYED_CROSSING:  # scaled by both
        return min((padding(a, axis) for a in x.args[1:3]), key=lambda p: p.value)
    along = [padding(a, axis) for a in x.args if axis in a.axes]
    return max(along, key=lambda p: p.value, default=Padding.FINITE)


def _of_map(x: Tile, axis: Axis) -> Padding:
    fn = x.attr(Op)
    parts = [padding(a, axis) for a in x.args]
    if Padding.UNSAFE in parts:
        return Padding.UNSAFE
    if fn is Op.DIV:
        return Padding.UNSAFE if axis in x.args[1].axes else parts[0]
    if fn is Op.MUL and Padding.ZERO in parts:
        return Padding.ZERO
    if not at_zeros(fn).is_finite():
        return Padding.UNSAFE
    return Padding.ZERO if at_zeros(fn) == 0 and set(parts) == {Padding.ZERO} else Padding.FINITE
