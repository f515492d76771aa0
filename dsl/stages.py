"""A recurrence as calls of simpler ones: reads that later keys hold come first, lags go.

A kernel of several states holds the tiles of all of them. Where states meet in what is read alone,
each can be a call of its own, between which lie numbers per token (gated slot attention: scores).
A state that holds what the last token wrote and nothing else, a lag, can be taken out altogether:

    S_t = F_t (S_{t-1} + c_t L_{t-1}) + W_t,   L_t = w_t,   reads of S alone

is S'_t = F_t S'_{t-1} + W_t + c_{t+1} w_t with S' = S + c L ahead, read before the last summand.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from . import algebra, errors
from .decay import is_forgotten
from .declaration import Declaration
from .equations import as_step, with_results
from .ir import Kind, Node, Op, Per, topological
from .kinds import annotation_of
from .normal_form import (
    Correction,
    MicroStep,
    Mix,
    NormalForm,
    Operand,
    Param,
    Phase,
    StateDecl,
    Update,
    Write,
    of_update,
    result_leaf,
    results_of,
    seen_by,
)
from .step import operand_leaf, param_leaf, state_leaf
from .traced import Traced
from .turns import passages


@dataclass(frozen=True, slots=True)
class Made:
    """An operand of a stage that an expression over operands and results makes.

    `ahead`: its value at the next token, 0 at the last. `decays`: it is a log-decay.
    """

    operand: Operand
    value: Node
    ahead: bool = False
    decays: bool = False


@dataclass(frozen=True, slots=True)
class Lag:
    """A state that was taken out: what its last token wrote, and what it adds to another by."""

    state: str
    into: str
    writes: tuple[Write, ...]
    factor: Made


@dataclass(frozen=True, slots=True)
class Stage:
    """A call. `states`: of the whole recurrence; `reads`: what it returns, if not the outputs."""

    declaration: Declaration
    states: tuple[str, ...]
    made: tuple[Made, ...]
    reads: tuple[int, ...] = ()
    lags: tuple[Lag, ...] = ()


@functools.lru_cache(maxsize=256)
def stages_of(form: NormalForm) -> tuple[Stage, ...]:
    """The calls that a form's may be instead, in order; none where it is one call at best."""
    plain = len(form.micro_steps) == 1 and not any(o.micro for o in form.operands)
    if not plain or any(s.kind is not Kind.STATE for s in form.states):
        return ()
    try:
        return _without_lags(form) or _by_reads(form)
    except errors.DeclarationError:  # what is left has no form of its own
        return ()


# ---- lags ----------------------------------------------------------------------------------------


def _without_lags(form: NormalForm) -> tuple[Stage, ...]:
    updates = {u.state: u for u in form.micro_steps[0].updates}
    seen = {s for u in updates.values() for s in _recalled(u)} | {r.state for r in form.reads}
    lags: list[Lag] = []
    made: dict[Node, Made] = {}
    for u in updates.values():
        plain = not u.mixes and not _recalled(u)
        if not (is_forgotten(u.log_decay) and plain and u.writes) or u.state in seen:
            continue
        found = _partner(form, u.state)
        if found is not None:
            into, factor = found
            operand = Operand(_fresh(form, f"ahead_{len(made)}"), Kind.SCALAR, Per.TOKEN)
            own = made.setdefault(factor, Made(operand, factor, ahead=True))
            lags.append(Lag(u.state, into, u.writes, own))
    gone = {lag.state for lag in lags}
    kept = [u for u in updates.values() if u.state not in gone]
    if not lags or not _are_plain(form, kept) or not gone.isdisjoint(lag.into for lag in lags):
        return ()
    moved = _moved(form, kept)
    free = {u.state: list(u.writes) for u in kept}
    written = {name: list(writes) for name, writes in free.items()}
    late: dict[str, list[Write]] = {name: [] for name in moved}  # what reads do not see yet
    for lag in lags:
        ahead = operand_leaf(lag.factor.operand)
        for w in lag.writes:
            _add(written[lag.into], w, ahead)
            late[lag.into].append(replace(w, value=algebra.mul(ahead, _value(w))))
    ends = {}
    for name, state in moved.items():
        for w in written[name]:
            pair = (w.key, _value(w)) if w.key.kind is Kind.KEY else (_value(w), w.key)
            state = Node(Op.ADD, (state, Node(Op.OUTER, pair, (), Kind.STATE)), (), Kind.STATE)
        ends[name] = state
    results = {}
    for n, r in enumerate(form.reads):
        alone = len(moved) == 1
        parts = [_read(r.key, moved[r.state] if alone else ends[r.state])]
        for w in free[r.state] if alone else late[r.state]:
            part = algebra.mul(algebra.dot(r.key, w.key), _value(w))
            parts.append(part if alone else algebra.neg(part))
        results[n] = functools.reduce(algebra.add, parts)
    states = tuple(s for s in form.states if s.name not in gone)
    factors = tuple(made.values())
    outputs = tuple(with_results(n, results) for n in form.outputs)
    declared = _declared(
        f"{form.name}_without_lags", form, states, factors, tuple(ends.values()), outputs
    )
    return (Stage(declared, tuple(s.name for s in states), factors, lags=tuple(lags)),)


def _are_plain(form: NormalForm, updates: Sequence[Update]) -> bool:
    """Whether states pass by factors, have free writes alone, and are read as a token ends."""
    free = not any(u.columns or _recalled(u) or results_of(*of_update(u)) for u in updates)
    alone = not any(r.other_axis or results_of(r.key) for r in form.reads)
    return free and alone and all(r.phase is Phase.AFTER for r in form.reads)


def _moved(form: NormalForm, updates: Sequence[Update]) -> dict[str, Node]:
    """States as they pass, before anything is written."""
    names = [u.state for u in updates]
    factors = passages(form.micro_steps[0].updates)
    leaves = {s.name: state_leaf(s) for s in form.states}
    found = {}
    for to in names:
        parts = [
            Node(Op.SCALE, (leaves[of], f), (), Kind.STATE)
            for of in names
            if (f := factors.get((to, of))) is not None
        ]
        found[to] = functools.reduce(lambda x, y: Node(Op.ADD, (x, y), (), x.kind), parts)
    return found


def _read(key: Node, state: Node) -> Node:
    if key.kind is Kind.VALUE:
        return Node(Op.READ_VALUE, (state, key), (), Kind.KEY)
    return Node(Op.READ, (key, state), (), Kind.VALUE)


def _value(w: Write) -> Node:
    assert w.value is not None, "a write without a recall has a value"
    return w.value


def _add(writes: list[Write], lag: Write, ahead: Node) -> None:
    """Add a lag's write to the writes of a state: to the one that it differs from by a number."""
    factor, vector = _scaled(_value(lag))
    for n, w in enumerate(writes):
        own, same = _scaled(_value(w))
        if w.key == lag.key and same == vector:
            both = algebra.add(own, algebra.mul(ahead, factor))
            writes[n] = replace(w, value=algebra.mul(both, vector))
            return
    writes.append(replace(lag, value=algebra.mul(ahead, _value(lag))))


def _scaled(value: Node) -> tuple[Node, Node]:
    """A value as a Scalar and what is left."""
    sign, factors = algebra.factors(value)
    scalars = [x for x in factors if x.kind is Kind.SCALAR]
    vectors = [x for x in factors if x.kind is not Kind.SCALAR]
    scalar = functools.reduce(algebra.mul, scalars, algebra.ONE)
    return (
        scalar if sign > 0 else algebra.neg(scalar),
        functools.reduce(algebra.mul, vectors, algebra.ONE),
    )


def _recalled(u: Update) -> list[str]:
    return [w.correction.state for w in u.writes if w.correction is not None]


def _partner(form: NormalForm, lag: str) -> tuple[str, Node] | None:
    """The state that goes wherever `lag` goes, and the factor by which the lag is added to it."""
    moved = passages(form.micro_steps[0].updates)
    targets = {to: f for (to, of), f in moved.items() if of == lag}
    for s in form.states:
        own = {to: f for (to, of), f in moved.items() if of == s.name}
        if s.name == lag or own.keys() != targets.keys() or not own:
            continue
        ratios = [_quotient(targets[to], own[to]) for to in own]
        first = ratios[0]
        if first is not None and all(r == first for r in ratios):
            factor = functools.reduce(algebra.mul, first.elements(), algebra.ONE)
            if factor.kind is Kind.SCALAR and not results_of(factor) and _has_token(form, factor):
                return s.name, factor
    return None


def _has_token(form: NormalForm, node: Node) -> bool:
    tokens = {operand_leaf(o) for o in form.operands if o.per is Per.TOKEN}
    return not tokens.isdisjoint(topological(node))


def _quotient(a: Node, b: Node) -> Counter[Node] | None:
    """The factors of a / b, where b's are among a's, with one sign."""
    (sign, over), (other, under) = algebra.factors(a), algebra.factors(b)
    numerator, denominator = (Counter(x for x in y if x != algebra.ONE) for y in (over, under))
    return numerator - denominator if sign == other and denominator <= numerator else None


# ---- reads ---------------------------------------------------------------------------------------


def _by_reads(form: NormalForm) -> tuple[Stage, ...]:
    places = _places(form)
    if places is None or not max(places[0].values()):
        return ()
    at, reads = places
    stages = []
    last = max((*at.values(), *reads))
    for place in range(last + 1):
        split = _Split(form, place, at, reads)
        stages.append(split.stage(is_last=place == last))
    return tuple(stages)


def _places(form: NormalForm) -> tuple[dict[str, int], list[int]] | None:
    """The stages of states and of reads; None where a state's read needs one of its own before."""
    at, reads = {s.name: 0 for s in form.states}, [0] * len(form.reads)
    updates = form.micro_steps[0].updates
    for _ in range(2 * (len(at) + len(reads)) + 1):
        before = dict(at), list(reads)
        for n, r in enumerate(form.reads):
            reads[n] = max((at[r.state], *(1 + reads[m] for m in results_of(r.key))))
            at[r.state] = max(at[r.state], reads[n])
        for u in updates:
            at[u.state] = max((at[u.state], *(1 + reads[m] for m in results_of(*of_update(u)))))
            for other in seen_by(u):
                at[u.state] = at[other] = max(at[u.state], at[other])
        if (at, reads) == before:
            return at, reads
    return None


class _Split:
    """One stage of a form: what is known before are operands of its own."""

    def __init__(
        self, form: NormalForm, place: int, at: Mapping[str, int], reads: list[int]
    ) -> None:
        self._form, self._place = form, place
        self._at, self._reads = at, reads
        self._own = [n for n, p in enumerate(reads) if p == place]
        self._made: dict[tuple[Node, bool], Made] = {}
        self._mixed: dict[Node, Node] = {}  # of own results and others: what is there instead

    def stage(self, *, is_last: bool) -> Stage:
        form = self._form
        states = tuple(s for s in form.states if self._at[s.name] == self._place)
        updates = form.micro_steps[0].updates
        moved = tuple(self._update(u) for u in updates if self._at[u.state] == self._place)
        reads = tuple(replace(form.reads[n], key=self._known(form.reads[n].key)) for n in self._own)
        needed: list[int] = []
        if is_last:
            outputs = tuple(self._known(n) for n in form.outputs)
        else:
            needed = [n for n in self._own if self._is_needed(n)]
            outputs = tuple(self._known(result_leaf(form, n)) for n in needed)
        core = replace(
            form, states=states, micro_steps=(MicroStep(moved),), reads=reads, outputs=outputs
        )
        step = as_step(core)
        made = tuple(self._made.values())
        name = f"{form.name}_stage_{self._place + 1}"
        declared = _declared(name, form, states, made, step.next_states, step.outputs)
        return Stage(declared, tuple(s.name for s in states), made, tuple(needed))

    def _is_needed(self, n: int) -> bool:
        form = self._form
        later = [r.key for m, r in enumerate(form.reads) if self._reads[m] > self._place]
        for u in form.micro_steps[0].updates:
            later += of_update(u) if self._at[u.state] > self._place else []
        return n in results_of(*later, *form.outputs)

    def _update(self, u: Update) -> Update:
        writes = []
        for w in u.writes:
            c = w.correction
            if c is not None:
                c = Correction(c.state, self._known(c.key), self._known(c.scale), c.decayed)
            value = None if w.value is None else self._known(w.value)
            writes.append(Write(self._known(w.key), value, c))
        log = None if u.log_decay is None else self._known(u.log_decay, decays=True)
        columns = None if u.columns is None else self._known(u.columns, decays=True)
        mixes = tuple(Mix(m.state, self._known(m.factor)) for m in u.mixes)
        return replace(u, log_decay=log, columns=columns, mixes=mixes, writes=tuple(writes))

    def _known(self, node: Node, *, decays: bool = False) -> Node:
        """`node`, where what results of earlier stages make is an operand."""
        below = results_of(node)
        if not below:
            return node
        if not set(below) & set(self._own):
            if (node, decays) not in self._made:  # a key is narrow, the same as a log-decay wide
                name = _fresh(self._form, f"given_{len(self._made)}")
                operand = Operand(name, node.kind, Per.TOKEN)
                self._made[node, decays] = Made(operand, node, decays=decays)
            return operand_leaf(self._made[node, decays].operand)
        if node.op is Op.RESULT:
            (n,) = below
            return Node(Op.RESULT, (), (self._own.index(n),), node.kind)
        if node not in self._mixed:
            args = tuple(self._known(a) for a in node.args)
            self._mixed[node] = Node(node.op, args, node.attrs, node.kind, node.loc)
        return self._mixed[node]


# ---- declarations --------------------------------------------------------------------------------


def _fresh(form: NormalForm, name: str) -> str:
    taken = {o.name for o in form.operands} | {s.name for s in form.states}
    taken |= {p.name for p in form.params}
    while name in taken:
        name += "_"
    return name


def _declared(
    name: str,
    form: NormalForm,
    states: tuple[StateDecl, ...],
    made: Iterable[Made],
    ends: tuple[Node, ...],
    outputs: tuple[Node, ...],
) -> Declaration:
    """The declaration of a step that is known as expressions, of what these need."""
    leaves = frozenset(n for n in topological(*ends, *outputs) if not n.args)
    operands = [
        o for o in (*form.operands, *(m.operand for m in made)) if operand_leaf(o) in leaves
    ]
    params = [p for p in form.params if param_leaf(p) in leaves]

    def step(*_: object, **__: object) -> object:
        found = tuple(map(Traced, ends)), tuple(map(Traced, outputs))
        new, o = (x[0] if len(x) == 1 else x for x in found)
        return new, o

    hints = {s.name: annotation_of(s.kind, Per.TOKEN) for s in states}
    hints |= {o.name: annotation_of(o.kind, o.per) for o in operands}
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(n, usual, annotation=a) for n, a in hints.items()]
    given += [_number(p) for p in params]
    step.__name__ = step.__qualname__ = name
    step.__doc__ = f"A call that {form.name} is made of."
    step.__annotations__ = {**hints, **{p.name: float for p in params}}
    step.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
    return Declaration(step)


def _number(p: Param) -> inspect.Parameter:
    default = inspect.Parameter.empty if p.default is None else p.default
    return inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, default=default)
