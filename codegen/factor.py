"""Moves elementwise factors out of matrix products, so that operands enter them as loaded.

`(a_i x_ik) S_kv` is `a_i (x_ik S_kv)`: the factor follows the product, in float32. A factor along the
summed axis cannot leave, but can change sides: `sum_i (a_i k_ik) u_iv` is `sum_i k_ik (a_i u_iv)`, which
leaves k as it lies in memory and scales what is in registers anyway. Run after differentiation: the
gradient of the factored form would repeat products that the plain form shares.
"""

from __future__ import annotations

from ..dsl.ir import Op
from . import tile
from .chunk import Body, Carried
from .differentiate import Adjoint
from .tile import Axis, Tile, TileOp


def factor_body(body: Body) -> Body:
    """`body` with its products factored."""
    done: dict[Tile, Tile] = {}
    outputs = tuple((name, _rewrite(t, done)) for name, t in body.outputs)
    return Body(outputs, _carried(body.carried, done))


def factor_adjoint(adjoint: Adjoint) -> Adjoint:
    """`adjoint` with its products factored."""
    done: dict[Tile, Tile] = {}
    outputs = tuple((name, _rewrite(t, done)) for name, t in adjoint.outputs)
    return Adjoint(outputs, _carried(adjoint.carried, done), adjoint.saved)


def _carried(carried: tuple[Carried, ...], done: dict[Tile, Tile]) -> tuple[Carried, ...]:
    return tuple(Carried(c.start, _rewrite(c.end, done)) for c in carried)


def _rewrite(root: Tile, done: dict[Tile, Tile]) -> Tile:
    for t in tile.topological(root, stop=frozenset(done)):
        if t not in done:
            done[t] = _rebuild(t, [done[a] for a in t.args])
    return done[root]


def _rebuild(t: Tile, args: list[Tile]) -> Tile:
    if t.op is TileOp.DOT:
        (over,) = t.attrs
        assert isinstance(over, Axis)
        return _product(args[0], args[1], over).named(t.hint)
    if tuple(args) == t.args:
        return t
    if t.op is TileOp.MAP:
        (fn,) = t.attrs
        assert isinstance(fn, Op)
        return tile.fmap(fn, *args).named(t.hint)
    return Tile(t.op, tuple(args), t.attrs, t.axes, t.hint)


def _product(x: Tile, y: Tile, over: Axis) -> Tile:
    x, out_x = _leaving(x, over)
    y, out_y = _leaving(y, over)
    x, y = _sides(x, y, over)
    y, x = _sides(y, x, over)
    result = tile.contract(x, y, over)
    for factor in (*out_x, *out_y):
        result = tile.mul(factor, result)
    return result


def _vector_factor(x: Tile) -> tuple[Tile, Tile] | None:
    """(a, rest) if `x` is a product of a tile `a` of fewer axes and a full one."""
    if x.op is TileOp.MAP and x.attrs == (Op.MUL,):
        for a, rest in (x.args, x.args[::-1]):
            if len(a.axes) < len(x.axes) and rest.axes == x.axes:
                return a, rest
    return None


def _leaving(x: Tile, over: Axis) -> tuple[Tile, list[Tile]]:
    """`x` without the factors that do not vary along `over`, and those factors."""
    out = []
    while (split := _vector_factor(x)) is not None and over not in split[0].axes:
        factor, x = split
        out.append(factor)
    return x, out


def _sides(x: Tile, y: Tile, over: Axis) -> tuple[Tile, Tile]:
    """Factors along `over` moved from `x` to `y`, if `y` runs along the value axis and `x` does not."""
    if Axis.V in x.axes or Axis.V not in y.axes:
        return x, y
    while (split := _vector_factor(x)) is not None and split[0].axes == (over,):
        factor, x = split
        y = tile.mul(factor, y)
    return x, y
