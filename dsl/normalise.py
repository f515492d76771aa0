"""Pass: StepIR to the normal form, for any step that is affine in its states.

The step is cut into micro-steps at the expressions that already hold writes and are read again by
a later write (DeltaProduct); where no cut separates the step, the read is expanded instead. So are
all such reads of a step whose micro-steps take what others read, or entries of tuples that belong
to others (`normal_form.are_rows`): it is one micro-step. Between two cuts every expression is an
affine form over the states at the cut (`affine`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import algebra, errors
from .affine import Moment, MomentRead, StateForm, Term, Walker, sides
from .cascade import READS, Results, cycle, levels, state_nodes, without_plain_reads
from .decay import is_signed, log_decay, log_magnitude
from .intervals import Interval
from .ir import Kind, Loc, Node, Op, constant, topological
from .normal_form import (
    Correction,
    MicroStep,
    Mix,
    NormalForm,
    Read,
    StateDecl,
    Update,
    Write,
    are_rows,
)
from .step import Step, state_leaf
from .turns import mixing_factors, planes_of


def normalise(step: Step) -> NormalForm:
    """The normal form of a step, all in one micro-step if rows of micro-steps cannot hold it.

    Raises NotAffine, NoChunkForm, and the errors of `log_decay` about multipliers.
    """
    form = _normalised(step, cut=True)
    if are_rows(form):
        return form
    try:
        return _normalised(step, cut=False)
    except errors.DeclarationError:  # of reads along both axes, one after the other
        return form


def _normalised(step: Step, *, cut: bool) -> NormalForm:
    step = without_plain_reads(step)
    order = levels(step)
    results = Results(step, order)
    parts = []
    for n, level in enumerate(order):
        try:
            parts.append(_part(step, level, n, results, cut=cut))
        except (errors.NotAffine, errors.NoChunkForm) as mistake:
            mistake.why += cycle(step, level)
            raise
    transposed = _is_transposed(parts, step)
    form = NormalForm(
        step.name,
        step.operands,
        step.params,
        step.states,
        tuple(
            _micro_step(step, parts, index, transposed)
            for index in range(max(len(part.forms) for part in parts))
        ),
        *_reads(step, results, len(order)),
        transposed,
    )
    _check_mixing(step, form)
    return form


def _check_mixing(step: Step, form: NormalForm) -> None:
    """Raises NoChunkForm unless states mix by Scalars, but for angles of channels."""
    line = {s.name: n.loc for s, n in zip(step.states, step.next_states, strict=True)}
    for plane in planes_of(form):
        for (to, _), factor in (x for p in plane.left for x in p.items()):
            if len(plane.pairs) == 1:
                log_magnitude(factor, algebra.ONE, line[to])  # it is at most 1
    for m in range(len(form.micro_steps)):
        for name, factor in mixing_factors(form, [m]):
            if factor.kind is not Kind.SCALAR:
                raise errors.NoChunkForm(
                    "states that mix carry a gate per channel",
                    "what is left of one in another between two tokens would be a matrix of "
                    "tokens per channel, unless two states turn by an angle and decay alike",
                    "make the gates and factors of these states Scalars, or turn two states by "
                    "`rotate(x, y, angle)` under one gate for both, once a token, or uncouple them",
                    factor.loc or line[name],
                )


@dataclass(frozen=True, slots=True)
class _Part:
    """A level of a step: its states with their new values, and the form of each micro-step."""

    step: Step
    forms: list[tuple[StateForm, ...]]


def _part(step: Step, level: Sequence[int], n: int, results: Results, *, cut: bool) -> _Part:
    """The n-th level, of the states `level`, whose reads `results` knows from then on."""
    states = tuple(step.states[i] for i in level)
    part = replace(
        step,
        states=states,
        next_states=tuple(results.rewrite(step.next_states[i], n) for i in level),
    )
    bases = _cut(part) if cut else [tuple(state_leaf(s) for s in states)]
    forms: list[tuple[StateForm, ...]] = []
    stops: dict[Node, Moment] = {}
    decays: dict[Moment, Node] = {}
    for index, (base, target) in enumerate(itertools.pairwise([*bases, part.next_states])):
        moments = _moments(states, base, index)
        walker = Walker(moments)
        forms.append(tuple(walker.state(n) for n in target))
        stops = {**moments, **stops}
        decays |= _own_coefs(states, forms[-1], index)
    results.know(stops | _moments(states, part.next_states, len(bases)), decays)
    return _Part(part, forms)


def _reads(step: Step, results: Results, levels: int) -> tuple[tuple[Read, ...], tuple[Node, ...]]:
    """The reads of a step, and its outputs in terms of them."""
    outputs = tuple(results.rewrite(n, levels) for n in step.outputs)
    return tuple(results.reads), outputs


def _moments(states: Sequence[StateDecl], nodes: Sequence[Node], index: int) -> dict[Node, Moment]:
    return {n: Moment(s.name, index) for s, n in zip(states, nodes, strict=True)}


# ---------------------------------------------------------------- cutting into micro-steps


def _cut(step: Step) -> list[tuple[Node, ...]]:
    """The states at the start of each micro-step, as expressions."""
    bases = [tuple(state_leaf(s) for s in step.states)]
    while (found := _next_cut(step, bases[-1])) is not None:
        bases.append(found)
    return bases


def _next_cut(step: Step, base: tuple[Node, ...]) -> tuple[Node, ...] | None:
    walker = Walker(_moments(step.states, base, 0))
    above = topological(*step.next_states, stop=frozenset(base))
    for read in above:
        if read.op not in READS:
            continue
        state = read.args[1] if read.op is Op.READ else read.args[0]
        if not walker.state(state).terms:
            continue
        while state.op is Op.SCALE:  # a decay belongs to the micro-step that reads through it
            state = state.args[0]
        cut = _separator(step, base, state, above)
        if cut is not None:
            return cut
    return None


def _separator(
    step: Step, base: tuple[Node, ...], state: Node, above: list[Node]
) -> tuple[Node, ...] | None:
    """One expression per state, `state` among them, through which alone the step sees `base`."""
    own = [state_nodes(n) for n in step.next_states]
    slots = [n for n, s in enumerate(step.states) if s.kind is state.kind]
    for slot in sorted(slots, key=lambda n: state not in own[n]):  # a state rather than another
        choices: list[list[Node]] = []
        for j, other in enumerate(step.states):
            nodes = [n for n in above if n.kind is other.kind]
            nodes = [n for n in nodes if n in own[j]] + [n for n in nodes if n not in own[j]]
            if j == slot:
                nodes = [state]
            elif _is_alone(step, base, j):  # whole update in the first micro-step that there is
                nodes.reverse()
            choices.append(nodes)
        for cut in itertools.product(*choices):
            if cut == base or len(set(cut)) < len(cut):
                continue
            reached = set(topological(*step.next_states, stop=frozenset(cut))) - set(cut)
            if not reached & set(base):
                return cut
    return None


def _is_alone(step: Step, base: tuple[Node, ...], j: int) -> bool:
    """Whether state j and the others do not see each other."""
    others = [n for i, n in enumerate(step.next_states) if i != j]
    stop = frozenset(base)
    own = set(topological(step.next_states[j], stop=stop))
    return base[j] not in topological(*others, stop=stop) and not any(
        b in own for i, b in enumerate(base) if i != j
    )


# ---------------------------------------------------------------- one micro-step

# the log-decay of a state of which nothing is left
_FORGOTTEN = (constant(-math.inf), Interval(-math.inf, -math.inf)), None


def _own_coefs(
    states: Sequence[StateDecl], forms: Sequence[StateForm], index: int
) -> dict[Moment, Node]:
    """The decay of each state's own incoming value within micro-step `index`.

    A multiplier may be negative, or, of a state that mixes with others, be none: the state has no
    entry here, its decay is 0, and the multiplier a factor by which it goes into itself.
    """
    own = {}
    for s, form in zip(states, forms, strict=True):
        moment = Moment(s.name, index)
        multiplier = dict(form.coefs).get(moment)
        if multiplier is not None and not any(map(is_signed, sides(multiplier))):
            own[moment] = multiplier
    return own


def _mixed(names: Sequence[str], forms: Sequence[StateForm]) -> set[str]:
    """The states that others go into, and those others."""
    pairs = ((n, m.state) for n, f in zip(names, forms, strict=True) for m, _ in f.coefs)
    return {name for pair in pairs if len(set(pair)) > 1 for name in pair}


@dataclass(frozen=True, slots=True)
class _Axes:
    """By which axes states are multiplied: names of those that decay along rows, and columns, and
    of those that are recalled, or mix, along rows and along columns."""

    rows: set[str]
    columns: set[str]
    left: set[str]
    right: set[str]

    @staticmethod
    def of(parts: Sequence[_Part], *, mixes: bool = True) -> _Axes:
        """Of all micro-steps; without `mixes`, none of those that mix or have signs."""
        found = _Axes(set(), set(), set(), set())
        pairs = [zip(p.step.states, forms, strict=True) for p in parts for forms in p.forms]
        for name, form in ((s.name, f) for micro_step in pairs for s, f in micro_step):
            for moment, coef in form.coefs:
                both = (name, moment.state)
                alone = moment.state == name and not any(map(is_signed, sides(coef)))
                alone = alone or not mixes
                of_rows, of_columns = (x.kind is not Kind.SCALAR for x in sides(coef))
                if of_rows:
                    found.rows.update(both)
                    found.left.update(() if alone else both)
                if of_columns:
                    found.columns.update(both)
                    found.right.update(() if alone else both)
            for read in (t.read for t in form.terms if t.read is not None):
                side = found.left if read.left else found.right
                side.update((name, read.moment.state))
        return found

    @property
    def held(self) -> tuple[bool, bool]:
        """Whether the form may be held as it is, and transposed."""
        return (
            not self.right and not self.left & self.columns,
            not self.left and not self.right & self.rows,
        )


def _is_transposed(parts: Sequence[_Part], step: Step) -> bool:
    """Whether columns are the axis that is recalled along, or that alone decays."""
    axes = _Axes.of(parts)
    vectors = {s.name for s in step.states if s.kind is Kind.KEY_STATE}
    loc = next((n.loc for n in step.next_states if n.loc is not None), None)
    on_rows, on_columns = axes.held
    on_columns = on_columns and not vectors
    if not (on_rows or on_columns) and vectors and (axes.right or axes.columns):
        raise errors.NoChunkForm(
            "a KeyState accompanies a State whose columns decay or are read",
            "the form is transposed, and a KeyState has no columns to go with it",
            "declare the two as two ops",
            loc,
        )
    if not (on_rows or on_columns) and any(_Axes.of(parts, mixes=False).held):
        raise errors.NoChunkForm(
            "states have signs, turn or mix along one axis, and decay or are recalled along the "
            "other",
            "signs and angles are taken out of states along the axis that is recalled along, and "
            "of states that decay along no other; for both axes at once no chunk form is derived "
            "yet",
            "gate the rows, or the columns, not both; a Scalar gate, `exp(g)` or the like, goes "
            "with either",
            loc,
        )
    if not (on_rows or on_columns):
        raise errors.NoChunkForm(
            "the step acts on the rows of the state and on its columns",
            "a state may decay along both axes, but `k @ S` multiplies it on the left (K×K) and "
            "`S @ v` on the right (V×V): what is recalled along one axis of a state that decays, "
            "or is recalled, along the other is a system of equations for every channel",
            "use one side: `k @ S` with a Key or Scalar gate, or `S @ v` with a Value or Scalar "
            "gate",
            loc,
        )
    if not (on_rows and on_columns):
        return on_columns
    if bool(axes.rows | axes.left) != bool(axes.columns | axes.right):
        return bool(axes.columns | axes.right)
    # either will do: that with the reads of ordinary forms
    ops = {n.op for n in topological(*step.outputs)}
    return Op.READ_VALUE in ops and Op.READ not in ops


def _micro_step(step: Step, parts: Sequence[_Part], index: int, transposed: bool) -> MicroStep:
    """The updates of all levels; a level with fewer micro-steps has its states rest afterwards."""
    rest = Interval(0.0, 0.0)
    found = {s.name: Update(s.name, None, rest, (), ()) for s in step.states}
    for part in parts:
        if index < len(part.forms):
            updates = _updates(part.step, index, part.forms[index], transposed)
            found |= {u.state: u for u in updates}
    return MicroStep(tuple(found.values()))


def _updates(step: Step, index: int, forms: Sequence[StateForm], transposed: bool) -> list[Update]:
    names = [s.name for s in step.states]
    own = {m.state: c for m, c in _own_coefs(step.states, forms, index).items()}
    mixed = _mixed(names, forms)
    updates = []
    for name, form, node in zip(names, forms, step.next_states, strict=True):
        multiplier = dict(form.coefs).get(Moment(name, index))
        if multiplier is None and name not in mixed:
            raise errors.NoChunkForm(
                f"the new {name} does not contain the old {name}",
                "a state that is forgotten at every token has no log-decay (log 0)",
                f"compute it in the step instead of carrying it, or decay it: `exp(g) * {name}`",
                node.loc,
            )
        mixes = tuple(Mix(m.state, c) for m, c in form.coefs if m.state != name or name not in own)
        if multiplier is not None and name not in own and name not in mixed:
            log_magnitude(multiplier, algebra.ONE, node.loc)  # it is at most 1
        held, other = _logs(own[name], transposed, node.loc) if name in own else _FORGOTTEN
        writes = _writes(form.terms, own, transposed)
        updates.append(Update(name, held[0], held[1], mixes, writes, other))
    return updates


def _logs(
    multiplier: Node, transposed: bool, loc: Loc | None
) -> tuple[tuple[Node | None, Interval], Node | None]:
    """The log-decay of the axis that is held as rows, with its bounds, and that of the other."""
    held, other = sides(multiplier)
    if transposed and multiplier.kind is not Kind.SCALAR:
        held, other = other, held
    return log_decay(held, loc), log_decay(other, loc)[0]


def _writes(terms: Sequence[Term], own: Mapping[str, Node], transposed: bool) -> tuple[Write, ...]:
    """Terms gathered by write key, and the value and correction of each key."""
    values: dict[Node, list[Node]] = {}
    corrections: dict[Node, list[Correction]] = {}
    for term in terms:
        key, value = (term.col, term.row) if transposed else (term.row, term.col)
        scalar, key = algebra.split_scalar(key)
        value = algebra.mul(scalar, value)
        values.setdefault(key, [])
        corrections.setdefault(key, [])
        if term.read is None:
            values[key].append(value)
        else:
            corrections[key].append(_correction(term.read, value, own))
    writes: list[Write] = []
    for key in values:
        value_sum = algebra.total(values[key])
        merged = _merged(corrections[key], own)
        writes.append(Write(key, value_sum, merged[0] if merged else None))
        writes += [Write(key, None, f) for f in merged[1:]]
    return tuple(writes)


def _correction(read: MomentRead, scale: Node, own: Mapping[str, Node]) -> Correction:
    factor, vector = algebra.split_scalar(read.key)
    scale = algebra.mul(scale, factor)
    if read.coef == own.get(read.moment.state):
        return Correction(read.moment.state, vector, scale, True)
    factor, vector = algebra.split_scalar(algebra.mul(read.coef, vector))
    return Correction(read.moment.state, vector, algebra.mul(scale, factor), False)


def _merged(corrections: Sequence[Correction], own: Mapping[str, Node]) -> list[Correction]:
    """At most one correction per state read: scales add up on equal keys, else the keys do.

    Scales per channel do not go into keys: then there is one for each key.
    """
    by_state: dict[str, list[Correction]] = {}
    for f in corrections:
        by_state.setdefault(f.state, []).append(f)
    result: list[Correction] = []
    for state, group in by_state.items():
        if len({f.decayed for f in group}) > 1:
            group = [_undecayed(f, own[state]) for f in group]
        scales: dict[Node, Node] = {}
        for f in group:
            scales[f.key] = algebra.add(scales[f.key], f.scale) if f.key in scales else f.scale
        decayed = group[0].decayed
        if any(s.kind is not Kind.SCALAR for s in scales.values()):
            result += [Correction(state, key, scale, decayed) for key, scale in scales.items()]
            continue
        if len(scales) == 1:
            ((key, scale),) = scales.items()
        else:
            summed = algebra.total(algebra.mul(s, k) for k, s in scales.items())
            key, scale = (group[0].key if summed is None else summed), algebra.ONE
        result.append(Correction(state, key, scale, decayed))
    return result


def _undecayed(f: Correction, decay: Node) -> Correction:
    if not f.decayed:
        return Correction(f.state, f.key, f.scale, False)
    factor, key = algebra.split_scalar(algebra.mul(decay, f.key))
    return Correction(f.state, key, algebra.mul(f.scale, factor), False)
