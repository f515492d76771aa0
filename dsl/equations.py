"""A step and its normal form as equations in the notation of papers: S_t from S_{t-1}."""

from __future__ import annotations

from collections import Counter

from .ir import Node, Per, topological
from .latex import LATEX, Equation
from .printing import printed
from .step import Step, operand_leaf, state_leaf


def equations(step: Step) -> tuple[Equation, ...]:
    """The declared step, and last its output o.

    A state that is used more than once between the old and the new one has a row of its own.
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
    for node in order:
        if node in ends:
            label = LATEX.symbol(ends[node].name, ["t"])
        elif node in between:
            state = _state_of(node)
            passed[state] += 1
            name = f"{state}_bar" if totals[state] == 1 else f"{state}_{passed[state]}"
            label = LATEX.symbol(name, ["t"])
        else:
            continue
        rows.append(Equation(label, printed(node, names, LATEX).text))
        names[node] = label
    for state_decl, node in zip(step.states, step.next_states, strict=True):
        if not node.args:  # another state, or itself, as it was
            rows.append(Equation(LATEX.symbol(state_decl.name, ["t"]), names[node]))
    return (*rows, Equation("o_{t}", printed(step.output, names, LATEX).text))


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
