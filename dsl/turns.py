"""Multipliers that turn states: a sign, half a turn; or an angle between two states.

A state multiplied by f, which may be negative, is |f| of itself, and half a turn on where f < 0.
Two states that pass by

    x <- r cos(a) x - r sin(a) y,    y <- r sin(a) x + r cos(a) y

are a complex state x + i y, multiplied by r e^(ia). Turns by angles commute with one another and
with gates, so that a chunk form may take them out of the states and into keys: what is left are the
real factors r, one by one or as states mix. States that pass into one another so belong to one
`Plane`, whose angle of a token is one for all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import algebra
from .decay import is_forgotten, is_signed, log_magnitude
from .ir import Node, Op
from .normal_form import NormalForm, Update

Factors = Mapping[tuple[str, str], Node]  # by the state that it goes to, and the one from which


@dataclass(frozen=True, slots=True)
class Plane:
    """States that turn by one angle in each micro-step; None: by none.

    `pairs`: real and imaginary parts; a state that has signs only is a real part alone. `left`: the
    real factors of each micro-step, by the real parts that they go to and from; none is 0.
    """

    pairs: tuple[tuple[str, str | None], ...]
    angles: tuple[Node | None, ...]
    left: tuple[Factors, ...]

    @property
    def states(self) -> tuple[str, ...]:
        """All parts, by name."""
        return tuple(name for pair in self.pairs for name in pair if name is not None)


@functools.lru_cache(maxsize=512)
def planes_of(form: NormalForm) -> tuple[Plane, ...]:
    """The planes of a form. States of none of them are multiplied by decays, or mix by Scalars."""
    moved = [passages(m.updates) for m in form.micro_steps]
    found = []
    for names in _components(moved, [s.name for s in form.states]):
        own = [{pair: f for pair, f in p.items() if pair[0] in names} for p in moved]
        if len(names) == 1:
            (pair,) = itertools.product(names, names)
            if any(pair in p and is_signed(p[pair]) for p in own):
                found.append(Plane(((names[0], None),), (None,) * len(own), tuple(own)))
            continue
        planes = (_plane(pairs, own) for pairs in _pairings(names))
        plane = next((p for p in planes if p is not None), None)
        if plane is not None:
            found.append(plane)
    return tuple(found)


def log_decays(form: NormalForm) -> list[tuple[str, Node]]:
    """Every log-decay with its state, micro-step by micro-step; that of the size of a factor."""
    alone = {s: p for p in planes_of(form) if len(p.pairs) == 1 for s in p.states}
    found = []
    for m, micro_step in enumerate(form.micro_steps):
        for u in micro_step.updates:
            log = u.log_decay
            if u.state in alone:
                factors = alone[u.state].left[m].values()
                log = next((log_magnitude(f, algebra.ONE) for f in factors), None)
            found += [(u.state, x) for x in (log, u.columns) if x is not None]
    return found


def mixing_factors(form: NormalForm, micro_steps: Sequence[int]) -> list[tuple[str, Node]]:
    """Factors and gates of states that mix in some micro-steps other than by turning, there.

    Each with the state that it goes to.
    """
    updates = [u for m in micro_steps for u in form.micro_steps[m].updates]
    planes = planes_of(form)
    mixed = {n for u in updates for x in u.mixes for n in (u.state, x.state) if x.state != u.state}
    turned = {s for p in planes for s in p.states}
    mixed -= turned
    found = [(u.state, x.factor) for u in updates if u.state in mixed for x in u.mixes]
    logs = [(u.state, u.log_decay) for u in updates if u.state in mixed]
    logs += [(u.state, u.columns) for u in updates if u.state in mixed | turned]
    found += [(state, log) for state, log in logs if log is not None]
    for plane in planes:
        left = [(pair, f) for m in micro_steps for pair, f in plane.left[m].items()]
        if any(to != of for (to, of), _ in left):
            found += [(to, f) for (to, _), f in left]
    return found


def angles(form: NormalForm) -> list[Node]:
    """The angles by which states turn."""
    return [a for p in planes_of(form) for a in p.angles if a is not None]


def passages(updates: Sequence[Update]) -> dict[tuple[str, str], Node]:
    """What states are multiplied by as they go into themselves and others."""
    found = {}
    for u in updates:
        if u.log_decay is None:
            found[u.state, u.state] = algebra.ONE
        elif not is_forgotten(u.log_decay):
            found[u.state, u.state] = algebra.unary(Op.EXP, u.log_decay)
        found |= {(u.state, mix.state): mix.factor for mix in u.mixes}
    return found


def _components(passages: Sequence[Factors], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """States that go into one another."""
    linked = {name: {name} for name in names}
    for to, of in (pair for p in passages for pair in p):
        joined = linked[to] | linked[of]
        linked |= dict.fromkeys(joined, joined)
    seen: set[str] = set()
    for name in names:
        if name not in seen:
            seen |= linked[name]
            yield tuple(n for n in names if n in linked[name])


def _pairings(names: Sequence[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    """All ways to pair names, each pair in either order but the first, whose order is given."""
    if len(names) % 2:
        return

    def of(rest: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], ...]]:
        if not rest:
            yield ()
            return
        first, *others = rest
        for n, other in enumerate(others):
            for more in of((*others[:n], *others[n + 1 :])):
                yield ((first, other), *more)
                if rest != tuple(names):
                    yield ((other, first), *more)

    yield from of(tuple(names))


def _plane(pairs: tuple[tuple[str, str], ...], passages: Sequence[Factors]) -> Plane | None:
    """The plane of paired states, if they pass by complex numbers of one angle that is not 0."""
    angles: list[Node | None] = []
    left: list[Factors] = []
    for passage in passages:
        found: dict[Node | None, None] = {}
        real = {}
        for (x, y), (u, v) in itertools.product(pairs, pairs):
            entries = [passage.get(at) for at in ((x, u), (y, v), (y, u), (x, v))]
            polar = _polar(*entries)
            if polar is None:
                return None
            factor, angle = polar
            if factor is not None:
                real[x, u] = factor
                found[angle] = None
        if len(found) > 1:
            return None
        angles.append(next(iter(found), None))
        left.append(real)
    if all(a is None for a in angles):
        return None
    return Plane(pairs, tuple(angles), tuple(left))


def _polar(
    xu: Node | None, yv: Node | None, yu: Node | None, xv: Node | None
) -> tuple[Node | None, Node | None] | None:
    """r and a of the complex number r e^(ia) with the real parts xu = yv and the imaginary parts
    yu = -xv; r is None of 0, a of a real number. None if it is no such number."""
    if yu is None and xv is None:
        return (xu, None) if xu == yv else None
    if yu is None or xv is None or xu is None or yv is None:
        return None
    (sign, real), (turn, imaginary) = algebra.factors(xu), algebra.factors(yu)
    if not _same(xu, yv) or not _same(yu, algebra.neg(xv)):
        return None
    for cosine in (n for n in real if n.op is Op.COS):
        (angle,) = cosine.args
        rest = real - Counter([cosine])
        if rest + Counter([algebra.unary(Op.SIN, angle)]) == imaginary:
            factor = algebra.product(sign, rest)
            return factor, angle if sign == turn else algebra.neg(angle)
    return None


def _same(a: Node, b: Node) -> bool:
    """Whether two products have the same factors."""
    return algebra.factors(a) == algebra.factors(b)
