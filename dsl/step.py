"""A step: the recurrence exactly as declared, or as a normal form describes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from . import algebra
from .ir import Kind, Node, Op
from .normal_form import NormalForm, Operand, Param, Phase, StateDecl, Update, Write


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `next_states[i]` is the new value of `states[i]`; `micro` the length of tuples."""

    name: str
    operands: tuple[Operand, ...]
    params: tuple[Param, ...]
    states: tuple[StateDecl, ...]
    next_states: tuple[Node, ...]
    output: Node
    micro: int = 1

    @property
    def roots(self) -> tuple[Node, ...]:
        """Everything that the step computes."""
        return (*self.next_states, self.output)

    @property
    def digest(self) -> str:
        """Names the step in every process (source locations do not count)."""
        text = repr((self.operands, self.params, self.states, [n.key for n in self.roots]))
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def state_leaf(state: StateDecl) -> Node:
    """The incoming value of a state."""
    return Node(Op.STATE, (), (state.name,), state.kind)


def operand_leaf(operand: Operand, index: int | None = None) -> Node:
    """An operand; of a micro operand, its entry for one micro-step."""
    return Node(Op.OPERAND, (), (operand.name, index), operand.kind)


def param_leaf(param: Param) -> Node:
    """A run-time float."""
    return Node(Op.PARAM, (), (param.name,), Kind.SCALAR)


# ---------------------------------------------------------------- of a normal form


@lru_cache(maxsize=256)
def as_step(form: NormalForm) -> Step:
    """The step that a normal form describes: decays, then writes, then reads, and the output."""
    now = {s.name: state_leaf(s) for s in form.states}
    micro = max((o.micro for o in form.operands), default=False) and len(form.micro_steps)
    reads: dict[int, Node] = {}

    def read(index: int, phase: Phase, states: dict[str, Node]) -> None:
        for n, r in enumerate(form.reads):
            if r.micro_step == index and r.phase is phase:
                reads[n] = _recall(r.key, states[r.state])

    for index, micro_step in enumerate(form.micro_steps):
        read(index, Phase.BEFORE, now)
        decayed = {**now, **{u.state: _decayed(u, now[u.state]) for u in micro_step.updates}}
        read(index, Phase.DECAYED, decayed)
        now = {**decayed, **{u.state: _updated(u, now, decayed) for u in micro_step.updates}}
        read(index, Phase.AFTER, now)
    return Step(
        form.name,
        form.operands,
        form.params,
        form.states,
        tuple(now[s.name] for s in form.states),
        _with_results(form.output, reads),
        micro or 1,
    )


def _decayed(update: Update, state: Node) -> Node:
    if update.log_decay is None:
        return state
    return Node(Op.SCALE, (state, algebra.unary(Op.EXP, update.log_decay)), (), state.kind)


def _updated(update: Update, now: dict[str, Node], decayed: dict[str, Node]) -> Node:
    state = decayed[update.state]
    terms = [Node(Op.SCALE, (now[m.state], m.factor), (), state.kind) for m in update.mixes]
    terms += [_written(w, now, decayed, state.kind) for w in update.writes]
    for term in terms:
        state = Node(Op.ADD, (state, term), (), state.kind)
    return state


def _written(write: Write, now: dict[str, Node], decayed: dict[str, Node], kind: Kind) -> Node:
    value = write.value
    if write.correction is not None:
        c = write.correction
        recalled = _recall(c.key, (decayed if c.decayed else now)[c.state])
        step_size = algebra.neg(c.scale)
        if value is not None and value.op is Op.MUL and value.args[0] == step_size:
            value = algebra.mul(step_size, algebra.add(value.args[1], algebra.neg(recalled)))
        else:
            recalled = algebra.mul(c.scale, recalled)
            value = recalled if value is None else algebra.add(value, recalled)
    assert value is not None, "a write has a value or a correction"
    pair = (value, write.key) if write.key.kind is Kind.VALUE else (write.key, value)
    return Node(Op.OUTER, pair, (), kind)


def _recall(key: Node, state: Node) -> Node:
    if key.kind is Kind.VALUE:
        return Node(Op.READ_VALUE, (state, key), (), Kind.KEY)
    kind = Kind.SCALAR if state.kind is Kind.KEY_STATE else Kind.VALUE
    return Node(Op.READ, (key, state), (), kind)


def _with_results(node: Node, reads: dict[int, Node]) -> Node:
    if node.op is Op.RESULT:
        index = node.attrs[0]
        assert isinstance(index, int)
        return reads[index]
    args = tuple(_with_results(a, reads) for a in node.args)
    return Node(node.op, args, node.attrs, node.kind, node.loc)
