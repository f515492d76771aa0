"""The chunkwise form of a normal form, for any of its classes: math.md equations (3) to (7).

For each state, with G the inclusive prefix sum of the log-decay from the chunk's start, H the sum
of what follows a token, and u_j what token j writes (its value plus what it recalls):

    u_i = value_i + s_i (b_i e^P_i)^T S_0 + s_i sum_{j<i} <b_i, w_j>_{P,G} u_j    solved by (1+L)^-1
    r_i = (c_i e^P_i)^T S_0 + sum_j <c_i, w_j>_{P,G} u_j                          reads
    S'  = e^{G_C} S_0 + sum_j (w_j e^{H_j}) u_j^T

P is G for what reads the decayed state and the exclusive prefix for what reads before the decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl.errors import NotLowered
from ..dsl.ir import Kind, Node
from ..dsl.normal_form import NormalForm, Phase, Read, Update, Write
from . import tile
from .lower import kind_axes, lower
from .tile import Axis, Tile, Which


@dataclass(frozen=True, slots=True)
class Carried:
    """A value that a scan carries from chunk to chunk: as the chunk begins, and as it ends."""

    start: Tile
    end: Tile

    @property
    def name(self) -> str:
        return str(self.start.attrs[0])


@dataclass(frozen=True, slots=True)
class Body:
    """One chunk: what it outputs and carries, as functions of the operands' tiles and the carry."""

    outputs: tuple[tuple[str, Tile], ...]
    carried: tuple[Carried, ...]


@dataclass(frozen=True, slots=True)
class _Gate:
    """The prefix sums of a log-decay; None where there is no decay. `before` reads exclude i."""

    inclusive: Tile | None
    exclusive: Tile | None
    following: Tile | None
    whole: Tile | None

    @property
    def is_vector(self) -> bool:
        return self.inclusive is not None and Axis.K in self.inclusive.axes


def derive(form: NormalForm, *, hoist_products: bool = False) -> Body:
    """The chunk of `form`. `hoist_products`: T(x - bS) as Tx - (Tb)S, so that Tb needs no state.

    Raises NotLowered for a normal form outside the lowered classes.
    """
    _check(form)
    (micro_step,) = form.micro_steps
    chunks = {u.state: _StateChunk(form, u, hoist_products) for u in micro_step.updates}
    results = {n: chunks[r.state].read(r) for n, r in enumerate(form.reads)}
    (output,) = lower(form, [form.output], results)
    output = tile.expand(output, tile.axes_of(Axis.I, Axis.V)).named("o")
    carried = tuple(chunks[s.name].carried for s in form.states)
    return Body((("o", output),), carried)


def _check(form: NormalForm) -> None:
    """Refuse what the chunk derivation does not lower yet, naming what and what to do instead."""
    instead = 'call it with engine="reference", which runs it token by token'

    def refuse(what: str, why: str) -> None:
        raise NotLowered(what=f"{form.name}: {what}", why=why, instead=instead)

    if form.output.kind is not Kind.VALUE:
        refuse(
            f"an output that is a {form.output.kind.name.capitalize()}",
            "kernels write outputs that are Values so far",
        )
    if form.transposed:
        refuse(
            "a state whose columns decay", "the transposed normal form has no chunk lowering yet"
        )
    if len(form.micro_steps) != 1:
        refuse(
            f"{len(form.micro_steps)} micro-steps per token",
            "the chunk form with several micro-steps is not derived yet",
        )
    for update in form.micro_steps[0].updates:
        if update.mixes:
            refuse("coupled states", "the chunk form of coupled states is not derived yet")
        feedbacks = [w.feedback for w in update.writes if w.feedback]
        if len(feedbacks) > 1:
            refuse(
                f"{len(feedbacks)} low-rank terms in one step",
                "the chunk form solves for one low-rank term per token so far",
            )
        if any(f.state != update.state for f in feedbacks):
            refuse("a write that recalls another state", "coupled states are not derived yet")
    for read in form.reads:
        if read.other_axis:
            refuse("a read over the Value axis", "only reads over the Key axis are lowered so far")


class _StateChunk:
    """The chunk form of one state, shared by its update and its reads."""

    def __init__(self, form: NormalForm, update: Update, hoist_products: bool) -> None:
        self._form = form
        self._kind = next(s.kind for s in form.states if s.name == update.state)
        self._start = tile.carry(update.state, kind_axes(self._kind))
        self._gate = self._prefixes(update.log_decay)
        self._hoist = hoist_products
        self._keys = [tile.rows(self._lowered(w.key)).named("w") for w in update.writes]
        self._written = self._solve(update.writes)
        self.carried = Carried(self._start, self._next())

    def _lowered(self, node: Node) -> Tile:
        (result,) = lower(self._form, [node], {})
        return result

    def _prefixes(self, log_decay: Node | None) -> _Gate:
        if log_decay is None:
            return _Gate(None, None, None, None)
        g = tile.rows(self._lowered(log_decay)).named("g")
        return _Gate(
            inclusive=tile.cumsum(g).named("G"),
            exclusive=tile.cumsum(g, exclusive=True).named("G_before"),
            following=tile.cumsum(g, reverse=True, exclusive=True).named("H"),
            whole=tile.reduce(g, (Axis.I,)).named("G_C"),
        )

    def _values(self, node: Node | None) -> Tile | None:
        if node is None:
            return None
        axes = (Axis.V,) if self._kind is Kind.STATE else ()
        return tile.rows(tile.expand(self._lowered(node), tile.axes_of(Axis.I, *axes)))

    def _scores(self, x: Tile, key: Tile, prefix: Tile | None, which: Which) -> Tile:
        """<x_i, key_j> decayed from j to i, for j < i (STRICT) or j <= i (LOWER)."""
        gate = self._gate.inclusive
        if gate is None or prefix is None:
            return tile.mask(tile.contract(x, tile.rename(key, Axis.J), Axis.K), which)
        if not self._gate.is_vector:
            products = tile.contract(x, tile.rename(key, Axis.J), Axis.K)
            if prefix == gate:  # one D, with its diagonal, for all scores of the chunk
                decay = tile.decay(gate, gate, Which.LOWER).named("D")
                return tile.mask(tile.mul(products, decay), which)
            return tile.mul(products, tile.decay(prefix, gate, which).named("D_before"))
        strict = tile.decayed_dot(x, key, prefix, gate)
        if which is Which.STRICT:
            return strict
        diagonal = tile.contract(x, key, Axis.K)  # e^0, whatever the gate: never formed (math.md)
        return tile.add(strict, tile.mask(diagonal, Which.DIAGONAL))

    def _recall(self, x: Tile, prefix: Tile | None) -> Tile:
        """x decayed to the chunk's start: what multiplies S_0."""
        return x if prefix is None else tile.mul(x, _exp(prefix))

    def _gather(self, scores: Tile, values: Tile) -> Tile:
        return tile.contract(scores, tile.rename(values, Axis.J), Axis.J)

    def _solve(self, writes: tuple[Write, ...]) -> list[Tile]:
        """What each write writes, [I, V]: its value, plus what it recalls, solved for the chunk."""
        values = [self._values(w.value) for w in writes]
        feedback_at = next((n for n, w in enumerate(writes) if w.feedback), None)
        if feedback_at is not None:
            values[feedback_at] = self._solved(writes, values, feedback_at)
        written = []
        for value in values:
            assert value is not None, "a write has a value or a feedback"
            written.append(value)
        return written

    def _solved(self, writes: tuple[Write, ...], values: list[Tile | None], at: int) -> Tile:
        feedback = writes[at].feedback
        assert feedback is not None
        b = tile.rows(self._lowered(feedback.key)).named("b")
        scale = self._lowered(feedback.scale)
        prefix = self._gate.inclusive if feedback.decayed else self._gate.exclusive
        free = [] if values[at] is None else [values[at]]
        for n, (key, value) in enumerate(zip(self._keys, values, strict=True)):
            if n != at and value is not None:
                scores = self._scores(b, key, prefix, Which.STRICT)
                free.append(tile.mul(scale, self._gather(scores, value)))
        known = [f for f in free if f is not None]
        tied = tile.mul(scale, self._scores(b, self._keys[at], prefix, Which.STRICT))
        solve = tile.inverse(tile.neg(tied).named("L")).named("T")
        recall = self._recall(b, prefix)
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
        parts = [self._start if whole is None else tile.mul(_exp(whole), self._start)]
        for key, written in zip(self._keys, self._written, strict=True):
            decayed = key if following is None else tile.mul(key, _exp(following))
            parts.append(tile.contract(decayed, written, Axis.I))
        return tile.total(parts).named(str(self._start.attrs[0]) + "_next")

    def read(self, read: Read) -> Tile:
        """key^T S at the read's moment: [I, V], or [I] of a KeyState."""
        c = tile.rows(self._lowered(read.key)).named("c")
        prefix = self._gate.exclusive if read.phase is Phase.BEFORE else self._gate.inclusive
        which = Which.LOWER if read.phase is Phase.AFTER else Which.STRICT
        parts = [tile.contract(self._recall(c, prefix), self._start, Axis.K)]
        for key, written in zip(self._keys, self._written, strict=True):
            scores = self._scores(c, key, prefix, which).named("A")
            parts.append(self._gather(scores, written))
        return tile.total(parts)


def _exp(prefix: Tile) -> Tile:
    return tile.exp(prefix).named("e_" + prefix.hint)
