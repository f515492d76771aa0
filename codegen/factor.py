"""Moves elementwise factors out of matrix products, so that operands enter them as loaded.

`(a_i x_ik) S_kv` is `a_i (x_ik S_kv)`: the factor follows the product, in float32. A factor along
the summed axis cannot leave, but can change sides: `sum_i (a_i k_ik) u_iv` is `sum_i k_ik (a_i
u_iv)`, which leaves k as it lies in memory and scales a tile that is in registers anyway. Sums
over the value axis of a product are taken from a product that is there already, where there is one.
Runs after differentiation: the gradient of the factored form would repeat products that the plain
form shares.
"""

from __future__ import annotations

from dataclasses import replace

from ..dsl.ir import Op
from . import tile
from .chunk import Carried, ChunkProgram
from .differentiate import Adjoint
from .tile import Axis, Tile, TileOp


def factor_chunk(body: ChunkProgram) -> ChunkProgram:
    """`body` with its products factored."""
    roots = [*(t for _, t in body.outputs), *(c.end for c in body.carried)]
    done = tile.rewritten(roots, _factored)
    outputs = tuple((name, done[t]) for name, t in body.outputs)
    carried = tuple(Carried(c.start, done[c.end]) for c in body.carried)
    return replace(body, outputs=outputs, carried=carried)


def factor_adjoint(adjoint: Adjoint) -> Adjoint:
    """`adjoint` with its products factored."""
    body = factor_chunk(ChunkProgram(adjoint.outputs, adjoint.carried))
    shared = _share_products([t for _, t in body.outputs])
    outputs = tuple((name, shared[t]) for name, t in body.outputs)
    return replace(adjoint, outputs=outputs, carried=body.carried)


def _factored(t: Tile, args: tuple[Tile, ...]) -> Tile:
    if t.op is TileOp.DOT:
        x, y = args
        return _product(x, y, t.attr(Axis)).named(t.hint)
    return tile.with_args(t, args)


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
    if x.is_map(Op.MUL):
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
    """Factors along `over` moved from `x` to `y`, if only `y` runs along the value axis."""
    if Axis.V in x.axes or Axis.V not in y.axes:
        return x, y
    while (split := _vector_factor(x)) is not None and split[0].axes == (over,):
        factor, x = split
        y = tile.mul(factor, y)
    return x, y


# ---- sums over the value axis ------------------------------------------------------------------


def _share_products(roots: list[Tile]) -> dict[Tile, Tile]:
    """sum_v g_iv (x S)_iv as sum_k x_ik (g S^T)_ik, wherever the product g S^T is needed anyway."""
    products = frozenset(t for t in tile.topological(*roots) if t.op is TileOp.DOT)

    def rule(t: Tile, args: tuple[Tile, ...]) -> Tile:
        shared = _shared_sum(t, products) if t.op is TileOp.SUM else None
        return shared if shared is not None else tile.with_args(t, args)

    return tile.rewritten(roots, rule)


def _shared_sum(t: Tile, products: frozenset[Tile]) -> Tile | None:
    if t.attrs != ((Axis.V,),):
        return None
    parts = _product_terms(t.args[0], products)
    return None if parts is None else tile.total(parts)


def _product_terms(x: Tile, products: frozenset[Tile]) -> list[Tile] | None:
    """The terms of sum_v x, one through a shared product; None if there is none to share."""
    sign, x = _unsigned(x)
    if not x.is_map(Op.MUL):
        return None
    for g, rest in (x.args, x.args[::-1]):
        for second, terms in _terms(rest):
            scale, inner = _scaled_product(second)
            if inner is None:
                continue
            shared = _swapped(g, inner, products)
            if shared is None:
                continue
            term = tile.mul(scale, shared) if scale is not None else shared
            others = [tile.reduce(tile.mul(g, o), (Axis.V,)) for o in terms]
            signs = [term if _positive(rest, second) else tile.neg(term), *others]
            return [s if sign else tile.neg(s) for s in signs]
    return None


def _unsigned(x: Tile) -> tuple[bool, Tile]:
    if x.is_map(Op.NEG):
        return False, x.args[0]
    return True, x


def _terms(x: Tile) -> list[tuple[Tile, list[Tile]]]:
    """Each term of a sum or difference with the others, signed; a single term with none."""
    if x.is_map(Op.SUB):
        a, b = x.args
        return [(a, [tile.neg(b)]), (b, [a])]
    if x.is_map(Op.ADD):
        a, b = x.args
        return [(a, [b]), (b, [a])]
    return [(x, [])]


def _positive(whole: Tile, term: Tile) -> bool:
    return not (whole.is_map(Op.SUB) and whole.args[1] == term)


def _scaled_product(x: Tile) -> tuple[Tile | None, Tile | None]:
    """(scale or None, product) of a product over K of tiles [I, K] and [K, V]."""
    scale = None
    split = _vector_factor(x)
    if split is not None and Axis.V not in split[0].axes:
        scale, x = split
    if x.op is TileOp.DOT and x.attrs == (Axis.K,) and x.axes == (Axis.I, Axis.V):
        return scale, x
    return None, None


def _swapped(g: Tile, product: Tile, products: frozenset[Tile]) -> Tile | None:
    rows, state = product.args if Axis.I in product.args[0].axes else product.args[::-1]
    for candidate in products:
        if candidate.attrs != (Axis.V,) or state not in candidate.args:
            continue
        other = candidate.args[0] if candidate.args[1] == state else candidate.args[1]
        if tile.rename(other, Axis.I) == tile.rename(g, Axis.I):
            return tile.reduce(tile.mul(rows, tile.rename(candidate, Axis.I)), (Axis.K,))
    return None
