"""The transition of a state over a segment of a sequence, so that all segments are scanned at once.

A scan's end is affine in its start: S' = A S + B, in a chunk and so in a segment of many chunks. A
is the transition, B the scan from zero; with both of every segment, each segment starts from the A
and B of those before it. A of a state that only decays is diagonal, e^(a sum of log-decays). Else
it is a K x K matrix: the scan itself computes it, from the identity, with all writes left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..dsl.ir import Op
from . import tile
from .chunk import Carried
from .tile import ALIASES, MASKS, Axis, Tile, TileOp

FADE, MATRIX = ".fade", ".matrix"  # suffixes of the carries of A, behind their state's name


@dataclass(frozen=True, slots=True)
class SegmentTransition:
    """A of a state, as a scan of the segment carries it.

    `matrix`: the matrix A itself, carried from the identity, its columns along the value axis;
    otherwise the logarithm of the factor (of each channel, or one of all), carried from zero.
    """

    carried: Carried
    matrix: bool


Transitions = tuple[SegmentTransition | None, ...]  # one per carry; None: A = 1


class Start(Enum):
    """Where a scan of a segment starts."""

    ZERO = "from zero, for B and what fades"
    IDENTITY = "from the identity, for A"
    ENDS = "from what the segments before it end with"


@dataclass(frozen=True, slots=True)
class Segments:
    """A scan of segments of sequences, all at once, not of whole sequences.

    Scans from zero or the identity store nothing but their carries as the segment ends.
    """

    start: Start
    transitions: Transitions

    @property
    def ends(self) -> bool:
        """Whether it is for the ends alone."""
        return self.start is not Start.ENDS


def segment_transitions(carried: tuple[Carried, ...]) -> Transitions | None:
    """The transition of each carry; None if a carry has no A, or one that mixes carries.

    The reversed scan has their transposes: its chunk is the adjoint of this one.
    """
    starts = frozenset(c.start for c in carried)
    fades: dict[Tile, SegmentTransition] = {}  # one for all carries that fade alike
    found: list[SegmentTransition | None] = []
    for c in carried:
        linear = _linear(c.end, starts)
        if linear is None or _carries(linear, starts) != {c.start}:
            return None
        logs = _logarithms(linear, c.start)
        if logs:
            log = tile.total(logs)
            if Axis.V in log.axes:  # scans fade rows of states, and one value of the others
                return None
            if log not in fades:
                start = tile.carry(c.name + FADE, log.axes)
                fades[log] = SegmentTransition(Carried(start, tile.add(start, log)), matrix=False)
            found.append(fades[log])
        elif logs is not None:
            found.append(None)
        elif c.start.axes == (Axis.K, Axis.V) and _same_in_all_columns(linear, starts):
            start = tile.carry(c.name + MATRIX, c.start.axes)
            end = _linear(c.end, starts, {c.start: start})
            assert end is not None
            found.append(SegmentTransition(Carried(start, end), matrix=True))
        else:
            return None
    return tuple(found)


def _logarithms(linear: Tile, start: Tile) -> list[Tile] | None:
    """The x of all factors e^x if `linear` is their product with `start`, else None."""
    logs: list[Tile] = []
    while linear != start:
        if not linear.is_map(Op.MUL):
            return None
        x, y = linear.args
        x, y = (t.args[0] if t.op is TileOp.FLUSH else t for t in (x, y))
        factor, linear = (x, y) if x.is_map(Op.EXP) else (y, x)
        if not factor.is_map(Op.EXP):
            return None
        logs += factor.args
    return logs


def _same_in_all_columns(linear: Tile, starts: frozenset[Tile]) -> bool:
    """Whether nothing but the carry varies along the value axis, so that A is one matrix."""
    return all(Axis.V not in t.axes or _carries(t, starts) for t in tile.topological(linear))


def _carries(x: Tile, starts: frozenset[Tile]) -> frozenset[Tile]:
    return starts.intersection(tile.topological(x))


def _linear(
    root: Tile, starts: frozenset[Tile], instead: dict[Tile, Tile] | None = None
) -> Tile | None:
    """The part of `root` linear in the carries, with carries replaced; None if it is not affine."""
    parts: dict[Tile, Tile | None] = {}  # None: it does not depend on a carry
    for t in tile.topological(root):
        if t in starts:
            parts[t] = (instead or {}).get(t, t)
            continue
        args = [parts[a] for a in t.args]
        if all(a is None for a in args):
            parts[t] = None
            continue
        kept = _kept(t, args)
        if kept is None:
            return None
        parts[t] = kept
    return parts[root]


def _kept(t: Tile, args: list[Tile | None]) -> Tile | None:
    """`t` of the linear parts of its arguments; None if it is not linear in them."""
    if t.op is TileOp.MAP:
        fn = t.attr(Op)
        if fn in (Op.ADD, Op.SUB):
            x, y = args
            if x is None or y is None:
                return y if x is None and fn is Op.ADD else x or tile.neg(_sure(y))
            return tile.fmap(fn, x, y).named(t.hint)
        one = sum(a is not None for a in args) == 1
        if fn is Op.NEG or (fn is Op.MUL and one) or (fn is Op.DIV and one and args[0] is not None):
            return tile.fmap(fn, *_filled(t, args)).named(t.hint)
        return None
    if t.op is TileOp.DOT and None not in args:
        return None
    return tile.with_args(t, _filled(t, args)) if t.op in _LINEAR else None


def _filled(t: Tile, args: list[Tile | None]) -> tuple[Tile, ...]:
    return tuple(a if x is None else x for a, x in zip(t.args, args, strict=True))


def _sure(x: Tile | None) -> Tile:
    assert x is not None
    return x


_LINEAR = (TileOp.DOT, TileOp.SUM, *ALIASES, *MASKS)
