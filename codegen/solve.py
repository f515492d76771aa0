"""Block elimination: the values that rows recall from one another, solved for a whole chunk.

A system x_n = y_n + sum_m A_nm x_m, whose A_nm are strictly lower C x C tiles, is unit triangular
in time. One unknown after the other is solved by the inverse of its own block and put into the
rows of the others; one that no other needs, or that needs no other, costs no product of two tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from . import tile
from .tile import SQUARE, Axis, Tile

Part = TypeVar("Part", bound=Hashable)


def gather(scores: Tile, values: Tile) -> Tile:
    """sum_j scores_ij values_j: of rows of channels, or of a C x C tile."""
    if values.axes == SQUARE:
        return tile.product(scores, values)
    return tile.contract(scores, tile.rename(values, Axis.J), Axis.J)


def eliminate(
    coupling: Mapping[tuple[int, int], Tile], given: Sequence[Mapping[Part, Tile]]
) -> list[dict[Part, Tile]]:
    """The unknowns x_n = given_n + sum_m coupling_nm x_m; blocks that are not there are 0.

    Each unknown is a sum of parts that are solved apart, by name.
    """
    blocks, sides = dict(coupling), [dict(g) for g in given]
    left, done = list(range(len(sides))), []
    while left:
        n = _next(blocks, left)
        left.remove(n)
        solve = None
        if (n, n) in blocks:
            solve = tile.inverse(tile.neg(blocks[n, n]).named("L")).named("T")
        for i in left:
            if (i, n) not in blocks:
                continue
            for j in left:
                if (n, j) in blocks:
                    add_to(blocks, (i, j), tile.product(blocks[i, n], _solved(solve, blocks[n, j])))
            for part, x in sides[n].items():
                add_to(sides[i], part, gather(blocks[i, n], _solved(solve, x)))
        done.append((n, solve, list(left)))
    found: dict[int, dict[Part, Tile]] = {}
    for n, solve, later in reversed(done):
        for m in later:
            for part, x in found[m].items() if (n, m) in blocks else ():
                add_to(sides[n], part, gather(blocks[n, m], x))
        found[n] = {part: _solved(solve, x) for part, x in sides[n].items()}
    return [found[n] for n in range(len(sides))]


def _next(blocks: Mapping[tuple[int, int], Tile], left: Sequence[int]) -> int:
    """An unknown that fills no block of the others, if there is one."""

    def fills(n: int) -> bool:
        others = [m for m in left if m != n]
        needs = any((n, m) in blocks for m in others)
        return needs and any((m, n) in blocks for m in others)

    return next((n for n in left if not fills(n)), left[0])


def _solved(solve: Tile | None, x: Tile) -> Tile:
    return x if solve is None else gather(solve, x)


def add_to(to: dict[Part, Tile], part: Part, x: Tile) -> None:
    """Add `x` to what `to` has under `part`, if anything."""
    to[part] = tile.add(to[part], x) if part in to else x
