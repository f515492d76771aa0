"""A tiled kernel refined for a CPU's scratch memory: the steps of one chunk, in order.

Loads, values, their order and masks are the tiled kernel's. Added here: a value is kept (it has a
region of scratch) or inlined in the statement of the one value that uses it, products too where
that is elementwise; stores follow their values at once, and regions that are dead are reused. A
product with an inverse is solved row by row, and the inverse is not formed. Of C x C tiles that are
zero above the diagonal, or read only below it, no vector beyond the diagonal is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ...dsl.ir import Op
from ..gates import DECAYED
from ..plan import Loop
from ..tile import NUMBERS, POINTWISE, SQUARE, Axes, Tile, TileOp
from ..tiled import Advance, Begin, Compute, Load, Product, Store, TiledKernel, Use, uses

_NUMBERS = (*NUMBERS, TileOp.PARAM)


@dataclass(frozen=True, slots=True)
class Solve:
    """`value` <- (1 + lower)^-1, or its transpose, times `right`."""

    value: Tile
    lower: Use
    right: Use


@dataclass(frozen=True, slots=True)
class Transpose:
    """A copy of `value` with rows and columns exchanged."""

    value: Tile


Made: TypeAlias = Compute | Product | Solve


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
    """A statement; `reads`: the regions that it needs."""

    statement: Load | Made | Transpose | Store
    reads: frozenset[Region]

    @property
    def writes(self) -> Region | None:
        """The region that it fills."""
        if isinstance(self.statement, Store):
            return None
        return Region(self.statement.value, isinstance(self.statement, Transpose))

    @property
    def does(self) -> str:
        """Its action, in words."""
        s = self.statement
        if isinstance(s, Store):
            return f"store {s.buffer}"
        verb = type(s).__name__.lower() if isinstance(s, Load | Transpose) else "compute"
        return f"{verb} {s.value.hint or 'x'}"


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """The steps of one chunk.

    Attributes:
        held: values that the loop over chunks begins with: carries, and what stays the same.
        made: the statement of each value that is computed, inlined ones too.
        regions: values that have a place in scratch.
        fused: products computed within the statement that uses them.
        half: C x C tiles computed up to the diagonal only.
        ends: the values that carries end as.
        in_place: ends that overwrite their start, and that start.
    """

    steps: tuple[Step, ...]
    held: tuple[Tile, ...]
    made: Mapping[Tile, Made]
    regions: frozenset[Tile]
    fused: frozenset[Tile]
    half: frozenset[Tile]
    ends: frozenset[Tile]
    in_place: dict[Tile, Tile]

    @property
    def computed(self) -> list[Tile]:
        """The values that have steps of their own, in order."""
        return [s.statement.value for s in self.steps if isinstance(s.statement, Made)]

    @property
    def products(self) -> list[Tile]:
        """The tiles of two axes whose statements sum products, in order."""
        return [t for t in self.computed if self.summed(t)]

    def summed(self, t: Tile) -> list[Product]:
        """The products that the statement of `t` sums itself: its own, or those fused with it."""
        s = self.made[t]
        if isinstance(s, Product):
            return [s]
        found: dict[Product, None] = {}
        for use in inputs(s) if t.op in POINTWISE else ():
            if use.value in self.fused or use.value in self.made.keys() - self.regions:
                found |= dict.fromkeys(self.summed(use.value))
        return list(found)


def schedule(kernel: TiledKernel) -> ChunkSchedule:
    """The steps of one chunk of `kernel`."""
    return _Refinement(kernel).schedule()


def inputs(s: Made) -> tuple[Use, ...]:
    """What a statement uses; decays are sums between rows, and take no prefix sums."""
    if isinstance(s, Solve):
        return s.lower, s.right
    found = tuple(uses(s))
    return (*found[:-3], found[-1]) if s.value.op in DECAYED else found


@lru_cache(maxsize=65536)
def zero_above(t: Tile) -> bool:
    """Whether a C x C tile is zero above the diagonal."""
    if t.op in (TileOp.MASK, TileOp.DECAY, TileOp.DECAYED_DOT, TileOp.INVERSE):
        return True
    if t.op is TileOp.MAP:
        (fn,) = t.attrs
        square = [zero_above(a) for a in t.args if a.axes == SQUARE]
        if fn is Op.MUL:
            return any(square)
        return fn in (Op.ADD, Op.SUB, Op.NEG) and len(square) == len(t.args) and all(square)
    if t.op is TileOp.PRODUCT:
        return not any(t.attrs) and all(map(zero_above, t.args))
    return t.op in (TileOp.ROWS, TileOp.PHASE, TileOp.FLUSH) and zero_above(t.args[0])


def columns_exchanged(product: Product) -> bool:
    """Whether the right factor must be transposed for its columns to lie side by side."""
    axes = product.right.axes
    return len(axes) == 2 and axes[-1] is not product.value.axes[-1]


class _Refinement:
    def __init__(self, kernel: TiledKernel) -> None:
        is_scan = kernel.scan is not Loop.PARALLEL
        statements = kernel.inside if is_scan else kernel.before
        self._stores = [s for s in statements if isinstance(s, Store)]
        self._ends = {
            use.value: start for s in statements if isinstance(s, Advance) for start, use in s.ends
        }
        self._results = {s.use.value for s in self._stores} | set(self._ends)
        self._made: dict[Tile, Made] = {}
        for s in statements:
            if isinstance(s, Compute | Product):
                self._made[s.value] = self._solving(s)
        loads = (s for s in statements if isinstance(s, Load))
        self._loads = {s.value: s for s in loads if s.value.op not in _NUMBERS}
        before = kernel.before if is_scan else ()
        begun = [s.value for s in before if isinstance(s, Begin | Load)]
        self._held = tuple(t for t in begun if t.op not in _NUMBERS)
        self._order = self._needed(s.value for s in statements if isinstance(s, Load | Made))
        self._users: dict[Tile, list[Tile]] = defaultdict(list)
        for t in self._order:
            for a in dict.fromkeys(use.value for use in self._inputs(t)):
                self._users[a].append(t)
        kept = [t for t in self._order if t in self._made and not self._inlined(t)]
        self._fused = frozenset(f.value for t in kept for f in self._fusing(t))
        self._regions = frozenset((*self._held, *self._loads, *kept)) - self._fused

    def schedule(self) -> ChunkSchedule:
        in_place = {e: s for e, s in self._ends.items() if self._overwrites(e)}
        half: set[Tile] = set()
        for t in reversed(self._order):
            square = t.axes == SQUARE and t.op is not TileOp.INVERSE
            if t.op is TileOp.CUMSUM and not (t.attrs[0] or zero_above(t.args[0])):
                square = False  # entries above the diagonal count
            if square and t not in self._results and self._only_below(t, half):
                half.add(t)
        return ChunkSchedule(
            steps=tuple(self._steps(in_place)),
            held=self._held,
            made=self._made,
            regions=self._regions,
            fused=self._fused,
            half=frozenset(half),
            ends=frozenset(self._ends),
            in_place=in_place,
        )

    # ---- what is computed: solves, and what they and decays need -------------------------------

    def _solving(self, s: Compute | Product) -> Made:
        """A product with an inverse that this kernel computes is a solve."""
        if isinstance(s, Product):
            for a, b in ((s.left, s.right), (s.right, s.left)):
                inverse = self._made.get(a.value)
                if isinstance(inverse, Compute) and a.value.op is TileOp.INVERSE:
                    return Solve(s.value, inverse.args[0], b)
        return s

    def _inputs(self, t: Tile) -> tuple[Use, ...]:
        return inputs(self._made[t]) if t in self._made else ()

    def _needed(self, order: Iterable[Tile]) -> list[Tile]:
        """Those values that results need, in order."""
        needed = set(self._results)
        found = []
        for t in reversed(list(order)):
            if t in needed and t.op not in _NUMBERS:
                found.append(t)
                needed.update(use.value for use in self._inputs(t))
        return found[::-1]

    # ---- where a value is computed ---------------------------------------------------------------

    def _inlined(self, t: Tile) -> bool:
        if t.op not in POINTWISE or t in self._results or len(self._users[t]) != 1:
            return False
        (user,) = self._users[t]
        s = self._made[user]
        if isinstance(s, Solve):
            return t == s.right.value != s.lower.value
        streams = user.op in POINTWISE or user.op in (TileOp.SUM, TileOp.CUMSUM)
        inner = user.args[0] if user.op is TileOp.SUM else user
        return streams and len(t.axes) == len(inner.axes)

    def _fusing(self, root: Tile) -> list[Product]:
        """The products used by the statement of `root` alone, entry by entry."""
        found = []
        for use in self._inputs(root) if root.op in POINTWISE else ():
            x, s = use.value, self._made.get(use.value)
            if not use.axes == x.axes == root.axes:
                continue
            if isinstance(s, Product) and self._users[x] == [root] and x not in self._results:
                found.append(s)
            elif s is not None and x.op in POINTWISE and self._inlined(x):
                found += self._fusing(x)
        return found

    def _only_below(self, t: Tile, half: set[Tile]) -> bool:
        """Whether nobody looks at `t` above the diagonal."""
        for user in self._users[t]:
            if isinstance(self._made[user], Solve) or user.op in (TileOp.INVERSE, *DECAYED):
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
        if end not in self._made or end.op not in POINTWISE or self._users[end]:
            return False
        others = (e for e in self._ends if e != end and e in self._made)
        if any(Region(start) in self._reads(e) for e in others):
            return False
        read = {r.tile for r in self._factors(end) if not r.transposed}
        return end.axes == start.axes and start not in read

    # ---- steps -----------------------------------------------------------------------------------

    def _factors(self, t: Tile) -> set[Region]:
        """The regions that the products within the statement of `t` read."""
        found: set[Region] = set()
        for s in (self._made[t], *self._fusing(t)):
            if isinstance(s, Product):
                found |= {Region(s.left.value), Region(s.right.value, columns_exchanged(s))}
            elif s.value.op is TileOp.PRODUCT:
                left, right = inputs(s)
                found |= {Region(left.value), Region(right.value, bool(s.value.attrs[1]))}
        return found

    def _reads(self, t: Tile) -> frozenset[Region]:
        found = self._factors(t)
        if not isinstance(self._made[t], Product):
            self._look(t, found)
        return frozenset(found)

    def _look(self, t: Tile, found: set[Region]) -> None:
        for x in (use.value for use in self._inputs(t)):
            if x in self._regions:
                found.add(Region(x))
            elif x not in self._fused:
                self._look(x, found)

    def _steps(self, in_place: Mapping[Tile, Tile]) -> Iterator[Step]:
        """Ends that overwrite their starts come last: nothing else may see their new values."""
        exchanged: set[Tile] = set()
        ordered = sorted(self._order, key=lambda t: t in in_place)
        for t in (*self._held, *ordered):
            if t in self._loads:
                yield Step(self._loads[t], frozenset())
            elif t in self._made and t in self._regions:
                reads = self._reads(t)
                for x in sorted((r.tile for r in reads if r.transposed), key=lambda x: x.key):
                    if x not in exchanged:
                        exchanged.add(x)
                        yield Step(Transpose(x), frozenset((Region(x),)))
                yield Step(self._made[t], reads)
            for s in self._stores:
                if s.use.value == t:
                    yield Step(s, frozenset((Region(t),)))
        for s in self._stores:
            if s.use.value.op in _NUMBERS:
                yield Step(s, frozenset())
