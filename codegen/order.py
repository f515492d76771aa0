"""Orders the statements of a tiled kernel so that few values are alive at once.

A tile in float32 that waits for its use occupies registers in every thread, and a kernel that holds
one too many spills in every step of its loop. The measure of an order is its peak: the most
elements of computed matrices that are alive at one time. Loads do not count: operands of products
are read from shared memory, and a loop fetches them ahead of their use wherever they stand. A phase
keeps the order it has where no other has a smaller peak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import tiled
from .tile import POINTWISE, Tile

_WIDTH = 16  # orders of a phase that are followed at a time


def ordered(kernel: tiled.TiledKernel, again: frozenset[Tile] = frozenset()) -> tiled.TiledKernel:
    """`kernel`, each phase in an order of a smaller peak, if one is found.

    `again`: values that are computed at each use, and wait nowhere.
    """
    uses = Counter(use.value for s in kernel.statements for use in tiled.uses(s))
    phases = []
    for phase in (kernel.before, kernel.inside, kernel.after):
        others = {u.value for s in kernel.statements if s not in phase for u in tiled.uses(s)}
        phases.append(_Phase(kernel, phase, uses, others, again).ordered())
    before, inside, after = phases
    return replace(kernel, before=before, inside=inside, after=after)


def stored_early(statements: Iterable[tiled.Statement]) -> tuple[tiled.Statement, ...]:
    """`statements`, each store behind what makes its value."""
    made: list[tiled.Statement] = [s for s in statements if not isinstance(s, tiled.Store)]
    for store in (s for s in statements if isinstance(s, tiled.Store)):
        after = (
            n
            for n, s in enumerate(made)
            if isinstance(s, tiled.Compute | tiled.Product) and s.value == store.use.value
        )
        made.insert(next(after, len(made)) + 1, store)
    return tuple(made)


@dataclass(slots=True)
class _Group:
    """A statement, with those before it whose values it alone uses, elementwise.

    `made`: the values that later groups use. `in_place`: values that may lie where `made` will.
    """

    statements: list[tiled.Statement]
    reads: frozenset[Tile]
    writes: frozenset[Tile]
    in_place: frozenset[Tile]


class _State(NamedTuple):
    """Part of an order: its peak so far, what is alive after it, and its groups as bits."""

    peak: int
    alive: int
    groups: tuple[int, ...]
    done: int


class _Phase:
    """The statements of a phase in groups, and what has to come before what."""

    def __init__(
        self,
        kernel: tiled.TiledKernel,
        phase: tuple[tiled.Statement, ...],
        uses: Counter[Tile],
        others: set[Tile],
        again: frozenset[Tile],
    ) -> None:
        self._kernel, self._phase, self._others = kernel, phase, others
        self._loads = {s.value: s for s in phase if isinstance(s, tiled.Load)}
        self._groups = self._grouped(uses)
        self._needs = [self._before(n) for n in range(len(self._groups))]
        self._users: dict[Tile, int] = {}
        for n, group in enumerate(self._groups):
            for t in group.reads:
                self._users[t] = self._users.get(t, 0) | 1 << n
        made = {t for g in self._groups for t in g.writes}
        self._sizes = {t: self._size(t) for t in made - again if self._is_made_here(t)}

    def _grouped(self, uses: Counter[Tile]) -> list[_Group]:
        groups: list[_Group] = []
        waiting: dict[Tile, _Group] = {}
        cleaned = {s.value for s in self._phase if isinstance(s, tiled.Clean)}
        for s in self._phase:
            if isinstance(s, tiled.Load):
                continue
            values = dict.fromkeys(use.value for use in tiled.uses(s))  # in order, unlike a set
            merged = [waiting.pop(t) for t in values if t in waiting]
            used = set(values)
            writes, elementwise = _written(s), _is_elementwise(s)
            reads, in_place = used | (writes if _reads_own(s) else set()), set[Tile]()
            if elementwise:
                in_place |= used
            elif isinstance(s, tiled.Product) and s.start is not None:
                in_place.add(s.start.value)
            for g in merged:
                (own,) = g.writes
                reads = (reads - {own}) | g.reads
                if own in in_place:
                    in_place = (in_place - {own}) | g.in_place
            statements = [x for g in merged for x in g.statements]
            group = _Group([*statements, s], *map(frozenset, (reads, writes, in_place)))
            (value,) = writes if len(writes) == 1 else (None,)
            alone = value is not None and uses[value] == 1 and value not in self._others
            alone = alone and value not in cleaned
            if alone and isinstance(s, tiled.Compute | tiled.Product) and not s.adds:
                assert value is not None
                if value.op in POINTWISE:
                    waiting[value] = group
                    continue
            groups.append(group)
        return [*groups, *waiting.values()]

    def _before(self, n: int) -> int:
        """The groups that group `n` needs done, as bits."""
        own, needed = self._groups[n], 0
        for m, other in enumerate(self._groups[:n]):
            if other.writes & (own.reads | own.writes) or other.reads & own.writes:
                needed |= 1 << m
        return needed

    def _is_made_here(self, t: Tile) -> bool:
        """Whether `t` takes registers from its statement on: sums and carries do all along."""
        return t not in self._loads and not any(
            isinstance(s, tiled.Zero | tiled.Begin) and s.value == t
            for s in self._kernel.statements
        )

    def _size(self, t: Tile) -> int:
        """Of a tile of two axes: vectors and numbers are no reason for another order."""
        return math.prod(self._kernel.extents[a] for a in t.axes) if len(t.axes) > 1 else 0

    @property
    def peak(self) -> int:
        """That of the order in which the phase is."""
        return self._follow(tuple(range(len(self._groups)))).peak

    def _follow(self, order: tuple[int, ...]) -> _State:
        state = _State(0, 0, (), 0)
        for n in order:
            state = self._then(state, n)
        return state

    def _then(self, state: _State, n: int) -> _State:
        group, done = self._groups[n], state.done | 1 << n
        dying = {
            t
            for t in group.reads
            if t in self._sizes and t not in self._others and not self._users[t] & ~done
        }
        made = sum(self._sizes.get(t, 0) for t in group.writes)
        freed = sum(self._sizes[t] for t in dying if t not in group.writes)
        over = sum(self._sizes[t] for t in dying if t in group.in_place)
        most = state.alive + max(made - over, 0)
        alive = state.alive + made - freed
        return _State(max(state.peak, most), alive, (*state.groups, n), done)

    def ordered(self) -> tuple[tiled.Statement, ...]:
        """The statements in an order of the smallest peak found; as they are where that is it."""
        states = [_State(0, 0, (), 0)]
        for _ in self._groups:
            after: dict[int, _State] = {}
            for state in states:
                for n, needs in enumerate(self._needs):
                    if state.done >> n & 1 or needs & ~state.done:
                        continue
                    new = self._then(state, n)
                    if new.done not in after or new < after[new.done]:
                        after[new.done] = new
            states = sorted(after.values())[:_WIDTH]
        best = states[0]
        return self._phase if best.peak >= self.peak else self._written_out(best.groups)

    def _written_out(self, order: tuple[int, ...]) -> tuple[tiled.Statement, ...]:
        """The groups in `order`, each load before the first statement that uses it."""
        made: list[tiled.Statement] = []
        loads = dict(self._loads)
        for n in order:
            for s in self._groups[n].statements:
                changed = {s.value} if isinstance(s, tiled.Clean) else set()
                for t in (*(use.value for use in tiled.uses(s)), *changed):
                    if t in loads:
                        made.append(loads.pop(t))
                made.append(s)
        return (*loads.values(), *made)  # what only later phases use comes first


def _written(s: tiled.Statement) -> set[Tile]:
    if isinstance(s, tiled.Advance):
        return {start for start, _ in s.ends}
    if isinstance(s, tiled.Store | tiled.Finish | tiled.Arrive):
        return set()
    return {s.value}


def _reads_own(s: tiled.Statement) -> bool:
    adds = isinstance(s, tiled.Compute | tiled.Product) and s.adds
    return adds or isinstance(s, tiled.Clean)


def _is_elementwise(s: tiled.Statement) -> bool:
    pointwise = isinstance(s, tiled.Compute) and s.value.op in POINTWISE
    return pointwise or isinstance(s, tiled.Store | tiled.Advance | tiled.Clean)
