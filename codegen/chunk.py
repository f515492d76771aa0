"""The chunkwise form of a normal form, for any of its classes: equations (3) to (7) of
docs/explanation/mathematics.md.

For each state, G is the inclusive prefix sum of the log-decay from the chunk's start, H its sum
over the tokens after one, and u_j the value that token j writes, corrected by its recall (the UT
transform of the delta rule):

    u_i = value_i + s_i (b_i e^P_i)^T S_0 + s_i sum_{j<i} <b_i, w_j>_{P,G} u_j    solved by (1+L)^-1
    r_i = (c_i e^P_i)^T S_0 + sum_j <c_i, w_j>_{P,G} u_j                          reads
    r_i = e^P_i (S_0 c_i) + sum_j (u_j^T c_i) e^{P_i - G_j} w_j                   reads over columns
    S'  = e^{G_C} S_0 + sum_j (w_j e^{H_j}) u_j^T

The first summand of a read is inter-chunk, the second intra-chunk. P is G where the decayed state
is read, and the exclusive prefix where the state is read before its decay.

A state whose columns decay, or are recalled, is held transposed: its columns are the rows of these
equations, the axis K of tiles.

Several micro-steps expand time: a row is one micro-step of a token, the state passes through all of
them, and the output is read in the last row of each token. A term that only some micro-steps have
(a decay, say) is zero in the rows of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..dsl.decay import SMALLEST
from ..dsl.errors import NotLowered
from ..dsl.ir import Kind, Node, Op, topological
from ..dsl.normal_form import (
    Correction,
    NormalForm,
    Phase,
    Read,
    Update,
    Write,
    levels_of,
    of_update,
    results_of,
)
from . import gates, tile
from .buffers import OUTPUT, BufferId
from .gates import Gate, decayed_apply, decayed_dot
from .lower import kind_axes, lower
from .tile import Axis, Tile, TileOp, Which

# e^-110 is 0 in float32. A log-decay below is as good as this one, and sums of it stay finite.
LEAST_LOG_DECAY = -110.0
# A smaller factor of the state vanishes beside any state, in float64 too. Products with this one
# are still normal numbers in float32: the factor's gradient divides by it.
LEAST_FACTOR = 2.0**-63
# Smaller decays by factors become 0, except where the factor's gradient divides by them: a factor
# of 0 forgets the state exactly.
LEAST_DECAY = 1.5 * LEAST_FACTOR


@dataclass(frozen=True, slots=True)
class Carried:
    """A value that a scan carries from chunk to chunk: as the chunk begins, and as it ends."""

    start: Tile
    end: Tile

    @property
    def name(self) -> str:
        return str(self.start.attrs[0])


Named = tuple[tuple[BufferId, Tile], ...]  # tiles under the names of buffers that hold them


@dataclass(frozen=True, slots=True)
class ChunkProgram:
    """One chunk, the body of a scan: outputs and carries as functions of operands and the carry.

    `transposed`: states are held transposed, so that axis K of tiles has the channels of Values.
    """

    outputs: Named
    carried: tuple[Carried, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class _Gate:
    """A log-decay and its sums; None without a decay. A read before the decay excludes token i."""

    log_decay: Tile | None
    inclusive: Tile | None
    exclusive: Tile | None
    following: Tile | None
    whole: Tile | None

    @property
    def is_factor(self) -> bool:
        """Whether it is the log of a factor, which may be 0."""
        g = self.log_decay
        return g is not None and any(t.is_map(Op.LOG) for t in tile.topological(g))

    def decay(self, x: Tile) -> Tile:
        """`x`, a decay; flushed to 0 below LEAST_DECAY where the gate is a factor."""
        return gates.flush(x, LEAST_DECAY) if self.is_factor else x

    def exp(self, total: Tile) -> Tile:
        """The decay of a sum of log-decays."""
        return self.decay(tile.exp(total).named("e_" + total.hint))

    def prefix(self, *, exclusive: bool) -> Tile | None:
        """The sum from the chunk's start."""
        return self.exclusive if exclusive else self.inclusive

    def of_channels(self, *, exclusive: bool) -> Gate | None:
        """The gate as products under it take it, if channels decay one by one."""
        g, inclusive, to = self.log_decay, self.inclusive, self.prefix(exclusive=exclusive)
        if g is None or inclusive is None or to is None or Axis.K not in g.axes:
            return None
        return Gate(g, to, inclusive, exclusive, self.is_factor)

    def between(self, scores: Tile, which: Which, *, exclusive: bool) -> Tile:
        """`scores` decayed from j to i by a scalar gate, for j < i (STRICT) or j <= i (LOWER)."""
        g = self.log_decay
        if g is None:
            return tile.mask(scores, which)
        if not exclusive:  # one D, with its diagonal, for all scores of the chunk
            decay = self.decay(gates.decay(g, Which.LOWER).named("D"))
            return tile.mask(tile.mul(scores, decay), which)
        decay = self.decay(gates.decay(g, which, exclusive=True).named("D_before"))
        return tile.mul(scores, decay)


def derive(form: NormalForm, *, hoist_products: bool = False) -> ChunkProgram:
    """The chunk of `form`. `hoist_products`: T(x - bS) as Tx - (Tb)S, so that Tb needs no state.

    Raises NotLowered for a normal form outside the lowered classes.
    """
    for what, why in _refusals(form):
        instead = 'call it with engine="reference", which runs it token by token'
        raise NotLowered(what=f"{form.name}: {what}", why=why, instead=instead)
    kinds = {s.name: s.kind for s in form.states}
    chunks: dict[str, _StateChunk] = {}
    results: dict[int, Tile] = {}
    for level in levels_of(form):
        for name in level.states:
            chunks[name] = _StateChunk(form, name, kinds[name], hoist_products, results)
        for n in level.reads:
            results[n] = chunks[form.reads[n].state].read(form.reads[n])
    output = _lowered(form, form.output, results)
    channels = kind_axes(form.output.kind, transposed=form.transposed)
    output = tile.expand(output, tile.axes_of(Axis.I, *channels)).named("o")
    carried = tuple(chunks[s.name].carried for s in form.states)
    return ChunkProgram(((OUTPUT, output),), carried, form.transposed)


def _lowered(form: NormalForm, node: Node, results: Mapping[int, Tile]) -> Tile:
    """An expression over operands and `results` as a tile."""
    (found,) = lower(form, [node], results)
    used = {n: results[n] for n in results_of(node)}
    if used and not tile.smooth_at_zero(found, frozenset(used.values())):
        # beyond the end of a sequence a gradient may be 0 times infinity: it ends here
        masked = {n: Tile(TileOp.ROWS, (r,), (), r.axes, r.hint) for n, r in used.items()}
        (found,) = lower(form, [node], masked)
    return found


def _refusals(form: NormalForm) -> Iterator[tuple[str, str]]:
    """What of a form the chunk derivation does not lower yet, and why."""
    for updates in _by_state(form).values():
        if any(u.mixes for u in updates):
            yield "coupled states", "the chunk form of coupled states is not derived yet"
        shapes = {tuple(w.correction and w.correction.decayed for w in u.writes) for u in updates}
        if len(shapes) > 1:
            why = "micro-steps become rows of one form, so each must write as the others do"
            yield "micro-steps that write differently", why
        for update in updates:
            corrections = [w.correction for w in update.writes if w.correction]
            if len(corrections) > 1:
                why = "the chunk form solves for one low-rank term per token so far"
                yield f"{len(corrections)} low-rank terms in one step", why
            if any(f.state != update.state for f in corrections):
                yield "a write that recalls another state", "coupled states are not derived yet"
    if not _indices_are_rows(form):
        why = "a row of time holds one micro-step's operands and no other's"
        yield "an operand or read of micro-steps outside its own", why
    read = [form.reads[n] for n in results_of(form.output)]
    if any(r.micro_step != len(form.micro_steps) - 1 for r in read):
        why = "outputs are read in the last row of a token so far"
        yield "a read before the last micro-step", why


def _indices_are_rows(form: NormalForm) -> bool:
    """Whether a micro-step's expressions take its own operands and reads only."""
    last = len(form.micro_steps) - 1
    pairs = [(last, form.output), *((r.micro_step, r.key) for r in form.reads)]
    for m, micro_step in enumerate(form.micro_steps):
        updates = [n for u in micro_step.updates for n in of_update(u)]
        if any(form.reads[n].micro_step != m for n in results_of(*updates)):
            return False
        pairs += [(m, n) for n in updates]
    return all(
        leaf.attrs[1] in (None, m)
        for m, node in pairs
        for leaf in topological(node)
        if leaf.op is Op.OPERAND
    )


def _by_state(form: NormalForm) -> dict[str, list[Update]]:
    """The updates of each state, one per micro-step."""
    return {
        s.name: [u for m in form.micro_steps for u in m.updates if u.state == s.name]
        for s in form.states
    }


class _StateChunk:
    """The chunk form of one state, shared by its updates and its reads."""

    def __init__(
        self,
        form: NormalForm,
        state: str,
        kind: Kind,
        hoist_products: bool,
        results: Mapping[int, Tile],
    ) -> None:
        self._form = form
        self._results = results  # of the reads that are known before
        self._kind = kind
        self._start = tile.carry(state, kind_axes(kind))
        self._hoist = hoist_products
        updates = _by_state(form)[state]
        self._gate = self._prefixes([u.log_decay for u in updates])
        # the n-th write of every micro-step is one write of rows
        writes = list(zip(*(u.writes for u in updates), strict=True))
        self._keys = [tile.rows(self._in_rows([w.key for w in ws])).named("w") for ws in writes]
        self._written = self._solve(writes)
        self.carried = Carried(self._start, self._next())

    def _in_rows(
        self, nodes: Sequence[Node | None], bound: Callable[[Tile], Tile] = lambda x: x
    ) -> Tile:
        """The expressions of the micro-steps, one each (None: 0), as one tile of rows."""
        tiles = [
            None if n is None else bound(_lowered(self._form, n, self._results)) for n in nodes
        ]
        known = [t for t in tiles if t is not None]
        if len(known) == len(tiles) and len(set(known)) == 1:
            return known[0]
        count = len(tiles)
        return tile.total([tile.phase(t, (m, count)) for m, t in enumerate(tiles) if t is not None])

    def _prefixes(self, log_decays: list[Node | None]) -> _Gate:
        if all(n is None for n in log_decays):
            return _Gate(None, None, None, None, None)
        g = tile.rows(self._in_rows(log_decays, _bounded)).named("g")
        return _Gate(
            log_decay=g,
            inclusive=gates.cumsum(g).named("G"),
            exclusive=gates.cumsum(g, exclusive=True).named("G_before"),
            following=gates.cumsum(g, reverse=True, exclusive=True).named("H"),
            whole=tile.reduce(g, (Axis.I,)).named("G_C"),
        )

    def _values(self, nodes: list[Node | None]) -> Tile | None:
        if all(n is None for n in nodes):
            return None
        axes = (Axis.V,) if self._kind is Kind.STATE else ()
        return tile.rows(tile.expand(self._in_rows(nodes), tile.axes_of(Axis.I, *axes)))

    def _scores(self, x: Tile, key: Tile, which: Which, *, exclusive: bool) -> Tile:
        """<x_i, key_j> decayed from j to i, for j < i (STRICT) or j <= i (LOWER)."""
        gate = self._gate.of_channels(exclusive=exclusive)
        if gate is None:
            products = tile.contract(x, tile.rename(key, Axis.J), Axis.K)
            return self._gate.between(products, which, exclusive=exclusive)
        strict = decayed_dot(x, key, gate)
        if which is Which.STRICT:
            return strict
        diagonal = tile.contract(x, key, Axis.K)  # e^0 for every gate: never formed
        return tile.add(strict, tile.mask(diagonal, Which.DIAGONAL))

    def _combine(self, x: Tile, values: Tile, key: Tile, which: Which, *, exclusive: bool) -> Tile:
        """sum_j <x_i, values_j> key_j, decayed from j to i: [I, K]."""
        products = tile.contract(x, tile.rename(values, Axis.J), Axis.V)
        gate = self._gate.of_channels(exclusive=exclusive)
        if gate is None:
            return self._gather(self._gate.between(products, which, exclusive=exclusive), key)
        strict = decayed_apply(products, tile.rename(key, Axis.J), gate, Axis.I)
        if which is Which.STRICT:
            return strict
        own = tile.reduce(tile.mask(products, Which.DIAGONAL), (Axis.J,))
        return tile.add(strict, tile.mul(own, key))

    def _recall(self, x: Tile, *, exclusive: bool) -> Tile:
        """x decayed to the chunk's start: the factor of S_0."""
        prefix = self._gate.prefix(exclusive=exclusive)
        return x if prefix is None else tile.mul(x, self._gate.exp(prefix))

    def _gather(self, scores: Tile, values: Tile) -> Tile:
        return tile.contract(scores, tile.rename(values, Axis.J), Axis.J)

    def _solve(self, writes: list[tuple[Write, ...]]) -> list[Tile]:
        """The written values, [I, V]: each write's value and correction, solved for the chunk."""
        values = [self._values([w.value for w in ws]) for ws in writes]
        for n, ws in enumerate(writes):
            corrections = [w.correction for w in ws if w.correction]
            if corrections:
                values[n] = self._solved(corrections, values, n)
        written = []
        for value in values:
            assert value is not None, "a write has a value or a correction"
            written.append(value)
        return written

    def _solved(self, corrections: list[Correction], values: list[Tile | None], at: int) -> Tile:
        b = tile.rows(self._in_rows([f.key for f in corrections])).named("b")
        # a scale that divides by a norm is NaN beyond the end of a sequence
        scale = tile.rows(self._in_rows([f.scale for f in corrections]))
        exclusive = not corrections[0].decayed
        free = [] if values[at] is None else [values[at]]
        for n, (key, value) in enumerate(zip(self._keys, values, strict=True)):
            if n != at and value is not None:
                scores = self._scores(b, key, Which.STRICT, exclusive=exclusive)
                free.append(tile.mul(scale, self._gather(scores, value)))
        known = [f for f in free if f is not None]
        own = self._scores(b, self._keys[at], Which.STRICT, exclusive=exclusive)
        tied = tile.mul(scale, own)
        solve = tile.inverse(tile.neg(tied).named("L")).named("T")
        recall = self._recall(b, exclusive=exclusive)
        if self._hoist:
            w = self._gather(solve, tile.mul(scale, recall)).named("W")
            parts = [tile.contract(w, self._start, Axis.K)]
            if known:
                parts.insert(0, self._gather(solve, tile.total(known)).named("TX"))
            return tile.total(parts).named("U")
        recalled = tile.mul(scale, tile.contract(recall, self._start, Axis.K))
        return self._gather(solve, tile.total([*known, recalled]).named("X")).named("U")

    def _next(self) -> Tile:
        whole, following = self._gate.whole, self._gate.following
        parts = [self._start if whole is None else tile.mul(self._gate.exp(whole), self._start)]
        for key, written in zip(self._keys, self._written, strict=True):
            decayed = key if following is None else tile.mul(key, self._gate.exp(following))
            parts.append(tile.contract(decayed, written, Axis.I))
        return tile.total(parts).named(str(self._start.attrs[0]) + "_next")

    def read(self, read: Read) -> Tile:
        """key^T S at the read's moment: [I, V], or [I] of a KeyState; or S key: [I, K]."""
        c = tile.rows(_lowered(self._form, read.key, self._results)).named("c")
        exclusive = read.phase is Phase.BEFORE
        which = Which.LOWER if read.phase is Phase.AFTER else Which.STRICT
        writes = list(zip(self._keys, self._written, strict=True))
        if read.other_axis is not self._form.transposed:
            start = tile.contract(c, self._start, Axis.V)
            parts = [self._recall(start, exclusive=exclusive)]
            parts += [self._combine(c, u, w, which, exclusive=exclusive) for w, u in writes]
            return tile.total(parts)
        parts = [tile.contract(self._recall(c, exclusive=exclusive), self._start, Axis.K)]
        for key, written in writes:
            scores = self._scores(c, key, which, exclusive=exclusive).named("A")
            parts.append(self._gather(scores, written))
        return tile.total(parts)


def _bounded(log_decay: Tile) -> Tile:
    """A log-decay whose sums are finite: a decay of 0 becomes one that no dtype can tell from it.

    A log-decay so low has no gradient. A factor f of the state gets df = dg / f with the f
    that was used, which is right where f is 0.
    """
    below = tile.topological(log_decay)
    if not any(t.op in (TileOp.TOKEN, TileOp.HEAD) for t in below):
        return log_decay  # a number of the call, finite

    def rule(t: Tile, args: tuple[Tile, ...]) -> Tile:
        if t.is_map(Op.MAXIMUM) and tile.const(SMALLEST) in t.args:
            return gates.floor(args[0], LEAST_FACTOR)  # the floor of `dsl.decay`
        return tile.with_args(t, args)

    bounded = tile.rewritten((log_decay,), rule)[log_decay]
    return gates.floor(bounded.named("g"), LEAST_LOG_DECAY)
