"""The steps of a kernel per chunk, in order: tiles are kept, inlined, fused or halved.

A tile is kept (it has a statement and a region of scratch) or inlined in the statement of the one
tile that uses it. Products run fused with the elementwise statement that uses them. A product with
an inverse is solved row by row, and the inverse is not formed. Of C x C tiles that are zero above
the diagonal, or read only below it, no vector beyond the diagonal is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ...dsl.ir import Op
from ..buffers import BufferId
from ..expressions import INLINE, unaliased
from ..plan import Kernel
from ..tile import Axes, Axis, Tile, TileOp
from ..vector_gate import DECAYED

POINTWISE = INLINE
NUMBERS = (TileOp.CONST, TileOp.EXTENT, TileOp.PARAM)
_LEAVES = (TileOp.TOKEN, TileOp.HEAD, TileOp.CARRY)
_SQUARE: Axes = (Axis.I, Axis.J)


class Action(Enum):
    """The action of a step on its tile."""

    LOAD = "bring a leaf into scratch"
    COMPUTE = "compute it into scratch"
    TRANSPOSE = "copy it with rows and columns exchanged"
    STORE = "write it to the buffer of the step's name"


@dataclass(frozen=True, slots=True)
class Region:
    """A tile's place in scratch: as it is, or with rows and columns exchanged."""

    tile: Tile
    transposed: bool = False

    @property
    def axes(self) -> Axes:
        """As they lie in scratch."""
        return self.tile.axes[::-1] if self.transposed else self.tile.axes


@dataclass(frozen=True, slots=True)
class Step:
    """One action; `reads`: the regions that it needs; `name`: the buffer of a store."""

    action: Action
    tile: Tile
    reads: frozenset[Region]
    name: BufferId | None = None

    @property
    def writes(self) -> Region | None:
        """The region that it fills."""
        if self.action is Action.STORE:
            return None
        return Region(self.tile, self.action is Action.TRANSPOSE)


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """The steps of one chunk.

    Attributes:
        regions: leaves and kept tiles, which have a place in scratch.
        fused: products computed within the statement that uses them.
        solved: applied inverses, and the strictly lower tile and the right-hand side of each.
        half: C x C tiles computed up to the diagonal only.
        ends: the tiles that carries end as.
        in_place: ends that overwrite their start, and that start.
    """

    steps: tuple[Step, ...]
    regions: frozenset[Tile]
    fused: frozenset[Tile]
    solved: dict[Tile, tuple[Tile, Tile]]
    half: frozenset[Tile]
    ends: frozenset[Tile]
    in_place: dict[Tile, Tile]

    @property
    def products(self) -> list[Tile]:
        """The tiles of two axes whose statements sum products, in order."""
        tiles = (s.tile for s in self.steps if s.action is Action.COMPUTE)
        return [t for t in tiles if self.summed(t)]

    def summed(self, t: Tile) -> list[Tile]:
        """The products that the statement of `t` sums itself: `t`, or those fused with it."""
        if t.op is TileOp.DOT:
            return [] if t in self.solved else [t]
        found: dict[Tile, None] = {}
        for a in t.args if t.op in POINTWISE else ():
            if a in self.fused:
                found[a] = None
            elif a not in self.regions:
                found |= dict.fromkeys(self.summed(a))
        return list(found)


def schedule(kernel: Kernel) -> ChunkSchedule:
    """The steps of one chunk of `kernel`."""
    return _Scheduler(kernel).schedule()


def zero_above(t: Tile) -> bool:
    """Whether a C x C tile is zero above the diagonal."""
    if t.op in (TileOp.MASK, TileOp.DECAY, TileOp.DECAYED_DOT, TileOp.INVERSE):
        return True
    if t.op is TileOp.MAP:
        (fn,) = t.attrs
        square = [zero_above(a) for a in t.args if a.axes == _SQUARE]
        if fn is Op.MUL:
            return any(square)
        return fn in (Op.ADD, Op.SUB, Op.NEG) and len(square) == len(t.args) and all(square)
    return t.op in (TileOp.ROWS, TileOp.PHASE, TileOp.FLUSH) and zero_above(t.args[0])


def sides(product: Tile) -> tuple[Tile, Tile]:
    """The factors of a product: the one that has its rows, the one that has its columns."""
    x, y = product.args
    return (x, y) if product.axes[0] in x.axes else (y, x)


def columns_exchanged(product: Tile) -> bool:
    """Whether the second factor must be transposed for its columns to lie side by side."""
    _, y = sides(product)
    both = len(unaliased(y).axes) == 2
    return both and y.axes[-1] is not product.axes[-1]


class _Scheduler:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._stored = frozenset(t for _, t in kernel.stored)
        self._ends = {unaliased(c.end): c.start for c in kernel.carried}
        self._results = {unaliased(t) for _, t in kernel.stores} | set(self._ends)
        self._solved = {
            t: (a.args[0], b)
            for t in kernel.order
            if t.op is TileOp.DOT
            for a, b in (t.args, t.args[::-1])
            if a.op is TileOp.INVERSE and a not in self._stored
        }
        self._order = self._reached()
        self._users: dict[Tile, list[Tile]] = defaultdict(list)
        for t in self._order:
            for a in self._inputs(t):
                self._users[a].append(t)
        kept = [t for t in self._order if not self._leaf(t) and not self._inlined(t)]
        self._fused = frozenset(f for t in kept for f in self._fusing(t))
        self._kept = frozenset(kept) - self._fused

    def schedule(self) -> ChunkSchedule:
        in_place = {e: s for e, s in self._ends.items() if self._overwrites(e)}
        half: set[Tile] = set()
        for t in reversed(self._order):
            square = t.axes == _SQUARE and t.op is not TileOp.INVERSE
            if t.op is TileOp.CUMSUM and not (t.attrs[0] or zero_above(t.args[0])):
                square = False  # entries above the diagonal count
            if square and t not in self._results and self._only_below(t, half):
                half.add(t)
        return ChunkSchedule(
            steps=self._steps(in_place),
            regions=self._kept.union(t for t in self._order if self._leaf(t)),
            fused=self._fused,
            solved=self._solved,
            half=frozenset(half),
            ends=frozenset(self._ends),
            in_place=in_place,
        )

    # ---- the graph, without aliases and with solves ----------------------------------------------

    def _leaf(self, t: Tile) -> bool:
        return t in self._stored or t.op in _LEAVES

    def _inputs(self, t: Tile) -> tuple[Tile, ...]:
        if self._leaf(t):
            return ()
        args = self._solved.get(t, t.args)
        if t.op in DECAYED:  # decays are sums between rows: prefix sums are not needed
            args = (*args[:-3], args[-1])
        return tuple(dict.fromkeys(unaliased(a) for a in args))

    def _reached(self) -> list[Tile]:
        """Every tile that is computed or loaded, arguments first; no numbers, no aliases."""
        roots = [t for _, t in self._kernel.stores] + [c.end for c in self._kernel.carried]
        order: dict[Tile, None] = {}

        def visit(t: Tile) -> None:
            if t in order or t.op in NUMBERS:
                return
            for a in self._inputs(t):
                visit(a)
            order[t] = None

        for root in roots:
            visit(unaliased(root))
        return list(order)

    # ---- where a tile is computed ----------------------------------------------------------------

    def _inlined(self, t: Tile) -> bool:
        if t.op not in POINTWISE or t in self._results or len(self._users[t]) != 1:
            return False
        (user,) = self._users[t]
        if user in self._solved:
            lower, right = (unaliased(a) for a in self._solved[user])
            return t == right != lower
        streams = user.op in POINTWISE or user.op in (TileOp.SUM, TileOp.CUMSUM)
        inner = user.args[0] if user.op is TileOp.SUM else user
        return streams and len(t.axes) == len(inner.axes)

    def _fusing(self, root: Tile) -> list[Tile]:
        """The products used by the statement of `root` alone, entry by entry."""
        if root.op not in POINTWISE:
            return []
        found = []
        for a in root.args:
            if a.op is TileOp.EXPAND or a.axes != root.axes or self._leaf(a):
                continue
            if a.op is TileOp.DOT and a not in self._solved:
                if self._users[a] == [root] and a not in self._results:
                    found.append(a)
            elif a.op in POINTWISE and self._inlined(a):
                found += self._fusing(a)
        return found

    def _only_below(self, t: Tile, half: set[Tile]) -> bool:
        """Whether nobody looks at `t` above the diagonal."""
        for user in self._users[t]:
            if user in self._solved or user.op in (TileOp.INVERSE, *DECAYED):
                continue  # these look below it only
            if user.op is TileOp.CUMSUM and user in half:
                continue  # from the diagonal on
            if user.op in POINTWISE:
                if user not in half:
                    return False
            elif user.op not in (TileOp.DOT, TileOp.SUM) or not zero_above(t):
                return False
        return True

    def _overwrites(self, end: Tile) -> bool:
        """Whether `end` can take the place of its start, entry by entry."""
        start = self._ends[end]
        if end not in self._kept or end.op not in POINTWISE or self._users[end]:
            return False
        others = (e for e in self._ends if e != end and e in self._kept)
        if any(Region(start) in self._reads(e) for e in others):
            return False
        read = {r.tile for r in self._factors(end) if not r.transposed}
        return end.axes == start.axes and start not in read

    # ---- steps -----------------------------------------------------------------------------------

    def _factors(self, t: Tile) -> set[Region]:
        """The regions that the products within the statement of `t` read."""
        found: set[Region] = set()
        for x in (t, *self._fusing(t)):
            if x.op is TileOp.DOT and x not in self._solved:
                a, b = (unaliased(s) for s in sides(x))
                found |= {Region(a), Region(b, columns_exchanged(x))}
        return found

    def _reads(self, t: Tile) -> frozenset[Region]:
        found = self._factors(t)
        if t.op is not TileOp.DOT or t in self._solved:
            self._look(t, found)
        return frozenset(found)

    def _look(self, t: Tile, found: set[Region]) -> None:
        for a in self._inputs(t):
            if self._leaf(a) or a in self._kept:
                found.add(Region(a))
            elif a not in self._fused and a.op not in NUMBERS:
                self._look(a, found)

    def _steps(self, in_place: Mapping[Tile, Tile]) -> tuple[Step, ...]:
        steps: list[Step] = []
        exchanged: set[Tile] = set()
        ordered = [t for t in self._order if t not in in_place]
        ordered += [t for t in self._order if t in in_place]
        stores = [(n, t, unaliased(t)) for n, t in self._kernel.stores]
        for t in ordered:
            if self._leaf(t) and (t.op is not TileOp.CARRY or t in self._stored):
                steps.append(Step(Action.LOAD, t, frozenset()))
            elif t in self._kept:
                reads = self._reads(t)
                for x in sorted((r.tile for r in reads if r.transposed), key=lambda x: x.key):
                    if x not in exchanged:
                        exchanged.add(x)
                        steps.append(Step(Action.TRANSPOSE, x, frozenset((Region(x),))))
                steps.append(Step(Action.COMPUTE, t, reads))
            for name, shown, base in stores:
                if base == t:
                    steps.append(Step(Action.STORE, shown, frozenset((Region(base),)), name))
        numbers = [(n, t) for n, t, base in stores if base.op in NUMBERS]
        steps += [Step(Action.STORE, t, frozenset(), n) for n, t in numbers]
        return tuple(steps)
