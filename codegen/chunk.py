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

States that mix, or recall one another, are a group: what a write to one leaves in another takes
the place of the decay (codegen/transitions), and the recalls of all are one system (codegen/solve).
A recall that one payload uses is solved for with it, as u; one that several use, for itself. Writes
that differ by a number per row alone, in what states they move and how far, have one payload.
Recalls that all writes take with one scale are one unknown, their sum.

Several micro-steps expand time: a row is one micro-step of a token, the state passes through all of
them, and the output is read in the last row of each token. What only some micro-steps have (a
decay, a write, a recall) is zero in the rows of the others (codegen/rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..dsl import algebra
from ..dsl.decay import SMALLEST
from ..dsl.errors import NotLowered
from ..dsl.ir import Kind, Node, Op
from ..dsl.normal_form import (
    NormalForm,
    Phase,
    groups_of,
    levels_of,
)
from ..dsl.step import output_names
from . import gates, tile
from .buffers import BufferId, output
from .coordinates import Coordinates, Seen
from .gates import LEAST_FACTOR
from .lower import kind_axes
from .reads import added_up
from .refusals import refusals
from .rows import Nodes, Recall, RowTiles, payloads, row_writes, updates_of
from .solve import add_to, eliminate, gather
from .tile import Axis, Tile, TileOp, Which
from .transitions import StateGate, Transitions, under

# e^-110 is 0 in float32. A log-decay below is as good as this one, and sums of it stay finite.
LEAST_LOG_DECAY = -110.0


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


def derive(form: NormalForm, *, hoist_products: bool = False) -> ChunkProgram:
    """The chunk of `form`. `hoist_products`: T(x - bS) as Tx - (Tb)S, so that Tb needs no state.

    Raises NotLowered for a normal form outside the lowered classes.
    """
    for what, why in refusals(form):
        instead = 'call it with engine="reference", which runs it token by token'
        raise NotLowered(what=f"{form.name}: {what}", why=why, instead=instead)
    coordinates = Coordinates(form)
    results: dict[int, Tile] = {}
    tiles = RowTiles(form, results)
    chunks: dict[str, _GroupChunk] = {}
    for level in levels_of(form):
        results |= coordinates.leaves(tiles, level.states)
        for names in groups_of(coordinates.form, level.states):
            chunk = _GroupChunk(coordinates, tiles, names, hoist_products)
            chunks |= dict.fromkeys(names, chunk)
        for n in level.reads:
            parts = coordinates.reads(form.reads[n])
            results[n] = tile.total([x for p in parts for x in chunks[p.read.state].read(p)])
    outputs = []
    for name, node in zip(output_names(len(form.outputs)), form.outputs, strict=True):
        axes = tile.axes_of(Axis.I, *kind_axes(node.kind, transposed=form.transposed))
        joined = added_up(form, coordinates, node)
        made = tiles.of(node) if joined is None else _total(tiles, chunks, *joined)
        outputs.append((output(name), tile.expand(made, axes).named(name)))
    carried = tuple(
        Carried(chunk.starts[s.name], chunk.ends[s.name].named(s.name + "_next"))
        for s, chunk in ((s, chunks[s.name]) for s in form.states)
    )
    return ChunkProgram(tuple(outputs), carried, form.transposed)


def _total(
    tiles: RowTiles, chunks: Mapping[str, _GroupChunk], reads: Sequence[Seen], rest: Node | None
) -> Tile:
    """The sum of reads and of `rest`; written values that several of them see are taken once."""
    parts = [] if rest is None else [tiles.of(rest)]
    scores: dict[Tile, Tile] = {}
    for seen_read in reads:
        own, gathered = chunks[seen_read.read.state].parts(seen_read)
        parts += own
        for values, seen in gathered:
            add_to(scores, values, seen)
    return tile.total([*parts, *(gather(x.named("A"), u) for u, x in scores.items())])


class _GroupChunk:
    """The chunk form of a group of states of one kind, shared by their updates and reads."""

    def __init__(
        self,
        coordinates: Coordinates,
        tiles: RowTiles,
        names: tuple[str, ...],
        hoist_products: bool,
    ) -> None:
        self._form, self._tiles, self._coordinates = coordinates.form, tiles, coordinates
        (self._kind,) = {s.kind for s in self._form.states if s.name in names}
        self.starts = {n: tile.carry(n, kind_axes(self._kind)) for n in names}
        self._hoist = hoist_products
        state_gates = {n: StateGate.of(self._log_decay(n)) for n in names}
        self._columns = {n: StateGate.of(self._log_decay(n, columns=True)) for n in names}
        self._transitions = Transitions(state_gates, dict(self._mixes(names)))
        self._writes, recalls = row_writes(self._form, names)
        self._keys = [tiles.in_rows(w.keys).named("w") for w in self._writes]
        self._payloads, placed = payloads(self._writes)
        factors = (None if f is None else self._scale(f) for _, f in placed)
        self._placed = list(zip((p for p, _ in placed), factors, strict=True))
        self._written = self._solve(recalls)
        at_end = coordinates.leaves_at_end(tiles, names)
        late = replace(tiles, results={**tiles.results, **at_end})
        self._late_keys = [late.in_rows(w.keys).named("w") for w in self._writes]
        starts = {s.name: tile.carry(s.name, kind_axes(s.kind)) for s in self._form.states}
        self._turned = coordinates.at_end(tiles, names, starts)
        self.ends = {n: self._next(n) for n in names}

    def _log_decay(self, state: str, *, columns: bool = False) -> Tile | None:
        updates = updates_of(self._form, state)
        logs = tuple(u.columns if columns else u.log_decay for u in updates)
        if all(n is None for n in logs):
            return None
        return self._tiles.in_rows(logs, _bounded).named("h" if columns else "g")

    def _mixes(self, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], Tile]]:
        """The factors by which states go into others, of rows."""
        for to in names:
            mixes = [{x.state: x.factor for x in u.mixes} for u in updates_of(self._form, to)]
            for of in names:
                factors = tuple(m.get(of) for m in mixes)
                if any(f is not None for f in factors):
                    yield (to, of), self._tiles.in_rows(factors).named("mix")

    # ---- what is written -------------------------------------------------------------------------

    def _solve(self, recalls: list[list[Recall]]) -> list[Tile]:
        """The payloads, [I, V]: each one's value and corrections, solved for the chunk."""
        axes = tile.axes_of(Axis.I, *((Axis.V,) if self._kind is Kind.STATE else ()))
        values = [self._tiles.values(p.values, axes) for p in self._payloads]
        # a scale that divides by a norm is NaN beyond the end of a sequence
        scales = [{r: self._scale(s) for r, s in p.recalls.items()} for p in self._payloads]
        if any(Axis.V in s.axes for each in scales for s in each.values()):
            self._hoist = False  # T of one channel is not that of another
        users = [[n for n, s in enumerate(scales) if r in s] for r in range(len(recalls))]
        # recalls that are solved for with the one payload that uses them, and no other
        own = {r: ns[0] for r, ns in enumerate(users) if len(ns) == 1 and len(scales[ns[0]]) == 1}
        alone = {n: r for r, n in own.items()}
        coupling: dict[tuple[int, int], Tile] = {}
        given: list[dict[str | None, Tile]] = []
        columns: dict[int, Tile] = {}  # scales per channel of what is written
        for r, summed in enumerate(recalls):
            scale, value = tile.const(1.0), None
            if r in own:
                scale, value = scales[own[r]][r], values[own[r]]
            if Axis.V in scale.axes:
                columns[r] = scale
            once = tile.const(1.0) if r in columns else scale
            recalling = [(recall, self._recalling(recall)) for recall in summed]
            known = [] if value is None else [value]
            for n, free in enumerate(values):
                seen = [self._scores(b, x.state, x.phase, n) for x, b in recalling]
                parts = [x for x in seen if x is not None]
                if not parts:
                    continue
                scores = tile.total(parts)
                if n in alone:
                    add_to(coupling, (r, alone[n]), tile.mul(once, scores))
                    continue
                if free is not None:
                    known.append(tile.mul(scale, gather(scores, free)))
                for m, s in scales[n].items():
                    if Axis.V in s.axes:
                        raise NotLowered(*_SHARED_PER_CHANNEL)
                    tied = tile.mul(tile.mul(once, scores), tile.rename(s, Axis.J))
                    add_to(coupling, (r, m), tied)
            given.append(self._given(known, recalling, scale))
        solved = [
            self._total(parts, r in own)
            for r, parts in enumerate(eliminate(coupling, given, columns))
        ]
        written = []
        for n, free in enumerate(values):
            if n in alone:
                written.append(solved[alone[n]])
                continue
            parts = [tile.mul(s, solved[r]) for r, s in scales[n].items()]
            parts = parts if free is None else [free, *parts]
            assert parts, "a write has a value or a correction"
            written.append(tile.total(parts).named("U") if len(parts) > 1 else parts[0])
        return written

    def _scale(self, nodes: Nodes) -> Tile:
        """Factors of rows, 0 beyond a sequence's end, or a number: what it scales is 0 there."""
        values = {None if n is None else algebra.number(n) for n in nodes}
        value = values.pop()
        return self._tiles.in_rows(nodes) if value is None or values else tile.const(value)

    def _recalling(self, recall: Recall) -> Tile:
        b = self._tiles.in_rows(recall.keys).named("b")
        if not recall.late:
            return b
        late = self._tiles.in_rows(recall.late, _bounded).named("g_late")
        return tile.mul(b, self._transitions.gates[recall.state].exp(late))

    def _scores(
        self, x: Tile, to: str, phase: Phase, n: int, *, strict: bool = False
    ) -> Tile | None:
        """What `x` of row i sees in a state of the n-th payload of row j; None: 0."""
        parts = []
        for m, factor in self._places(n):
            key, of = self._keys[m], self._writes[m].state
            seen = self._transitions.scores(x, to, key, of, phase, strict=strict)
            if seen is not None:
                parts.append(seen if factor is None else tile.mul(seen, _of_column(factor)))
        return tile.total(parts) if parts else None

    def _places(self, n: int) -> Iterator[tuple[int, Tile | None]]:
        """The writes that add the n-th payload, by number, and their factors."""
        return ((m, factor) for m, (p, factor) in enumerate(self._placed) if p == n)

    def _given(
        self, known: list[Tile], recalling: list[tuple[Recall, Tile]], scale: Tile
    ) -> dict[str | None, Tile]:
        """What a recall sees but the recalls of rows before: all in one part, called None.

        Where products are hoisted, what it sees of each state at the chunk's start is a part of its
        own, the factor of the state.
        """
        starts = [
            (of, tile.mul(b, x))
            for recall, b in recalling
            for of, x in self._transitions.from_start(recall.state, recall.phase)
        ]
        if self._hoist:
            parts: dict[str | None, Tile] = {} if not known else {None: tile.total(known)}
            for of, x in starts:
                add_to(parts, of, tile.mul(scale, x))
            return parts
        recalled = [tile.mul(scale, tile.contract(x, self.starts[of], Axis.K)) for of, x in starts]
        return {None: tile.total([*known, *recalled]).named("X")}

    def _total(self, parts: dict[str | None, Tile], written: bool) -> Tile:
        """A solved unknown of its parts (see `_given`): what is `written`, or recalled."""
        name = "U" if written else "Y"
        if not self._hoist:
            return parts[None].named(name)
        found = [] if None not in parts else [parts[None].named("TX")]
        for of, w in parts.items():
            if of is not None:
                found.append(tile.contract(w.named("W"), self.starts[of], Axis.K))
        return tile.total(found).named(name)

    # ---- the state at the chunk's end, and reads -------------------------------------------------

    def _next(self, to: str) -> Tile:
        columns = self._columns[to]
        kept = columns.factor(columns.whole)
        parts = [
            tile.mul(tile.mul(kept, x), self._turned[of]) for of, x in self._transitions.whole(to)
        ]
        by_key: dict[Tile, dict[int, Tile]] = {}
        writes = zip(self._writes, self._late_keys, self._placed, strict=True)
        for write, key, (n, factor) in writes:
            left = self._transitions.to_end(to, write.state)
            if left is not None:
                left = left if factor is None else tile.mul(left, factor)
                add_to(by_key.setdefault(key, {}), n, left)
        for key, lefts in by_key.items():
            values = [self._written[n] for n in lefts]
            if len(set(lefts.values())) == 1:
                decayed = tile.mul(key, next(iter(lefts.values())))
            else:  # of states that mix, by numbers per row
                decayed = key
                values = [tile.mul(x, u) for x, u in zip(lefts.values(), values, strict=True)]
            late = columns.factor(columns.following)
            parts.append(tile.contract(decayed, tile.mul(late, tile.total(values)), Axis.I))
        return tile.total(parts)

    def read(self, seen: Seen) -> list[Tile]:
        """key^T S at the read's moment: [I, V], or [I] of a KeyState; or S key: [I, K]. A sum."""
        parts, gathered = self.parts(seen)
        found = tile.total([*parts, *(gather(x.named("A"), u) for u, x in gathered)])
        if seen.factor is None:
            return [found]
        c = self._tiles.in_rows((seen.read.key,)).named("c")
        apart = [
            tile.mul(own, tile.contract(c, u, Axis.V))
            for n, u in enumerate(self._written)
            for own in self._own(seen, n)
        ]
        return [tile.mul(self._tiles.of(seen.factor), found), *apart]

    def parts(self, seen: Seen) -> tuple[list[Tile], list[tuple[Tile, Tile]]]:
        """What a read is the sum of: tiles, and written values to be gathered by scores.

        Over columns the row's own writes are no part of it where the read has them apart.
        """
        read = seen.read
        c = self._tiles.in_rows((read.key,)).named("c")
        columns = read.other_axis is not self._form.transposed
        parts, gathered = [], []
        for of, x in self._transitions.from_start(read.state, read.phase):
            start = self.starts[of]
            if columns:
                parts.append(tile.mul(tile.contract(c, start, Axis.V), x))
            else:
                early = self._columns[of].factor(self._columns[of].prefix(read.phase))
                parts.append(tile.mul(early, tile.contract(tile.mul(c, x), start, Axis.K)))
        gate = self._columns[read.state].of_channels(read.phase)
        for n, written in enumerate(self._written):
            if columns:
                part = self._combined(c, seen, n, written)
                parts += [] if part is None else [part]
                continue
            earlier = self._scores(c, read.state, read.phase, n, strict=seen.turned)
            found = [] if earlier is None else [earlier]
            found += [tile.mask(own, Which.DIAGONAL) for own in self._own(seen, n)]
            if not found:
                continue
            scores = tile.total(found)
            if gate is None:
                gathered.append((written, scores))
            else:
                parts.append(under(gate, scores.named("A"), written, read.phase))
        return parts, gathered

    def _own(self, seen: Seen, n: int) -> Iterator[Tile]:
        """Of a read that has the row's own writes apart, those of the n-th payload: products of
        keys, or over columns the keys that are written."""
        if not seen.turned or seen.own is None:
            return
        for m, factor in self._places(n):
            write = self._writes[m]
            nodes = tuple(self._coordinates.own_key(write.state, k) for k in write.keys)
            if write.state != seen.read.state or all(k is None for k in nodes):
                continue
            own = self._tiles.in_rows(nodes).named("w")
            if seen.factor is None:
                own = tile.contract(self._tiles.in_rows((seen.own,)).named("c"), own, Axis.K)
            yield own if factor is None else tile.mul(own, factor)

    def _combined(self, c: Tile, seen: Seen, n: int, written: Tile) -> Tile | None:
        """What they add to a read over columns."""
        read = seen.read
        products = tile.contract(c, tile.rename(written, Axis.J), Axis.V)
        parts = []
        for m, factor in self._places(n):
            scaled = products if factor is None else tile.mul(products, _of_column(factor))
            key, of = self._keys[m], self._writes[m].state
            part = self._transitions.combine(
                scaled, read.state, key, of, read.phase, strict=seen.turned
            )
            parts += [] if part is None else [part]
        return tile.total(parts) if parts else None


def _of_column(factor: Tile) -> Tile:
    """A factor of rows as one of the columns of scores."""
    return tile.rename(factor, Axis.J)


_SHARED_PER_CHANNEL = (
    "what is recalled is scaled per channel, and several writes use it",
    "the system of the recalls has such a scale within, one for each channel and write",
    'a Scalar step size; or engine="reference", which runs it token by token',
)


def _bounded(log_decay: Tile) -> Tile:
    """A log-decay whose sums are finite: a decay of 0 becomes one that no dtype can tell from it.

    A log-decay so low has no gradient. A factor f of the state gets df = dg / f with the f
    that was used, which is right where f is 0.
    """
    if log_decay.op is TileOp.CONST:
        return tile.const(max(log_decay.value, LEAST_LOG_DECAY))
    below = tile.topological(log_decay)
    if not any(t.op in (TileOp.TOKEN, TileOp.HEAD) for t in below):
        return log_decay  # a number of the call, finite

    def rule(t: Tile, args: tuple[Tile, ...]) -> Tile:
        if t.is_map(Op.MAXIMUM) and tile.const(SMALLEST) in t.args:
            return gates.floor(args[0], LEAST_FACTOR)  # the floor of `dsl.decay`
        return tile.with_args(t, args)

    bounded = tile.rewritten((log_decay,), rule)[log_decay]
    return gates.floor(bounded.named("g"), LEAST_LOG_DECAY)
