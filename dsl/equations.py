"""A step and its normal form as equations in the notation of papers: S_t from S_{t-1}."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from . import algebra
from .ir import Kind, Node, Op, Per, topological
from .latex import LATEX, Equation
from .normal_form import NormalForm, Phase, Update, Write, expressions, levels_of
from .printing import naming, printed
from .step import Step, operand_leaf, output_names, state_leaf


def equations(step: Step) -> tuple[Equation, ...]:
    """The declared step, and last its output o, or outputs o_1, o_2, ...

    A state that is used more than once between the old and the new one has a row of its own, and so
    have parts that come again where a row would be too long.
    Operands of tokens have an index t; above it stands the number of their micro-step.
    """
    names = _leaves(step)
    order = [n for n in topological(*step.roots) if n.args]
    uses = Counter(a for n in order for a in n.args)
    ends = dict(zip(step.next_states, step.states, strict=True))
    between = [n for n in order if n.kind.is_state and uses[n] > 1 and n not in ends]
    totals = Counter(_state_of(n) for n in between)
    passed: Counter[str] = Counter()
    rows = []
    parts = naming(*step.roots, known=[*ends, *between])
    for node in order:
        if node in ends:
            label = LATEX.symbol(ends[node].name, ["t"])
        elif node in between:
            state = _state_of(node)
            passed[state] += 1
            name = f"{state}_bar" if totals[state] == 1 else f"{state}_{passed[state]}"
            label = LATEX.symbol(name, ["t"])
        elif node in parts:
            label = LATEX.symbol(f"x_{parts[node][1:]}", ["t"])
        else:
            continue
        rows.append(Equation(label, printed(node, names, LATEX).text))
        names[node] = label
    for state_decl, node in zip(step.states, step.next_states, strict=True):
        if not node.args:  # another state, or itself, as it was
            rows.append(Equation(LATEX.symbol(state_decl.name, ["t"]), names[node]))
    for name, node in zip(output_names(len(step.outputs)), step.outputs, strict=True):
        rows.append(Equation(LATEX.symbol(name, ["t"]), printed(node, names, LATEX).text))
    return tuple(rows)


def _leaves(step: Step) -> dict[Node, str]:
    names = {state_leaf(s): LATEX.symbol(s.name, ["t-1"]) for s in step.states}
    for o in step.operands:
        token = ["t"] if o.per is Per.TOKEN else []
        for index in range(step.micro) if o.micro else [None]:
            name = o.name if index is None else f"{o.name}_{index + 1}"
            names[operand_leaf(o, index)] = LATEX.symbol(name, token)
    return names


def _state_of(node: Node) -> str:
    """The state that an expression of states is an update of: the first that it adds to."""
    while node.args:
        node = next(a for a in node.args if a.kind.is_state) if _has_state(node) else node.args[0]
    return str(node.attrs[0])


def _has_state(node: Node) -> bool:
    return any(a.kind.is_state for a in node.args)


# ---- the normal form -----------------------------------------------------------------------------


@lru_cache(maxsize=256)
def as_step(form: NormalForm) -> Step:
    """The step that a normal form describes: decays, then writes, then reads, and the output."""
    now = {s.name: state_leaf(s) for s in form.states}
    every = topological(*expressions(form), *form.outputs)
    entries = [n.attrs[1] for n in every if n.op is Op.OPERAND]
    micro = max((n + 1 for n in entries if isinstance(n, int)), default=0)
    reads: dict[int, Node] = {}

    seen: dict[tuple[int, Phase, str], Node] = {}  # every state's moments: later levels read them
    for level in levels_of(form):
        for index, micro_step in enumerate(form.micro_steps):
            updates = [_known(u, reads) for u in micro_step.updates if u.state in level.states]
            decayed = {**now, **{u.state: _decayed(u, now[u.state]) for u in updates}}
            after = {**decayed, **{u.state: _updated(u, now, decayed) for u in updates}}
            for phase, states in zip(Phase, (now, decayed, after), strict=True):
                seen |= {(index, phase, name): states[name] for name in level.states}
            now = after
        for n in level.reads:  # each after those that its key holds, whatever the states they see
            r = form.reads[n]
            state = seen[r.micro_step, r.phase, r.state]
            reads[n] = _recall(with_results(r.key, reads), state)
    return Step(
        form.name,
        form.operands,
        form.params,
        form.states,
        tuple(now[s.name] for s in form.states),
        tuple(with_results(n, reads) for n in form.outputs),
        max(micro, len(form.micro_steps)) if micro else 1,
    )


def _known(u: Update, reads: dict[int, Node]) -> Update:
    """An update with the reads of earlier levels for their results."""

    def known(node: Node) -> Node:
        return with_results(node, reads)

    writes = []
    for w in u.writes:
        c = w.correction
        if c is not None:
            c = replace(c, key=known(c.key), scale=known(c.scale))
        writes.append(Write(known(w.key), None if w.value is None else known(w.value), c))
    mixes = tuple(replace(m, factor=known(m.factor)) for m in u.mixes)
    log = None if u.log_decay is None else known(u.log_decay)
    columns = None if u.columns is None else known(u.columns)
    return Update(u.state, log, u.bound, mixes, tuple(writes), columns)


def _decayed(update: Update, state: Node) -> Node:
    for log in (update.log_decay, update.columns):
        if log is not None:
            state = Node(Op.SCALE, (state, algebra.unary(Op.EXP, log)), (), state.kind)
    return state


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


def with_results(node: Node, reads: dict[int, Node]) -> Node:
    """`node`, with expressions for the results of reads, by number."""
    done: dict[Node, Node] = {}
    for n in topological(node):
        if n.op is Op.RESULT:
            (index,) = n.attrs
            assert isinstance(index, int)
            done[n] = reads[index]
        else:
            args = tuple(done[a] for a in n.args)
            done[n] = n if args == n.args else Node(n.op, args, n.attrs, n.kind, n.loc)
    return done[node]
