"""What a layer does to each operand of a declaration, read off what the declaration does with it.

Nothing here knows a recurrence or an operand by its name. Gates of decays are found as the inputs
of examinations are (`runtime.inputs.ranges`); features, steps and gates of features by their places
in the writes, corrections, reads and the output of the normal form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

import torch

from ...dsl import oracle
from ...dsl.bounds import interval
from ...dsl.errors import NotLowered
from ...dsl.ir import Kind, Node, Op, Per, operands_of, topological
from ...dsl.normal_form import NormalForm, Operand, Write, expressions, results_of
from ...dsl.turns import log_decays
from ..inputs import ANY, NEGATIVE, POSITIVE, UNIT, Range, kinds_only, ranges, usual_params


class OperandRole(Enum):
    """How a layer computes an operand from the hidden vector."""

    FEATURE = "projection, short convolution, silu: queries, keys and values"
    POSITIVE = "projection, short convolution, elu + 1: Keys of a sum that is divided by"
    LINEAR = "projection, short convolution: a feature that the declaration activates itself"
    PAIRED = "the Key that a correction writes, each channel times a sigmoid of a projection"
    LOG_DECAY = "projection to a log-decay <= 0"
    LOG_UNIT = "minus softplus of a projection: the logarithm of a step size"
    RATE = "softplus of a projection: a decay rate >= 0"
    UNIT = "sigmoid of a projection: a step size, a decay factor or a gate, in (0, 1)"
    BOUNDED = "projection into the bounds that the declaration promises, or that keep states small"
    RAW = "projection only: the declaration applies its own activation"


FEATURES = frozenset({OperandRole.FEATURE, OperandRole.POSITIVE, OperandRole.LINEAR})
_DECLARED = frozenset({OperandRole.BOUNDED, OperandRole.LOG_DECAY})
_RANGES = {
    OperandRole.LOG_DECAY: NEGATIVE,
    OperandRole.LOG_UNIT: NEGATIVE,
    OperandRole.RATE: POSITIVE,
    OperandRole.UNIT: UNIT,
}
# of a step along what another state recalls: momentum takes it again and again
_SMALL_STEP = Range(0.0, 0.125)
_ACTIVATIONS = frozenset(
    {Op.EXP, Op.LOG, Op.EXPM1, Op.LOG1P, Op.SIGMOID, Op.LOGSIGMOID, Op.SOFTPLUS, Op.TANH, Op.SQRT}
    | {Op.RSQRT, Op.ABS, Op.MAXIMUM, Op.MINIMUM, Op.AT_LEAST, Op.AT_MOST}
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A correction's own Key is `sign` times a fraction of `of`, the Key that it writes.

    So the correction takes away from the state in the direction that it reads, and never adds.
    """

    of: str
    sign: float


@dataclass(frozen=True, slots=True)
class Roles:
    """What a layer does to the operands of one form, by name.

    Attributes:
        roles: the role of every operand.
        declared: the bounds of those that are BOUNDED, or a LOG_DECAY with a lower bound.
        pairs: of those that are PAIRED.
        unit: features to scale to unit length, since the state would grow otherwise.
        ones: operands per head that multiply something, and start at 1.
    """

    roles: dict[str, OperandRole]
    declared: dict[str, Range] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    unit: tuple[str, ...] = ()
    ones: frozenset[str] = frozenset()

    def range_of(self, name: str) -> Range:
        """Where the entries of an operand that is no feature lie."""
        role = self.roles[name]
        bounds = self.declared.get(name) if role in _DECLARED else None
        return bounds or _RANGES.get(role, ANY)


def default_roles(form: NormalForm) -> dict[str, OperandRole]:
    """The role of every operand, by what the declaration does with it.

    What the declaration activates itself is left as it is projected. Otherwise gates of decays get
    the signs that keep decays at most 1, Scalars are step sizes, and Keys and Values are features;
    those that only multiply features are gates.

    Args:
        form: the normal form of a recurrence (`op.declaration.normal_form()`).

    Returns:
        Roles by operand name.
    """
    return roles_of(form).roles


def roles_of(form: NormalForm, params: Mapping[str, float] | None = None) -> Roles:
    """The roles of every operand with what goes with them; `params`: numbers of the call."""
    writes = [w for m in form.micro_steps for u in m.updates for w in u.writes]
    corrections = [w for w in writes if w.correction is not None]
    decays = own_decays(form)
    uses = [n for n in expressions(form) if n not in decays] + [*form.outputs]
    exponents = [*_scalar_exponents(uses)]
    gates = _gates(form, usual_params(form) | dict(params or {}), exponents)
    features = _features(form, uses)
    activated = {name for name in operands_of(*uses) if _activates(uses, name)}
    positive = _divided_by_keys(form)

    def role(o: Operand) -> OperandRole:
        if o.name in gates:
            return _gate_role(gates[o.name], o.name in operands_of(*decays))
        vector = o.kind is not Kind.SCALAR
        if vector and o.name in features:
            if o.name in activated:
                return OperandRole.LINEAR
            wanted = positive and o.kind is Kind.KEY
            return OperandRole.POSITIVE if wanted else OperandRole.FEATURE
        if o.name in activated:
            return OperandRole.RAW
        if o.per is Per.HEAD:
            scales = operands_of(*(w.correction.scale for w in corrections if w.correction))
            return OperandRole.UNIT if o.name in scales else OperandRole.RAW
        return OperandRole.UNIT

    roles = {o.name: role(o) for o in form.operands}
    pairs = {} if positive else _pairs(form, corrections, roles)
    roles |= dict.fromkeys(pairs, OperandRole.PAIRED)
    small = {n for n in _steps_elsewhere(form) if roles[n] is OperandRole.UNIT}
    roles |= dict.fromkeys(small, OperandRole.BOUNDED)
    recalled = operands_of(*(k for w in corrections for k in _keys(w)))
    measured = operands_of(*(n for n in topological(*uses) if n.op is Op.SUM))
    kept = {OperandRole.FEATURE, OperandRole.POSITIVE}
    return Roles(
        roles,
        {n: r for n, r in gates.items() if _is_declared(roles[n], r)}
        | dict.fromkeys(small, _SMALL_STEP),
        pairs,
        tuple(n for n in recalled if roles[n] in kept and n not in measured),
        frozenset(
            o.name
            for o in form.operands
            if o.per is Per.HEAD and roles[o.name] is OperandRole.RAW and _multiplies(uses, o.name)
        ),
    )


def own_decays(form: NormalForm) -> list[Node]:
    """The log-decays of operands alone; others also depend on what was read of a state."""
    return [node for _, node in log_decays(form) if not results_of(node)]


def _steps_elsewhere(form: NormalForm) -> set[str]:
    """What scales a correction that moves one state by what it recalls of another, and no more.

    Such a correction is momentum's, or that of a mini-batch: it does not see what it has moved.
    """
    updates = [u for m in form.micro_steps for u in m.updates]
    scales = [
        w.correction.scale
        for u in updates
        for w in u.writes
        if w.correction is not None and w.correction.state != u.state
    ]
    mixed = operands_of(*(m.factor for u in updates for m in u.mixes))
    return operands_of(*scales).keys() - mixed.keys()


def _is_declared(role: OperandRole, found: Range) -> bool:
    return role is OperandRole.BOUNDED or (
        role is OperandRole.LOG_DECAY and found.low > NEGATIVE.low
    )


def _gate_role(found: Range, decays: bool) -> OperandRole:
    if decays and found.high == 0.0:
        return OperandRole.LOG_DECAY
    if found == NEGATIVE:
        return OperandRole.LOG_UNIT
    usual = {ANY: OperandRole.RAW, POSITIVE: OperandRole.RATE, UNIT: OperandRole.UNIT}
    return usual.get(found, OperandRole.BOUNDED)


def _gates(
    form: NormalForm, params: Mapping[str, float], exponents: list[Node]
) -> dict[str, Range]:
    """The ranges of gates, under which decays are at most 1 and powers of e in steps too."""
    for also in (exponents, []):
        try:
            return dict(ranges(form, params, also).gates)
        except NotLowered:  # no signs keep them so: the projections are left as they are
            continue
    found = kinds_only(form).gates
    names = operands_of(*own_decays(form))
    return dict(found) | dict.fromkeys(names, ANY)


def _scalar_exponents(uses: list[Node]) -> Iterator[Node]:
    """What e is raised to, outside decays, where it is made of Scalars alone."""
    for node in topological(*uses):
        if node.op is Op.EXP and node.kind is Kind.SCALAR:
            below = topological(node)
            if not any(n.op in (Op.RESULT, Op.SUM, *_ACTIVATIONS - {Op.EXP}) for n in below):
                yield node.args[0]


def _activates(uses: list[Node], name: str) -> bool:
    """Whether an activation is taken of the operand, other than of a sum over its channels."""
    sums = frozenset(n for n in topological(*uses) if n.op is Op.SUM)
    return any(
        n.op in _ACTIVATIONS and _below(n, name, sums) for n in topological(*uses, stop=sums)
    )


def _below(node: Node, name: str, stop: frozenset[Node]) -> bool:
    return any(n.op is Op.OPERAND and n.attrs[0] == name for n in topological(node, stop=stop))


# a factor of a term: a vector operand, and whether it is there as itself; "" is what a read recalls
_Term = frozenset[tuple[str, bool]]


@lru_cache(maxsize=4096)
def _terms(node: Node) -> set[_Term]:
    """An expression as a sum of products: the vectors in each product."""
    none: set[_Term] = {frozenset()}
    if node.kind is Kind.SCALAR:
        return none
    if node.op is Op.OPERAND:
        return {frozenset({(str(node.attrs[0]), True)})}
    if node.op is Op.RESULT:
        return {frozenset({("", True)})}
    if node.op in (Op.ADD, Op.SUB):
        return _terms(node.args[0]) | _terms(node.args[1])
    if node.op is Op.MUL:
        return {a | b for a in _terms(node.args[0]) for b in _terms(node.args[1])}
    if node.op in (Op.NEG, Op.WITHIN):
        return _terms(node.args[0])
    if node.op is Op.DIV:
        below = {(n, False) for t in _terms(node.args[1]) for n, _ in t}
        return {t | below for t in _terms(node.args[0])}
    inside = {(n, False) for a in node.args for t in _terms(a) for n, _ in t}
    return {frozenset(inside)}


def _features(form: NormalForm, uses: list[Node]) -> set[str]:
    """The vectors that are written, read with or recalled; others only multiply these.

    Alone in a term, a vector is a feature. Of those that only occur together, the first as declared
    is, where possible one that occurs as itself and not in a function.
    """
    order = [o.name for o in form.operands if o.kind is not Kind.SCALAR and o.per is Per.TOKEN]
    terms = set[_Term]().union(*(_terms(n) for n in uses))
    named = [{n: as_itself for n, as_itself in sorted(t) if n in order} for t in terms]
    recalls = [("", True) in t for t in terms]
    found = {
        next(iter(t))
        for t, recall in zip(named, recalls, strict=True)
        if len(t) == 1 and not recall
    }
    together = zip(named, recalls, strict=True)
    waiting = [t for t, recall in together if t and not recall and not found & t.keys()]
    for t in sorted(waiting, key=lambda t: [order.index(n) for n in t]):
        if not found & t.keys():
            found.add(min(t, key=lambda n: (not t[n], order.index(n))))
    used = {n for t in named for n in t}
    return found | (set(order) - used)  # those that only occur in sums over channels


def _multiplies(uses: list[Node], name: str) -> bool:
    """Whether an operand is a factor of a product, as itself."""
    return any(
        n.op is Op.MUL and any(a.op is Op.OPERAND and a.attrs[0] == name for a in n.args)
        for n in topological(*uses)
    )


def _divided_by_keys(form: NormalForm) -> bool:
    """Whether the output divides by a read of a KeyState that may come near 0."""
    key_states = {s.name for s in form.states if s.kind is Kind.KEY_STATE}

    def recalls(node: Node) -> bool:
        return any(
            n.op is Op.RESULT and form.reads[int(str(n.attrs[0]))].state in key_states
            for n in topological(node)
        )

    divisors = [n.args[1] for n in topological(*form.outputs) if n.op is Op.DIV]
    return any(recalls(d) and interval(d).lo <= 0.0 <= interval(d).hi for d in divisors)


def _keys(write: Write) -> tuple[Node, ...]:
    return (write.key,) if write.correction is None else (write.key, write.correction.key)


def _pairs(
    form: NormalForm, corrections: list[Write], roles: Mapping[str, OperandRole]
) -> dict[str, Pair]:
    """The Keys with which a correction reads, where it writes with another."""
    operands = {o.name: o for o in form.operands}

    def feature(node: Node) -> str | None:
        found = [n for n in operands_of(node) if roles[n] is OperandRole.FEATURE]
        return found[0] if len(found) == 1 else None

    pairs: dict[str, Pair] = {}
    for w in corrections:
        assert w.correction is not None
        written, read = feature(w.key), feature(w.correction.key)
        if written is None or read is None or written == read or written in pairs:
            continue
        a, b = operands[written], operands[read]
        if (a.kind, a.micro) == (b.kind, b.micro) and read not in pairs:
            pairs[read] = Pair(written, -_sign(form, w))
    return pairs


def _sign(form: NormalForm, write: Write) -> float:
    """The sign of a correction where every operand is positive."""
    assert write.correction is not None
    factors = [write.correction.scale, *_keys(write)]
    env = {}
    for n in topological(*factors):
        if n.op in (Op.OPERAND, Op.PARAM, Op.RESULT):
            size = () if n.kind is Kind.SCALAR else (1,)
            env[n] = torch.full(size, 0.5, dtype=torch.float64, device="cpu")
    product = 1.0
    for value in oracle.evaluate(factors, env):
        product *= float(value.sum())
    return -1.0 if product < 0 else 1.0
