"""What a forward can store for the backward of the same call, so that it is not computed again.

Ahead of their scans both directions compute tiles of C x C numbers that depend on operands alone:
the inverse of a system that tokens solve, scores of reads and writes. A plan may have the forward
store such tiles (`Plan.saves`): T and scores cost 2 C numbers per token and value head of memory
between the directions, and save the backward their products, exponentials and inverses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from . import tile
from .buffers import BufferId, BufferKind
from .chunk import ChunkProgram, Named
from .differentiate import Adjoint
from .hoisting import Hoist, hoisted
from .plan import Plan
from .tile import SQUARE, Tile, TileOp


def saved_tiles(body: ChunkProgram, adjoint: Adjoint, kinds: Hoist) -> Named:
    """The tiles of these kinds that both directions prepare, by the names of their buffers."""
    if not kinds:
        return ()
    carries = frozenset(c.start for c in (*body.carried, *adjoint.carried)) | {*adjoint.saved}
    ends = [c.end for c in body.carried]
    forward = hoisted([*ends, *(t for _, t in body.outputs)], carries, Hoist.ALL)
    backward = hoisted(
        [*ends, *(c.end for c in adjoint.carried)],
        carries,
        Hoist.ALL,
        outputs=[t for _, t in adjoint.outputs],
    )
    names: dict[BufferId, Tile] = {}
    for t in forward:
        if t.axes == SQUARE and t in backward and _kind(t) & kinds:
            stem, count = t.hint or "x", 1
            name = BufferId(BufferKind.SAVED, stem)
            while name in names:
                count += 1
                name = BufferId(BufferKind.SAVED, f"{stem}{count}")
            names[name] = t
    return tuple(names.items())


def saving(plans: Iterable[Plan], kinds: Hoist) -> tuple[Plan, ...]:
    """Those of `plans` that compute tiles of all kinds ahead of the scan, saving these."""
    whole = kinds | Hoist.PRODUCTS
    found = [p for p in plans if whole in p.hoist and not p.reassociate]
    return tuple(replace(p, saves=kinds) for p in found)


def _kind(t: Tile) -> Hoist:
    solves = any(x.op is TileOp.INVERSE for x in tile.topological(t))
    return Hoist.SOLVES if solves else Hoist.PRODUCTS
