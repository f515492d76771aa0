"""Micro-steps as rows of time: expressions of theirs as tiles of rows, and writes that share one.

A row is one micro-step of a token; what only some micro-steps have is zero in the rows of the
others. So a write of rows holds one write of each micro-step, or none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..dsl import algebra
from ..dsl.ir import Node, Op
from ..dsl.normal_form import Correction, NormalForm, Phase, Update, Write, results_of
from . import tile
from .lower import lower
from .tile import Axes, Tile, TileOp

Nodes = tuple[Node | None, ...]  # an expression per micro-step; None: 0 in its rows


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Expressions as tiles; `results`: of the reads that are known before."""

    form: NormalForm
    results: Mapping[int, Tile]

    def of(self, node: Node) -> Tile:
        """An expression over operands and results."""
        (found,) = lower(self.form, [node], self.results)
        used = {n: self.results[n] for n in results_of(node)}
        if used and not _is_smooth_at_zero(found, frozenset(used.values())):
            # beyond the end of a sequence a gradient may be 0 times infinity: it ends here
            masked = {n: Tile(TileOp.ROWS, (r,), (), r.axes, r.hint) for n, r in used.items()}
            (found,) = lower(self.form, [node], masked)
        return found

    def in_rows(self, nodes: Nodes, bound: Callable[[Tile], Tile] = lambda x: x) -> Tile:
        """Expressions of the micro-steps, one each, as one tile; 0 beyond a sequence's end."""
        return tile.rows(self._phased(nodes, bound))

    def _phased(self, nodes: Nodes, bound: Callable[[Tile], Tile]) -> Tile:
        tiles = [None if n is None else bound(self.of(n)) for n in nodes]
        known = [t for t in tiles if t is not None]
        if len(known) == len(tiles) and len(set(known)) == 1:
            return known[0]
        count = len(tiles)
        return tile.total([tile.phase(t, (m, count)) for m, t in enumerate(tiles) if t is not None])

    def values(self, nodes: Nodes, axes: Axes) -> Tile | None:
        """The same along all of `axes`; None if no micro-step has any."""
        if all(n is None for n in nodes):
            return None
        return tile.rows(tile.expand(self._phased(nodes, lambda x: x), axes))


def _is_smooth_at_zero(x: Tile, stop: frozenset[Tile]) -> bool:
    """Whether `x` and its derivative are finite for sure where the operands are zero."""
    steep = any(t.is_map(Op.SQRT) for t in tile.topological(x, stop=stop))
    return not steep and tile.finite_at_zero(x, stop)


def updates_of(form: NormalForm, state: str) -> list[Update]:
    """The updates of a state, one per micro-step."""
    return [u for m in form.micro_steps for u in m.updates if u.state == state]


@dataclass(slots=True)
class Recall:
    """What rows recall from a state before they write: a correction of each micro-step, or none."""

    state: str
    corrections: list[Correction | None]
    log_decays: Nodes  # the state's

    @property
    def keys(self) -> Nodes:
        return tuple(None if f is None else f.key for f in self.corrections)

    @property
    def _sees_decay(self) -> list[bool]:
        """Whether corrections see their own row's decay, of those rows that have one."""
        pairs = zip(self.corrections, self.log_decays, strict=True)
        return [f.decayed for f, g in pairs if f is not None and g is not None]

    @property
    def phase(self) -> Phase:
        """What all of its rows see at least: rows that see more decay their keys (`late`)."""
        return Phase.DECAYED if all(self._sees_decay) else Phase.BEFORE

    @property
    def late(self) -> Nodes:
        """Log-decays of rows by which keys are to be decayed first."""
        if self.phase is Phase.DECAYED or not any(self._sees_decay):
            return ()
        pairs = zip(self.corrections, self.log_decays, strict=True)
        return tuple(g if f is not None and f.decayed else None for f, g in pairs)

    def holds(self, m: int, f: Correction) -> bool:
        """Whether it is, or can be, the one of micro-step `m` that `f` adds a multiple of."""
        own = self.corrections[m]
        same = own is None or (own.key, own.decayed) == (f.key, f.decayed)
        return self.state == f.state and same


@dataclass(slots=True)
class RowWrite:
    """A write of rows to a state: one of each micro-step, or none. `recalls`: by number."""

    state: str
    writes: list[Write | None]
    recalls: dict[int, list[Node | None]] = field(default_factory=dict)  # scales

    @property
    def keys(self) -> Nodes:
        return tuple(None if w is None else w.key for w in self.writes)

    @property
    def values(self) -> Nodes:
        return tuple(None if w is None else w.value for w in self.writes)

    def recalls_alike(self, m: int, w: Write) -> bool:
        """Whether `w` is what the write of micro-step `m` is, but for what it recalls."""
        own = self.writes[m]
        if own is None or own.key != w.key or w.value is not None or w.correction is None:
            return False
        return any(scales[m] == w.correction.scale for scales in self.recalls.values())


@dataclass(frozen=True, slots=True)
class Payload:
    """A value and what is recalled with it, by scales, which writes add by factors of theirs."""

    values: Nodes
    recalls: Mapping[int, Nodes]


def payloads(writes: Sequence[RowWrite]) -> tuple[list[Payload], list[tuple[int, Nodes | None]]]:
    """What is written, and of each write the number of its payload and its factor; None: 1.

    One error that moves several states, by a step size each, is one payload, solved for once.
    """
    apart = [_apart(w) for w in writes]
    keys = [(p.values, tuple(p.recalls.items())) for _, p in apart]
    found: dict[object, Payload] = {}
    placed: list[tuple[int, Nodes | None]] = []
    for n, (w, (factor, payload), key) in enumerate(zip(writes, apart, keys, strict=True)):
        alone = keys.count(key) == 1
        own = Payload(w.values, {r: tuple(s) for r, s in w.recalls.items()}) if alone else payload
        found.setdefault(n if alone else key, own)
        placed.append((list(found).index(n if alone else key), None if alone else factor))
    return list(found.values()), placed


def _apart(w: RowWrite) -> tuple[Nodes, Payload]:
    """The Scalar factors that value and scales have, and what is left of these without them."""
    terms = [w.values, *(tuple(s) for s in w.recalls.values())]
    by_step = [algebra.common_factor([t[m] for t in terms]) for m in range(len(w.writes))]
    value, *scales = zip(*(left for _, left in by_step), strict=True)
    return tuple(f for f, _ in by_step), Payload(value, dict(zip(w.recalls, scales, strict=True)))


def row_writes(
    form: NormalForm, states: Sequence[str]
) -> tuple[list[RowWrite], list[list[Recall]]]:
    """The writes of rows to a group of states, as few as will do, and what they recall.

    Writes that recall the same share one recall; recalls that all writes take alike are one sum.
    """
    count = len(form.micro_steps)
    writes: list[RowWrite] = []
    recalls: list[Recall] = []
    for state in states:
        own: list[RowWrite] = []
        for m, update in enumerate(updates_of(form, state)):
            for w in update.writes:
                into = _into(own, m, w)
                if into is None:
                    into = RowWrite(state, [None] * count)
                    own.append(into)
                into.writes[m] = into.writes[m] or w
                if w.correction is not None:
                    n = _recall(form, recalls, m, w.correction)
                    scales = into.recalls.setdefault(n, [None] * count)
                    parts = [x for x in (scales[m], w.correction.scale) if x is not None]
                    scales[m] = algebra.total(parts)
        writes += own
    return writes, _summed(writes, recalls)


def _into(own: Sequence[RowWrite], m: int, w: Write) -> RowWrite | None:
    """The write of rows that takes `w` of micro-step `m`: one that recalls alike, or is free."""
    alike = (x for x in own if x.recalls_alike(m, w))
    if (found := next(alike, None)) is not None:
        return found
    free = [x for x in own if x.writes[m] is None]
    fit = (x for x in free if bool(x.recalls) is (w.correction is not None))
    return next(fit, free[0] if free else None)


def _summed(writes: list[RowWrite], recalls: list[Recall]) -> list[list[Recall]]:
    """Recalls that every write has with the same scales, together; numbers in `writes` follow."""
    sums: dict[tuple[object, ...], list[int]] = {}
    for r in range(len(recalls)):
        users = (tuple(w.recalls[r]) if r in w.recalls else None for w in writes)
        sums.setdefault(tuple(users), []).append(r)
    for w in writes:
        numbered = enumerate(sums.values())
        w.recalls = {n: w.recalls[rs[0]] for n, rs in numbered if rs[0] in w.recalls}
    return [[recalls[r] for r in rs] for rs in sums.values()]


def _recall(form: NormalForm, recalls: list[Recall], m: int, f: Correction) -> int:
    """The number of the recall that `f` of micro-step `m` belongs to, new if there is none."""
    fits = [n for n, r in enumerate(recalls) if r.holds(m, f)]
    same = [n for n in fits if recalls[n].corrections[m] is not None]
    n = next(iter((*same, *fits)), len(recalls))
    if n == len(recalls):
        log_decays = tuple(u.log_decay for u in updates_of(form, f.state))
        recalls.append(Recall(f.state, [None] * len(log_decays), log_decays))
    recalls[n].corrections[m] = f
    return n
