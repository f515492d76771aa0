"""Changes coordinates within the chunk, so that signs and angles leave the states for the keys.

With A the running sum of the angles of a plane (dsl/turns) from the chunk's start, a half turn for
each negative factor, the turned states z~ = e^(-iA) z pass by the sizes of their factors alone:

    z_i = r_i e^(ia_i) z_(i-1) + w_i u_i^T  becomes  z~_i = r_i z~_(i-1) + (e^(-iA_i) w_i) u_i^T

and what is read of z is read of z~ with a turned key. What is carried, saved and handed over are
the states themselves: A is 0 as the chunk begins, and its end is computed in the coordinates of the
end, where a row's keys are turned by the angles that follow it.

The form in other coordinates is a normal form as any other. Its leaves for signs, cosines and sines
are RESULTs beyond the reads: tiles that the chunk derivation gives (`leaves`).

What a row reads of its own write is turned there and back. The gradient of the angle would have it
with either sign, and where strong decays leave little beside it, the rounding of both is all that
is left: so rows read their own writes by keys that were not turned (`own_key`, `Seen.own`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..dsl import algebra
from ..dsl.bounds import interval
from ..dsl.decay import is_signed, log_decay, log_magnitude, signed_part
from ..dsl.intervals import Interval
from ..dsl.ir import Kind, Node, Op, constant
from ..dsl.normal_form import (
    Correction,
    MicroStep,
    Mix,
    NormalForm,
    Phase,
    Read,
    Update,
    Write,
)
from ..dsl.turns import Plane, planes_of
from . import gates, tile
from .angles import Angle
from .rows import RowTiles
from .tile import Axis, Tile

_FORGOTTEN, _NEGATIVE = constant(-math.inf), constant(-1.0)
_Payload = tuple[Node | None, tuple[Correction, ...]]  # what a key is written with


@dataclass(frozen=True, slots=True)
class _Turned:
    """A state of a plane: its place in a pair, and the leaves of the plane."""

    state: str
    partner: str | None
    real: bool
    first_leaf: int
    kind: Kind

    def leaf(self, n: int) -> Node:
        return Node(Op.RESULT, (), (self.first_leaf + n,), self.kind)

    @property
    def sign(self) -> Node:
        """Of the factor in a row."""
        return self.leaf(0)

    def parts(self, before: bool) -> list[tuple[str, Node]]:
        """The state as a sum of turned ones, as a row ends, or begins: their factors."""
        cosine, sine = self.leaf(3 if before else 1), self.leaf(4 if before else 2)
        found = [(self.state, cosine)]
        if self.partner is not None:
            found.append((self.partner, algebra.neg(sine) if self.real else sine))
        return found

    def sources(self) -> list[tuple[str, Node]]:
        """The states whose writes the turned state has, with the factors of their keys."""
        found = [(self.state, self.leaf(1))]
        if self.partner is not None:
            found.append((self.partner, self.leaf(2) if self.real else algebra.neg(self.leaf(2))))
        return found


@dataclass(frozen=True, slots=True)
class Seen:
    """A part of a read: a read in turned coordinates, and the factor of what it reads.

    `turned`: the row's own write is read apart, with the key `own` and no factor; None: not at all.
    """

    read: Read
    factor: Node | None = None
    turned: bool = False
    own: Node | None = None

    def with_keys(self, rule: Callable[[Node], Node]) -> Seen:
        """The same with other keys."""
        own = None if self.own is None else rule(self.own)
        return replace(self, read=replace(self.read, key=rule(self.read.key)), own=own)

    def joined(self, other: Seen) -> Seen:
        """The sum of two that differ in their keys alone."""
        own = algebra.total(k for k in (self.own, other.own) if k is not None)
        key = algebra.add(self.read.key, other.read.key)
        return replace(self, read=replace(self.read, key=key), own=own)


class Coordinates:
    """A form with its signs and angles taken out of the states; `form` itself if it has none."""

    def __init__(self, form: NormalForm) -> None:
        self._turned: dict[str, _Turned] = {}
        self._own_keys: dict[tuple[str, Node], Node | None] = {}
        self._planes = planes_of(form)
        for n, plane in enumerate(self._planes):
            first, kind = len(form.reads) + 5 * n, _kind(plane)
            for x, y in plane.pairs:
                self._turned[x] = _Turned(x, y, True, first, kind)
                if y is not None:
                    self._turned[y] = _Turned(y, x, False, first, kind)
        self.form = form
        if self._planes:
            micro_steps = tuple(self._moved(m, n) for n, m in enumerate(form.micro_steps))
            self.form = replace(form, micro_steps=micro_steps)

    # ---- the normal form -------------------------------------------------------------------------

    def _moved(self, micro_step: MicroStep, m: int) -> MicroStep:
        updates = {u.state: u for u in micro_step.updates}
        return MicroStep(tuple(self._update(u.state, updates, m) for u in micro_step.updates))

    def _update(self, state: str, updates: dict[str, Update], m: int) -> Update:
        update, turned = updates[state], self._turned.get(state)
        if turned is None:
            writes = tuple(w for w, _ in self._writes([(state, None)], updates))
            return replace(update, writes=writes)
        written = list(self._writes(turned.sources(), updates))
        self._own_keys |= {(state, w.key): own for w, own in written}
        writes = tuple(w for w, _ in written)
        plane = next(p for p in self._planes if state in p.states)
        log, mixes = _left(plane, turned, m)
        return Update(state, log, Interval(), mixes, writes)

    def _writes(
        self, sources: Sequence[tuple[str, Node | None]], updates: dict[str, Update]
    ) -> Iterator[tuple[Write, Node | None]]:
        """The writes of states by keys times factors, those of equal values as one; with the sum
        of the keys of the first state."""
        keys: dict[_Payload, list[tuple[Node, Node | None]]] = {}
        for n, (state, factor) in enumerate(sources):
            for key, payload in self._payloads(updates[state]):
                turned = key if factor is None else algebra.mul(factor, key)
                keys.setdefault(payload, []).append((turned, None if n else key))
        for (value, corrections), pairs in keys.items():
            first, *rest = corrections or (None,)
            key = _sum([turned for turned, _ in pairs])
            own = algebra.total(k for _, k in pairs if k is not None)
            yield Write(key, value, first), own
            yield from ((Write(key, None, f), own) for f in rest)

    def _payloads(self, update: Update) -> Iterator[tuple[Node, _Payload]]:
        """The keys that are written, with all that each is written with, read of turned states."""
        values: dict[Node, list[Node]] = {}
        corrections: dict[Node, list[Correction]] = {}
        for w in update.writes:
            values.setdefault(w.key, []).extend([] if w.value is None else [w.value])
            corrections.setdefault(w.key, []).extend([] if w.correction is None else [w.correction])
        for key, parts in values.items():
            yield key, (algebra.total(parts), tuple(self._recalled(corrections[key])))

    def _recalled(self, corrections: Sequence[Correction]) -> Iterator[Correction]:
        keys: dict[tuple[str, Node, bool], list[Node]] = {}
        for f in corrections:
            turned = self._turned.get(f.state)
            parts = [(f.state, algebra.ONE)] if turned is None else turned.parts(before=True)
            sign, _ = algebra.factors(f.scale)
            scale, key = (
                (f.scale, f.key) if sign > 0 else (algebra.neg(f.scale), algebra.neg(f.key))
            )
            for state, factor in parts:
                at = (state, scale, f.decayed)
                keys.setdefault(at, []).append(algebra.mul(factor, key))
        for (state, scale, decayed), summed in keys.items():
            yield Correction(state, _sum(summed), scale, decayed)

    # ---- reads and the row's own writes ----------------------------------------------------------

    def reads(self, read: Read) -> list[Seen]:
        """A read as a sum of reads of turned states: of rows by turned keys, of columns themselves,
        the factor of what is read beside each."""
        turned = self._turned.get(read.state)
        if turned is None:
            return [Seen(read)]
        found = []
        columns = read.other_axis is not self.form.transposed
        for state, factor in turned.parts(before=read.phase is Phase.BEFORE):
            own = read.key if state == read.state else None
            key = read.key if columns else algebra.mul(factor, read.key)
            part = replace(read, state=state, key=key)
            has_angle = turned.partner is not None and read.phase is Phase.AFTER
            found.append(Seen(part, factor if columns else None, has_angle, own))
        return found

    def own_key(self, state: str, key: Node | None) -> Node | None:
        """The key of a write to a turned state as it is in the state itself; None: it has none."""
        return None if key is None else self._own_keys[state, key]

    # ---- tiles -----------------------------------------------------------------------------------

    def leaves(self, tiles: RowTiles, states: Sequence[str]) -> dict[int, Tile]:
        """The leaves of the planes of some states: signs, cosines and sines of running angles."""
        found: dict[int, Tile] = {}
        for turned, plane in self._own(states):
            angle = _angle(tiles, plane)
            sign = tile.sub(tile.const(1.0), tile.mul(tile.const(2.0), _negative(tiles, plane)))
            after = _circle(angle, gates.cumsum, "A")
            before = _circle(angle, functools.partial(gates.cumsum, exclusive=True), "A_before")
            found |= {turned.first_leaf + n: x for n, x in enumerate((sign, *after, *before))}
        return found

    def leaves_at_end(self, tiles: RowTiles, states: Sequence[str]) -> Mapping[int, Tile]:
        """The same for keys of writes in the coordinates of the chunk's end."""
        found: dict[int, Tile] = {}
        following = functools.partial(gates.cumsum, reverse=True, exclusive=True)
        for turned, plane in self._own(states):
            cosine, sine = _circle(_angle(tiles, plane), following, "A_after")
            found |= {turned.first_leaf + 1: cosine, turned.first_leaf + 2: tile.neg(sine)}
        return found

    def at_end(
        self, tiles: RowTiles, states: Sequence[str], starts: dict[str, Tile]
    ) -> dict[str, Tile]:
        """All states at the chunk's start, some planes in the coordinates of its end."""
        found = dict(starts)
        for _, plane in self._own(states):
            angle = _angle(tiles, plane)
            cosine, sine = _circle(angle, lambda x: tile.reduce(x, (Axis.I,)), "A_C")
            for x, y in plane.pairs:
                found[x] = tile.mul(cosine, starts[x])
                if y is not None:
                    found[x] = tile.sub(found[x], tile.mul(sine, starts[y]))
                    found[y] = tile.add(tile.mul(sine, starts[x]), tile.mul(cosine, starts[y]))
        return found

    def _own(self, states: Sequence[str]) -> Iterator[tuple[_Turned, Plane]]:
        """The planes of some states, each with its first state."""
        for plane in self._planes:
            if not set(states).isdisjoint(plane.states):
                yield self._turned[plane.pairs[0][0]], plane


def _left(plane: Plane, turned: _Turned, m: int) -> tuple[Node | None, tuple[Mix, ...]]:
    """The log-decay of a turned state in a micro-step, and how others mix into it."""
    at = next(n for n, pair in enumerate(plane.pairs) if turned.state in pair)
    real = plane.pairs[at][0]
    left = {of: f for (to, of), f in plane.left[m].items() if to == real}
    if len(plane.pairs) == 1:
        return (log_magnitude(left[real], turned.sign) if left else _FORGOTTEN), ()
    own = left.get(real)
    log: Node | None = _FORGOTTEN
    if own is not None and not is_signed(own):
        log, _ = log_decay(own)
        del left[real]
    names = {pair[0]: pair[0] if turned.real else pair[1] for pair in plane.pairs}
    return log, tuple(Mix(str(names[of]), f) for of, f in left.items())


def _sum(nodes: Sequence[Node]) -> Node:
    return functools.reduce(algebra.add, nodes)


def _kind(plane: Plane) -> Kind:
    """The kind of a plane's angles."""
    factors = [f for left in plane.left for f in left.values()] if _has_signs(plane) else []
    kinds = {n.kind for n in (*plane.angles, *factors) if n is not None}
    return next((k for k in kinds if k is not Kind.SCALAR), Kind.SCALAR)


def _has_signs(plane: Plane) -> bool:
    """Whether a factor's sign is an angle: of states that mix, factors keep their signs."""
    return len(plane.pairs) == 1 and any(is_signed(f) for p in plane.left for f in p.values())


def _negative(tiles: RowTiles, plane: Plane) -> Tile:
    """1 in the rows whose factor is negative."""
    factors = [next(iter(left.values()), None) for left in plane.left]
    if not _has_signs(plane):
        return tile.const(0.0)
    signed = [signed_part(f) if f is not None and is_signed(f) else None for f in factors]
    known = (f if f is None or interval(f).hi > 0.0 else _NEGATIVE for f in signed)
    one, always = tile.const(1.0), tiles.of(_NEGATIVE)
    return tiles.in_rows(tuple(known), lambda x: one if x == always else tile.step(tile.neg(x)))


def _angle(tiles: RowTiles, plane: Plane) -> Angle:
    """The angle of each row, [I] or [I, K]; a negative factor is half a turn."""
    turns = any(a is not None for a in plane.angles)
    angle = tiles.in_rows(plane.angles).named("a") if turns else None
    return Angle.of(angle, _negative(tiles, plane) if _has_signs(plane) else None)


def _circle(angle: Angle, summed: Callable[[Tile], Tile], name: str) -> tuple[Tile, Tile]:
    total = angle.total(summed).named(name)
    cosine, sine = tile.fmap(Op.COS, total), tile.fmap(Op.SIN, total)
    return cosine.named("cos_" + name), sine.named("sin_" + name)
