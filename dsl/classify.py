"""Pass: the class of a normal form, which decides the cheapest correct chunk form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from . import algebra
from .intervals import Interval
from .ir import Kind, Node, Per, operands_of
from .normal_form import NormalForm, Update, levels_of, results_of, seen_by
from .turns import Plane, planes_of


class DecayClass(Enum):
    """How finely a state decays, from cheapest to dearest."""

    NONE = "no decay"
    PER_HEAD = "constant decay per head"
    SCALAR = "scalar decay"
    KEY = "decay per key channel"
    VALUE = "decay per value channel"


class LowRank(Enum):
    """The rank of the update: how much the writes of a state recall of it."""

    NONE = "no low rank"
    SYMMETRIC = "rank 1 (one write, symmetric)"
    ONE_WRITE = "rank 1 (one write)"
    GENERAL = "low rank, general"


@dataclass(frozen=True, slots=True)
class StateClass:
    """One state's class. `bound`: an interval of its log-decay over all micro-steps."""

    state: str
    decay: DecayClass
    bound: Interval
    low_rank: LowRank
    writes: int
    turns: str = ""  # how else than by a decay the state is multiplied


@dataclass(frozen=True, slots=True)
class Classes:
    """The class of a normal form. `transposed`: the roles of K and V are exchanged.

    `levels`: of states, of which each sees what is read of those before; one but in a cascade.
    """

    states: tuple[StateClass, ...]
    micro_steps: int
    coupled: bool
    transposed: bool
    levels: int = 1

    def __str__(self) -> str:
        parts = []
        for s in self.states:
            turns = f" {s.turns}" if s.turns else ""
            what = f"{s.decay.value}{turns}, {s.low_rank.value}"
            parts.append(f"{s.state}: {what}" if len(self.states) > 1 else what)
        n, m = self.micro_steps, len(self.states)
        parts.append("one micro-step" if n == 1 else f"{n} micro-steps")
        kind = "coupled states" if self.coupled else "states"
        levels = f" in a cascade of {self.levels} levels" if self.levels > 1 else ""
        parts.append("one state" if m == 1 else f"{m} {kind}{levels}")
        if self.transposed:
            parts.append("transposed (roles of K and V exchanged)")
        return ", ".join(parts)


def classify(form: NormalForm) -> Classes:
    """The class of every state, and of the form as a whole."""
    states = []
    turned = {n: _multipliers(p, n) for p in planes_of(form) for n in p.states}
    turns = {n: _turns(p) for p in planes_of(form) for n in p.states}
    for declared in form.states:
        updates = [u for m in form.micro_steps for u in m.updates if u.state == declared.name]
        decays = [decay_class(form, x) for x in turned.get(declared.name, [])]
        decays = decays or [decay_class(form, u.log_decay) for u in updates]
        columns = [u.columns for u in updates if u.columns is not None]
        if columns:
            other = decay_class(form, columns[0])
            if set(decays) == {DecayClass.NONE}:
                decays = [other]
            else:
                turns[declared.name] = f"and {other.value.removeprefix('decay ')}"
        order = list(DecayClass)
        states.append(
            StateClass(
                declared.name,
                max(decays, key=order.index),
                Interval(min(u.bound.lo for u in updates), max(u.bound.hi for u in updates)),
                _low_rank(declared.name, updates),
                max(len(u.writes) for u in updates),
                turns.get(declared.name, ""),
            )
        )
    levels = len(levels_of(form))
    return Classes(tuple(states), len(form.micro_steps), is_coupled(form), form.transposed, levels)


def _multipliers(plane: Plane, state: str) -> list[Node | None]:
    """The real factors by which a state of a plane goes into itself, micro-step by micro-step."""
    real = next(pair[0] for pair in plane.pairs if state in pair)
    found = [left.get((real, real)) for left in plane.left]
    return [None if f == algebra.ONE else f for f in found]


def _turns(plane: Plane) -> str:
    kinds = [a.kind for a in plane.angles if a is not None]
    if not kinds:
        return "of either sign"
    channels = [k.name.lower() for k in kinds if k is not Kind.SCALAR]
    return f"with an angle per {channels[0]} channel" if channels else "with an angle"


def is_coupled(form: NormalForm) -> bool:
    """Whether a state's update sees another state."""
    return any(seen_by(u) for m in form.micro_steps for u in m.updates)


def decay_class(form: NormalForm, log_decay: Node | None) -> DecayClass:
    """The class of one log-decay."""
    if log_decay is None:
        return DecayClass.NONE
    if log_decay.kind is Kind.KEY:
        return DecayClass.KEY
    if log_decay.kind is Kind.VALUE:
        return DecayClass.VALUE
    per_token = {o.name for o in form.operands if o.per is Per.TOKEN}
    constant = per_token.isdisjoint(operands_of(log_decay)) and not results_of(log_decay)
    return DecayClass.PER_HEAD if constant else DecayClass.SCALAR


def _low_rank(state: str, updates: Sequence[Update]) -> LowRank:
    found = LowRank.NONE
    for u in updates:
        recalling = [w for w in u.writes if w.correction is not None]
        if not recalling:
            continue
        correction = recalling[0].correction
        if len(u.writes) > 1 or correction is None or correction.state != state:
            return LowRank.GENERAL
        symmetric = correction.key == recalling[0].key and correction.decayed
        if not symmetric:
            found = LowRank.ONE_WRITE
        elif found is LowRank.NONE:
            found = LowRank.SYMMETRIC
    return found
