"""Gradients in scans of their own, without a stored state: of states that nothing is recalled from.

Where nothing decays by an operand and nothing is recalled, each gradient reads one of the two
states of a backward: that of the forward scan as each chunk begins, or that of the reversed scan.
A scan that carries this state computes the gradient while the state is at hand. Linear attention
o = scan(q, k, v) has dq = scan(do, v, k), dk = reverse(v, do, q) and dv = reverse(k, q, do).

A scan is split along axis V of its state. A gradient that sums over this axis, as dq and dk do, is
computed with the state exchanged: its axis V is then called K, and nothing that follows knows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from . import tile
from .buffers import BufferId
from .chunk import ChunkProgram, Named
from .differentiate import Adjoint, differentiate
from .gates import DECAYED
from .hoisting import depends
from .tile import Attr, Axis, Tile, summed_axes

OTHER = {Axis.K: Axis.V, Axis.V: Axis.K}


class GradientScan(NamedTuple):
    """A scan for gradients that read the same state, and can be split along the same axis.

    Attributes:
        reverse: from the last chunk to the first.
        exchanged: whether its tiles have to call axis V K, and K V.
        last: whether what it carries ends as the gradients of first states.
    """

    reverse: bool
    exchanged: bool
    outputs: Named
    last: bool

    @property
    def name(self) -> str:
        """By its direction, and by what of a state its gradients have: rows or columns."""
        direction = "reverse" if self.reverse else "forward"
        return f"{direction}_{'rows' if self.exchanged else 'columns'}"


def gradient_scans(body: ChunkProgram, adjoint: Adjoint) -> tuple[GradientScan, ...] | None:
    """The scans for all gradients, forward ones first; None if a gradient fits none of them."""
    saved = frozenset(c.start for c in body.carried)
    reverse = frozenset(c.start for c in adjoint.carried)
    matrices = all(c.axes == (Axis.K, Axis.V) for c in saved)
    if not matrices or any(depends(c.end, saved) for c in adjoint.carried):
        return None
    groups: dict[tuple[bool, bool], list[tuple[BufferId, Tile]]] = {}
    for output in adjoint.outputs:
        _, gradient = output
        in_reverse = not depends(gradient, saved)
        ends = [c.end for c in (adjoint if in_reverse else body).carried]
        exchanged = _is_exchanged(gradient, *ends)
        if exchanged is None or (not in_reverse and depends(gradient, reverse)):
            return None
        groups.setdefault((in_reverse, exchanged), []).append(output)
    if not any(in_reverse for in_reverse, _ in groups):
        return None  # gradients of first states are the last of a reversed scan
    scans = [GradientScan(*key, tuple(groups[key]), last=False) for key in sorted(groups)]
    return (*scans[:-1], scans[-1]._replace(last=True))


@lru_cache(maxsize=512)
def has_gradient_scans(body: ChunkProgram) -> bool:
    """Whether gradients of `body` can be computed in scans of their own."""
    return gradient_scans(body, differentiate(body)) is not None


def _is_exchanged(*roots: Tile) -> bool | None:
    """Whether a scan that computes `roots` can be split along V if exchanged; None if it cannot."""
    tiles = tile.topological(*roots)
    sums = {axis for t in tiles for axis in summed_axes(t)}
    if Axis.V not in sums:
        return False
    gated = any(t.op in DECAYED for t in tiles)
    return None if Axis.K in sums or gated else True


def exchanged(roots: tuple[Tile, ...]) -> dict[Tile, Tile]:
    """Every tile below `roots` with axis K called V, and V K."""

    def other(attr: Attr) -> Attr:
        if isinstance(attr, tuple):
            return tile.axes_of(*(OTHER.get(a, a) for a in attr))
        return OTHER.get(attr, attr) if isinstance(attr, Axis) else attr

    def rule(t: Tile, args: tuple[Tile, ...]) -> Tile:
        axes = tile.axes_of(*(OTHER.get(a, a) for a in t.axes))
        return Tile(t.op, args, tuple(map(other, t.attrs)), axes, t.hint)

    return tile.rewritten(roots, rule)
