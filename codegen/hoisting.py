"""What is worth a kernel ahead of a scan: prefixes, solves, products and norms without a carry."""

from __future__ import annotations

from collections.abc import Container, Iterable
from enum import Flag, auto
from functools import lru_cache

from ..dsl.ir import Op
from . import tile
from .tile import LEAVES, NUMBERS, POINTWISE, SQUARE, Axis, Tile, TileOp, summed_axes


class Hoist(Flag):
    """The tiles computed ahead of the scan, in parallel over chunks; kinds add up."""

    NOTHING = 0
    PREFIXES = auto()  # prefix sums of gates, and tiles scaled by them
    SOLVES = auto()  # applications of the triangular inverse
    PRODUCTS = auto()  # all other matrix products
    ALL = PREFIXES | SOLVES | PRODUCTS


_PRODUCTS = (TileOp.DOT, TileOp.PRODUCT, TileOp.DECAYED_DOT, TileOp.INVERSE)


def worth_hoisting(x: Tile, hoist: Hoist, reassociate: bool) -> bool:
    below = tile.topological(x)
    if not x.args or (Axis.K in x.axes and Axis.V in x.axes):
        return False  # a K x V tile per chunk is the size of the state: never worth its bytes
    if Axis.V in x.axes and not reassociate:
        return False  # a C x V tile costs more bytes than its arguments
    if any(t.op is TileOp.INVERSE for t in below):
        return Hoist.SOLVES in hoist
    if any(t.op in _PRODUCTS for t in below) or is_along_keys(x):
        return Hoist.PRODUCTS in hoist
    return Hoist.PREFIXES in hoist and _scales_by_prefix(x)


def is_along_keys(x: Tile) -> bool:
    """Whether `x` is a product of two Keys of operands for each token, summed."""
    product = x.args[0] if x.op is TileOp.SUM and summed_axes(x) == (Axis.K,) else None
    if product is None or x.axes != (Axis.I,) or not product.is_map(Op.MUL):
        return False
    return product.args[0] != product.args[1]


def hoisted(
    roots: Iterable[Tile],
    carries: frozenset[Tile],
    hoist: Hoist,
    *,
    reassociate: bool = False,
    outputs: Iterable[Tile] = (),
    known: Container[Tile] = (),
) -> dict[Tile, None]:
    """The largest tiles below `roots` that are worth hoisting; none below `known` ones.

    Of the tiles that only `outputs` need, scores under a vector gate, which are too dear to compute
    twice.
    """
    wanted: dict[Tile, None] = {}
    seen: set[Tile] = set()

    def visit(x: Tile) -> None:
        """Hoist `x`, or the tiles below it that are worth it."""
        x = x.args[0] if x.op in (TileOp.RENAME, TileOp.EXPAND) else x
        if x in seen or x in known:
            return
        seen.add(x)
        if not depends(x, carries) and worth_hoisting(x, hoist, reassociate):
            wanted[x] = None
        else:
            for argument in x.args:
                visit(argument)

    for root in roots:
        visit(root)
    if Hoist.PRODUCTS in hoist:
        for t in tile.topological(*outputs):
            for x in t.args if not scores_under_vector_gate(t) else ():
                if scores_under_vector_gate(x) and not (x in known or depends(x, carries)):
                    wanted[x] = None
    return wanted


def norms_along_keys(tiles: list[Tile]) -> tuple[Tile, ...]:
    """Vectors of tokens made from sums over K of operands, and used along K."""
    along = (t for t in tiles if Axis.K in t.axes)
    return tuple(dict.fromkeys(x for t in along for x in t.args if _is_norm(x)))


def _is_norm(x: Tile) -> bool:
    """Whether `x` takes a sum over K of operands, elementwise: no matrix product, no carry."""
    if x.axes != (Axis.I,):
        return False
    below = tile.topological(x)
    sums = {t for t in below if t.op is TileOp.SUM and Axis.K in summed_axes(t)}
    elementwise = {*POINTWISE, *LEAVES, *NUMBERS, TileOp.EXPAND} - {TileOp.CARRY}
    return bool(sums) and all(t in sums or t.op in elementwise for t in below)


@lru_cache(maxsize=65536)
def scores_under_vector_gate(x: Tile) -> bool:
    """Whether `x` is a decayed product of operands, or such products and others added up."""
    if x.is_map(Op.ADD):
        return x.axes == SQUARE and any(map(scores_under_vector_gate, x.args))
    return x.op is TileOp.DECAYED_DOT


@lru_cache(maxsize=65536)
def _scales_by_prefix(x: Tile) -> bool:
    """Whether `x` is a prefix sum or made from one of its own shape, not merely scaled by it."""
    if x.op is TileOp.CUMSUM or not {*SQUARE}.isdisjoint(summed_axes(x)):
        return True
    same = [a for a in x.args if a.axes == x.axes or x.op in (TileOp.ROWS, TileOp.MASK)]
    return x.op in (TileOp.MAP, TileOp.FLUSH) and any(_scales_by_prefix(a) for a in same)


@lru_cache(maxsize=65536)
def depends(x: Tile, carries: frozenset[Tile]) -> bool:
    return x in carries or any(depends(a, carries) for a in x.args)
