"""Cascades: what is read of some states may be anything in the updates of later ones.

States whose updates see one another, or mix, are of one *level*; a level sees the reads of earlier
ones only. So a step is affine level by level: to a level, what earlier ones were read for is known.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from . import algebra, errors
from .affine import Moment, MomentRead, Walker
from .elementwise import ELEMENTWISE
from .ir import Kind, Node, Op, topological
from .normal_form import Phase, Read
from .step import Step

READS = (Op.READ, Op.READ_VALUE)


def levels(step: Step) -> list[list[int]]:
    """The states by number, level by level, in the order of the signature."""
    sees = _sees(step)

    @functools.cache
    def level(n: int) -> int:
        return max((level(m) + 1 for m in sees[n] if n not in sees[m]), default=0)

    found: list[list[int]] = []
    for n in range(len(sees)):
        while len(found) <= level(n):
            found.append([])
        found[level(n)].append(n)
    return found


def cycle(step: Step, level: Sequence[int]) -> str:
    """A sentence about states of a level that see one another; empty if none do."""
    sees = _sees(step)
    names = [step.states[n].name for n in level if any(n in sees[m] for m in sees[n] - {n})]
    if not names:
        return ""
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"; {listed} see one another, so that none of them is known before the others"


def _sees(step: Step) -> list[set[int]]:
    """The states that the update of each one sees, through those that it sees too."""
    number = {s.name: n for n, s in enumerate(step.states)}
    sees = []
    for node in step.next_states:
        below = topological(node)
        sees.append({number[str(n.attrs[0])] for n in below if n.op is Op.STATE})
    for n, node in enumerate(step.next_states):
        for name in direct_states(node):  # the two add up: neither is known before the other
            sees[number[name]].add(n)
    for through in range(len(sees)):
        for seen in sees:
            if through in seen:
                seen |= sees[through]
    return sees


def without_plain_reads(step: Step) -> Step:
    """The step with products of vectors for reads of what holds no state: outer products alone."""

    @functools.cache
    def plain(node: Node) -> Node:
        args = tuple(plain(a) for a in node.args)
        if any(a is not b for a, b in zip(args, node.args, strict=True)):
            node = Node(node.op, args, node.attrs, node.kind, node.loc)
        if node.op not in READS or _states(node):
            return node
        found = Walker({}).read(node).const
        assert found is not None, "it holds nothing but what is written"
        return found

    return replace(
        step,
        next_states=tuple(plain(n) for n in step.next_states),
        outputs=tuple(plain(n) for n in step.outputs),
    )


def direct_states(node: Node) -> frozenset[str]:
    """The states that a state expression is made of, those that it only reads left out."""
    return frozenset(str(n.attrs[0]) for n in state_nodes(node) if n.op is Op.STATE)


def state_nodes(node: Node) -> frozenset[Node]:
    """The state expressions that one is made of, those that it only reads left out."""
    found, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack += [a for a in n.args if a.kind.is_state and n.op not in READS]
    return frozenset(found)


class Results:
    """The reads of a step, and expressions in which reads are RESULT leaves."""

    def __init__(self, step: Step, order: list[list[int]]) -> None:
        self.reads: list[Read] = []
        self._level = {step.states[i].name: n for n, level in enumerate(order) for i in level}
        self._kinds = {s.name: s.kind for s in step.states}
        self._stops: dict[Node, Moment] = {}
        self._decays: dict[Moment, Node] = {}
        self._walker = Walker(self._stops)
        self._done: dict[tuple[Node, int], Node] = {}

    def know(self, stops: Mapping[Node, Moment], decays: Mapping[Moment, Node]) -> None:
        """Take in a level: the expressions of its states' moments, and their own factors there."""
        self._stops |= stops
        self._decays |= decays
        self._walker = Walker(self._stops)

    def rewrite(self, node: Node, level: int) -> Node:
        """`node` as one of that level: with the results of earlier levels for what is read of them.

        Raises:
            NoChunkForm: something else is made of an earlier level's state.
        """
        key = (node, level)
        if key not in self._done:
            self._done[key] = self._rewritten(node, level)
        return self._done[key]

    def _rewritten(self, node: Node, level: int) -> Node:
        if all(self._level[name] >= level for name in _states(node)):
            return node
        if node.kind.is_state:
            own = max((self._level[name] for name in direct_states(node)), default=level)
            if own < level and (known := self.rewrite(node, own)) in self._stops:
                return known  # with its own reads of itself
        elif node.op in READS:
            return self._read(node, level)
        elif node.op not in ELEMENTWISE and node.op is not Op.SUM:
            raise errors.NoChunkForm(
                f"the output holds {node.op.name.lower()} of a state", "", "read it", node.loc
            )
        args = tuple(self.rewrite(a, level) for a in node.args)
        return Node(node.op, args, node.attrs, node.kind, node.loc)

    def _read(self, node: Node, level: int) -> Node:
        """A read, as what is known of it if all of its states are of earlier levels."""
        state = node.args[1] if node.op is Op.READ else node.args[0]
        args = tuple(self.rewrite(a, level) for a in node.args)
        node = Node(node.op, args, (), node.kind, node.loc)
        if any(self._level[name] >= level for name in direct_states(state)):
            return node
        form = self._walker.read(node)
        parts = [] if form.const is None else [form.const]
        parts += [algebra.mul(coef, self._result(read)) for coef, read in form.reads]
        return functools.reduce(algebra.add, parts)

    def _result(self, read: MomentRead) -> Node:
        """The leaf that stands for a read."""
        name, at = read.moment.state, read.moment.index
        own = self._decays.get(read.moment)  # of rows and of columns: an outer product
        if read.coef == own and own != algebra.ONE:
            entry = Read(name, read.key, at, Phase.DECAYED, not read.left)
        elif at == 0:
            entry = Read(name, read.folded, 0, Phase.BEFORE, not read.left)
        else:
            entry = Read(name, read.folded, at - 1, Phase.AFTER, not read.left)
        if entry not in self.reads:
            self.reads.append(entry)
        kind = Kind.SCALAR if self._kinds[name] is Kind.KEY_STATE else Kind.VALUE
        if not read.left:
            kind = Kind.KEY
        return Node(Op.RESULT, (), (self.reads.index(entry),), kind)


@functools.lru_cache(maxsize=65536)
def _states(node: Node) -> frozenset[str]:
    """The states below an expression."""
    return frozenset(str(n.attrs[0]) for n in topological(node) if n.op is Op.STATE)
