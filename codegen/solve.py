"""Block elimination: the values that rows recall from one another, solved for a whole chunk.

A system x_n = y_n + sum_m A_nm x_m, whose A_nm are strictly lower C x C tiles, is unit triangular
in time. One unknown after the other is solved by the inverse of its own block and put into the
rows of the others; one that no other needs, or that needs no other, costs no product of two tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..dsl.errors import NotLowered
from . import tile
from .tile import SQUARE, Axis, Tile, TileOp

Part = TypeVar("Part", bound=Hashable)


def gather(scores: Tile, values: Tile) -> Tile:
    """sum_j scores_ij values_j: of rows of channels, or of a C x C tile."""
    if values.axes == SQUARE:
        return tile.product(scores, values)
    return tile.contract(scores, tile.rename(values, Axis.J), Axis.J)


def substitute(lower: Tile, b: Tile, x: Tile, *, transposed: bool = False) -> Tile:
    """U = x - b (L U), entry by entry scaled by `b`; `transposed`: U = x - L^T (b U).

    So each column of U, [I, V] as `b` and x, solves a system of its own.
    """
    assert lower.axes == SQUARE
    return Tile(TileOp.SUBSTITUTE, (lower, b, x), (transposed,), x.axes)


def eliminate(
    coupling: Mapping[tuple[int, int], Tile],
    given: Sequence[Mapping[Part, Tile]],
    columns: Mapping[int, Tile] | None = None,
) -> list[dict[Part, Tile]]:
    """The unknowns x_n = given_n + sum_m coupling_nm x_m; blocks that are not there are 0.

    Each unknown is a sum of parts that are solved apart, by name. `columns`: unknowns whose sum of
    others is scaled entry by entry, x_n = given_n + s_n sum_m coupling_nm x_m, by their scales.

    Raises NotLowered where such an unknown would have to be put into what is scaled itself.
    """
    blocks, sides = dict(coupling), [dict(g) for g in given]
    scales = columns or {}
    left, done = list(range(len(sides))), []
    while left:
        n = _next(blocks, left, scales)
        left.remove(n)
        solve = _Block.of(blocks.get((n, n)), scales.get(n))
        for i in left:
            if (i, n) not in blocks:
                continue
            for j in left:
                if (n, j) in blocks:
                    add_to(blocks, (i, j), tile.product(blocks[i, n], solve.square(blocks[n, j])))
            for part, x in sides[n].items():
                add_to(sides[i], part, _seen(blocks[i, n], solve(x), scales.get(i)))
        done.append((n, solve, list(left)))
    found: dict[int, dict[Part, Tile]] = {}
    for n, solve, later in reversed(done):
        for m in later:
            for part, x in found[m].items() if (n, m) in blocks else ():
                add_to(sides[n], part, _seen(blocks[n, m], x, scales.get(n)))
        found[n] = {part: solve(x) for part, x in sides[n].items()}
    return [found[n] for n in range(len(sides))]


@dataclass(frozen=True, slots=True)
class _Block:
    """The solution of an unknown's own block: nothing to do, an inverse, or a system per column."""

    inverse: Tile | None = None
    lower: Tile | None = None
    scale: Tile | None = None

    @staticmethod
    def of(coupling: Tile | None, scale: Tile | None) -> _Block:
        if coupling is None:
            return _Block(scale=scale)
        lower = tile.neg(coupling).named("L")
        if scale is not None:
            return _Block(lower=lower, scale=scale)
        return _Block(inverse=tile.inverse(lower).named("T"))

    def __call__(self, x: Tile) -> Tile:
        """Of rows of channels."""
        if self.lower is not None and self.scale is not None:
            return substitute(self.lower, self.scale, x)
        return x if self.inverse is None else gather(self.inverse, x)

    def square(self, x: Tile) -> Tile:
        """Of a C x C tile."""
        if self.scale is not None:
            raise NotLowered(
                "what is recalled is scaled per channel, and recalled again by what it recalls",
                "the systems of two such recalls are one for each channel, of both together",
                'a Scalar step size; or engine="reference", which runs it token by token',
            )
        return x if self.inverse is None else gather(self.inverse, x)


def _seen(scores: Tile, x: Tile, scale: Tile | None) -> Tile:
    """What an unknown sees of another, by its scale."""
    seen = gather(scores, x)
    return seen if scale is None else tile.mul(scale, seen)


def _next(
    blocks: Mapping[tuple[int, int], Tile], left: Sequence[int], scales: Mapping[int, Tile]
) -> int:
    """An unknown that fills no block of the others, if there is one; else one without a scale."""

    def fills(n: int) -> bool:
        others = [m for m in left if m != n]
        needs = any((n, m) in blocks for m in others)
        return needs and any((m, n) in blocks for m in others)

    plain = [n for n in left if n not in scales]
    return next((n for n in left if not fills(n)), (plain or left)[0])


def add_to(to: dict[Part, Tile], part: Part, x: Tile) -> None:
    """Add `x` to what `to` has under `part`, if anything."""
    to[part] = tile.add(to[part], x) if part in to else x
