"""The normal form of a legal step: the only description of it that the compiler reads.

Per head and token, a list of micro-steps; in each, for every state,

    S <- decay . S + sum_other mix * S_other + sum_w  key_w (value_w + scale_w * (b_w^T S_read))^T

with reads of the state at stated moments and outputs that are elementwise functions of them
(mathematics, (1) and (2); the low-rank term a (b^T S) is a write whose value is a correction).
All vectors, gates and the output are StepIR expressions over the operands: the preamble and the
postamble. In a cascade they are over results of reads too (RESULT leaves): of states of an earlier
level, which the step can know before. When `transposed`, the roles of the Key and Value axes are
exchanged: `Write.key`, `Correction.key` are Values and `Write.value` is a Key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

from .errors import InvalidIR
from .intervals import Interval
from .ir import Kind, Node, Op, Per, topological


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of the call. `micro`: a tuple, one entry per micro-step (tensor [B,T,n,...])."""

    name: str
    kind: Kind
    per: Per
    micro: bool = False

    @property
    def spelled(self) -> str:
        """The operand's kind as users write it: `HeadKey`, `tuple[Key, ...]`."""
        if self.micro:
            return f"tuple[{self.kind.spelled}, ...]"
        return f"Head{self.kind.spelled}" if self.per is Per.HEAD else self.kind.spelled

    @property
    def axes(self) -> tuple[str, ...]:
        """The tensor's axes by letter: n counts micro-steps, H the heads of Keys of tokens."""
        if self.per is Per.HEAD:
            return ("HV", *self.kind.axes)
        micro = ("n",) if self.micro else ()
        return ("B", "T", *micro, "H" if self.kind is Kind.KEY else "HV", *self.kind.axes)


@dataclass(frozen=True, slots=True)
class Param:
    """A keyword-only run-time float of the call."""

    name: str
    default: float | None


@dataclass(frozen=True, slots=True)
class StateDecl:
    """A declared state: STATE is [K, V], KEY_STATE is [K]."""

    name: str
    kind: Kind

    @property
    def axes(self) -> tuple[str, ...]:
        """The tensor's axes by letter; N counts sequences."""
        return ("N", "HV", *self.kind.axes)


@dataclass(frozen=True, slots=True)
class Correction:
    """`scale * (key^T S)`, added to a write: it recalls `state` as the micro-step begins.

    `decayed`: the reading sees `decay . S` (this micro-step's decay), not `S`. The decay is then
    not multiplied into `key`: the chunk form reads with the inclusive prefix instead (mathematics,
    after (6)). Without a decay it is True.
    """

    state: str
    key: Node
    scale: Node
    decayed: bool


@dataclass(frozen=True, slots=True)
class Write:
    """`key (value + correction)^T`, added to the state; one of the two may be absent."""

    key: Node
    value: Node | None
    correction: Correction | None


@dataclass(frozen=True, slots=True)
class Mix:
    """`factor * S_other` added to a state: by a Scalar, or by an angle of channels (`turns`).

    Of a state itself where its own factor may be negative: its log-decay is then -inf.
    """

    state: str
    factor: Node


@dataclass(frozen=True, slots=True)
class Update:
    """The change of one state in one micro-step. `log_decay` is a natural log; None: no decay.

    `columns`: the log-decay of the axis that is not recalled along, a decay beside the other.
    """

    state: str
    log_decay: Node | None
    bound: Interval
    mixes: tuple[Mix, ...]
    writes: tuple[Write, ...]
    columns: Node | None = None


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One update per state, all reading the states as they stand when the micro-step begins."""

    updates: tuple[Update, ...]


class Phase(Enum):
    """When, within its micro-step, a read sees the state."""

    BEFORE = "before the decay"
    DECAYED = "after the decay, before the writes"
    AFTER = "after the writes"


@dataclass(frozen=True, slots=True)
class Read:
    """`key^T S` at a moment: a Value (a Scalar for a KeyState). `other_axis`: `S key` instead.

    In declared axes, transposed or not: `other_axis` goes with a key that is a Value.
    """

    state: str
    key: Node
    micro_step: int
    phase: Phase
    other_axis: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class NormalForm:
    """A recurrence, normalised. `outputs` have RESULT leaves, one per entry of `reads`.

    `digest` names the meaning, not the spelling: it is equal for two declarations with one normal
    form. Forms with one name and one digest are equal.
    """

    name: str
    operands: tuple[Operand, ...]
    params: tuple[Param, ...]
    states: tuple[StateDecl, ...]
    micro_steps: tuple[MicroStep, ...]
    reads: tuple[Read, ...]
    outputs: tuple[Node, ...]
    transposed: bool = False

    digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        fields = (self.operands, self.params, self.states, self.reads, self.transposed)
        # one output alone is no tuple: digests name the artifacts that were shipped before
        outputs = self.outputs[0] if len(self.outputs) == 1 else self.outputs
        text = repr([_text(x) for x in (*fields, self.micro_steps, outputs)])
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        object.__setattr__(self, "digest", digest)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NormalForm):
            return NotImplemented
        return self.name == other.name and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.name, self.digest))


def result_leaf(form: NormalForm, index: int) -> Node:
    """The leaf of `outputs` that stands for the n-th read."""
    read = form.reads[index]
    state = next(s for s in form.states if s.name == read.state)
    kind = Kind.SCALAR if state.kind is Kind.KEY_STATE else Kind.VALUE
    return Node(Op.RESULT, (), (index,), Kind.KEY if read.other_axis else kind)


def expressions(form: NormalForm) -> list[Node]:
    """Every expression of the preamble, in the order of the form."""
    updates = (u for m in form.micro_steps for u in m.updates)
    return [*(n for u in updates for n in of_update(u)), *(r.key for r in form.reads)]


def of_update(u: Update) -> list[Node]:
    """Every expression of an update, in order."""
    found: list[Node | None] = [u.log_decay, u.columns, *(m.factor for m in u.mixes)]
    for w in u.writes:
        found += [w.key, w.value]
        if w.correction is not None:
            found += [w.correction.key, w.correction.scale]
    return [n for n in found if n is not None]


def results_of(*roots: Node) -> list[int]:
    """The reads whose results are below some expressions, by number."""
    found = (n.attrs[0] for n in topological(*roots) if n.op is Op.RESULT)
    return [n for n in found if isinstance(n, int)]


@dataclass(frozen=True, slots=True)
class Level:
    """States of one level of a cascade, and the reads that are known with them, by number."""

    states: tuple[str, ...]
    reads: tuple[int, ...]


def levels_of(form: NormalForm) -> tuple[Level, ...]:
    """The levels of a form: the updates of one, and its reads' keys, hold results of earlier ones.

    Of a form that is no cascade there is one. A read stands after those that its key holds.
    Raises InvalidIR where states see one another through results.
    """
    at = {s.name: 0 for s in form.states}
    updates = [u for m in form.micro_steps for u in m.updates]
    results = {id(u): results_of(*of_update(u)) for u in updates}
    reads: list[int] = []
    for _ in range(len(at) ** 2 + 1):
        reads = []
        for r in form.reads:
            below = results_of(r.key)
            if any(n >= len(reads) for n in below):
                raise InvalidIR("a read whose key holds the result of a later one")
            reads.append(max((at[r.state], *(reads[n] for n in below))))
        before = dict(at)
        for u in updates:
            at[u.state] = max((at[u.state], *(reads[n] + 1 for n in results[id(u)])))
            for other in seen_by(u):
                at[u.state] = at[other] = max(at[u.state], at[other])
        if at == before:
            break
    else:
        raise InvalidIR("states that see one another through results")
    return tuple(
        Level(
            tuple(name for name, n in at.items() if n == level),
            tuple(r for r, n in enumerate(reads) if n == level),
        )
        for level in range(max(at.values()) + 1)
    )


def seen_by(u: Update) -> list[str]:
    """The other states that mix into an update, or that it recalls."""
    recalled = (w.correction.state for w in u.writes if w.correction is not None)
    return [s for s in (*(m.state for m in u.mixes), *recalled) if s != u.state]


def are_rows(form: NormalForm) -> bool:
    """Whether a row of time, one micro-step of a token, holds all that is used in it.

    That is so if each micro-step takes its own entries of tuples and results of its own reads, and
    the output those of the last.
    """
    last = len(form.micro_steps) - 1
    pairs = [*((last, n) for n in form.outputs), *((r.micro_step, r.key) for r in form.reads)]
    for m, micro_step in enumerate(form.micro_steps):
        pairs += [(m, n) for u in micro_step.updates for n in of_update(u)]
    return all(
        form.reads[n].micro_step == m for m, node in pairs for n in results_of(node)
    ) and all(
        leaf.attrs[1] in (None, m)
        for m, node in pairs
        for leaf in topological(node)
        if leaf.op is Op.OPERAND
    )


@lru_cache(maxsize=1024)
def has_entries_apart(form: NormalForm) -> bool:
    """Whether entries of tuples are operands of their own, side by side in the row of a token."""
    return len(form.micro_steps) == 1 and not are_rows(form)


def groups_of(form: NormalForm, states: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Those of `states` that are coupled, together: by mixing, or by what is recalled."""
    linked = {name: {name} for name in states}
    for u in (u for m in form.micro_steps for u in m.updates if u.state in linked):
        joined = set().union(*(linked[n] for n in (u.state, *seen_by(u))))
        linked |= dict.fromkeys(joined, joined)
    for n, name in enumerate(states):
        if not linked[name] & set(states[:n]):
            yield tuple(x for x in states if x in linked[name])


def _text(x: object) -> str:
    """A value with every expression replaced by its digest (locations do not count)."""
    if isinstance(x, Node):
        return x.key
    if isinstance(x, tuple):
        return "(" + ",".join(_text(y) for y in x) + ")"
    if isinstance(x, Enum):
        return x.name
    slots = getattr(type(x), "__slots__", None)
    if slots:
        # a class renamed since: digests name the artifacts that were shipped before
        name = "Feedback" if isinstance(x, Correction) else type(x).__name__
        if isinstance(x, Update) and x.columns is None:  # a field that came later
            slots = [s for s in slots if s != "columns"]
        return name + "(" + ",".join(_text(getattr(x, s)) for s in slots) + ")"
    return repr(x)
