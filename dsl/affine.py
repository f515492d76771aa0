"""State expressions as affine forms over moments: the algebra that `normalise` works with.

A *moment* is a state's value between micro-steps. Every legal state expression is

    sum_m coef_m . S_m  +  sum_t row_t (col_t)^T          with coef a Scalar, Key or Value

where one side of a term may also carry one read of a moment: `col = scale * (b^T S_m)` or
`row = scale * (S_m b)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import algebra, errors
from .ir import Kind, Loc, Node, Op


@dataclass(frozen=True, slots=True)
class Moment:
    """State `state` after `index` micro-steps."""

    state: str
    index: int


@dataclass(frozen=True, slots=True)
class MomentRead:
    """`(coef . key)^T S` at a moment (`left`), or `S (coef . key)`; coef is kept apart from key
    so that it can be recognised as the decay of the micro-step."""

    moment: Moment
    key: Node
    coef: Node
    left: bool

    @property
    def folded(self) -> Node:
        return algebra.mul(self.coef, self.key)


@dataclass(frozen=True, slots=True)
class Term:
    """`row col^T`; with a left read `row (col * read)^T`, with a right one `(row * read) col^T`."""

    row: Node
    col: Node
    read: MomentRead | None
    loc: Loc | None


@dataclass(frozen=True, slots=True)
class StateForm:
    """An affine state expression."""

    coefs: tuple[tuple[Moment, Node], ...] = ()
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True, slots=True)
class VectorForm:
    """An affine vector: `const + sum coef * read`."""

    const: Node | None = None
    reads: tuple[tuple[Node, MomentRead], ...] = ()


NOT_AFFINE_NAMES = {
    Op.MUL: "a product of two values that depend on it",
    Op.DIV: "a division by a value that depends on it",
}


class Walker:
    """Affine forms of expressions, relative to the moments `stops`; each node is walked once."""

    def __init__(self, stops: Mapping[Node, Moment]) -> None:
        self._stops = stops
        self._depends: dict[Node, bool] = {}
        self._states: dict[Node, StateForm] = {}
        self._vectors: dict[Node, VectorForm] = {}

    def depends(self, node: Node) -> bool:
        """Whether an expression depends on the state."""
        known = self._depends.get(node)
        if known is None:
            known = node.op is Op.STATE or node in self._stops
            known = known or any(self.depends(a) for a in node.args)
            self._depends[node] = known
        return known

    def state(self, node: Node) -> StateForm:
        """The affine form of a state expression. Raises NotAffine, NoChunkForm."""
        if node not in self._states:
            self._states[node] = self._state(node)
        return self._states[node]

    def vector(self, node: Node) -> VectorForm:
        """The affine form of a Key, Value or Scalar. Raises NotAffine, NoChunkForm."""
        if not self.depends(node):
            return VectorForm(const=node)
        if node not in self._vectors:
            self._vectors[node] = self._vector(node)
        return self._vectors[node]

    def read(self, node: Node) -> VectorForm:
        """The affine form of a read. Raises NotAffine, NoChunkForm."""
        if node not in self._vectors:
            self._vectors[node] = self._read(node)
        return self._vectors[node]

    def _state(self, node: Node) -> StateForm:
        if node in self._stops:
            return StateForm(coefs=((self._stops[node], algebra.ONE),))
        if node.op in (Op.ADD, Op.SUB):
            left, right = (self.state(a) for a in node.args)
            if node.op is Op.SUB:
                right = _scaled(right, algebra.MINUS_ONE, node)
            return _plus(left, right, node.loc)
        if node.op is Op.SCALE:
            state, factor = node.args
            if self.depends(factor):
                raise errors.NotAffine(
                    "the state is multiplied by a value that depends on it",
                    "that factor",
                    _culprit(factor, node),
                )
            return _scaled(self.state(state), factor, node)
        if node.op is Op.OUTER:
            return self._outer(node)
        raise _not_affine(node)

    def _outer(self, node: Node) -> StateForm:
        key, value = node.args
        if self.depends(key) and self.depends(value):
            raise errors.NotAffine(
                "both sides of outer depend on the state", "the reading", node.loc
            )
        terms: list[Term] = []
        if self.depends(key):
            form = self.vector(key)
            terms += [Term(coef, value, read, node.loc) for coef, read in form.reads]
            terms += [Term(form.const, value, None, node.loc)] if form.const is not None else []
        else:
            form = self.vector(value)
            terms += [Term(key, form.const, None, node.loc)] if form.const is not None else []
            terms += [Term(key, coef, read, node.loc) for coef, read in form.reads]
        return StateForm(terms=tuple(terms))

    def _vector(self, node: Node) -> VectorForm:
        op = node.op
        if op in (Op.READ, Op.READ_VALUE):
            return self.read(node)
        if op in (Op.ADD, Op.SUB):
            a, b = (self.vector(x) for x in node.args)
            if op is Op.SUB:
                b = _times(b, algebra.MINUS_ONE)
            const = algebra.total(c for c in (a.const, b.const) if c is not None)
            return VectorForm(const, a.reads + b.reads)
        if op is Op.NEG:
            return _times(self.vector(node.args[0]), algebra.MINUS_ONE)
        if op is Op.MUL and not all(self.depends(a) for a in node.args):
            dependent, factor = node.args
            if self.depends(factor):
                dependent, factor = factor, dependent
            return _times(self.vector(dependent), factor)
        if op is Op.DIV and not self.depends(node.args[1]):
            return _times(self.vector(node.args[0]), algebra.div(algebra.ONE, node.args[1]))
        if op is Op.WITHIN:  # a promise about a value changes nothing of it
            return self.vector(node.args[0])
        if op is Op.SUM:
            raise errors.NoChunkForm(
                "what is read from the state is summed over its channels",
                "that contracts both axes of the state at once",
                "read with `dot(q, z)` from a KeyState, or sum outside the op",
                node.loc,
            )
        raise _not_affine(node)

    def _read(self, node: Node) -> VectorForm:
        left = node.op is Op.READ
        key, state = node.args if left else node.args[::-1]
        if self.depends(key):
            raise errors.NotAffine(
                "the state is read with a vector that depends on it", "the reading", node.loc
            )
        form = self.state(state)
        consts: list[Node] = []
        reads: list[tuple[Node, MomentRead]] = []
        for moment, coef in form.coefs:
            rows, columns = sides(coef)
            inner, outer = (rows, columns) if left else (columns, rows)
            if outer.kind is Kind.SCALAR:  # of all channels: kept with the key
                inner, outer = algebra.mul(outer, inner), algebra.ONE
            reads.append((outer, MomentRead(moment, key, inner, left)))
        for t in form.terms:
            read_side, other = (t.row, t.col) if left else (t.col, t.row)
            if t.read is not None and t.read.left is not left:
                raise errors.NoChunkForm(
                    "the state is read along one axis in what is written, and then along the other",
                    "no chunk form of products on the left and on the right of the state together "
                    "is derived yet",
                    "read along one axis only, or read the state before or after its whole update",
                    node.loc,
                )
            weight = algebra.dot(key, read_side)
            if t.read is None:
                consts.append(algebra.mul(weight, other))
            else:
                reads.append((algebra.mul(weight, other), t.read))
        return VectorForm(algebra.total(consts), tuple(reads))


def _plus(a: StateForm, b: StateForm, loc: Loc | None) -> StateForm:
    coefs = dict(a.coefs)
    for moment, coef in b.coefs:
        kinds = {coef.kind, dict(a.coefs).get(moment, coef).kind}
        if moment in coefs and ({Kind.KEY, Kind.VALUE} <= kinds or Kind.STATE in kinds):
            raise _per_entry(loc)
        coefs[moment] = algebra.add(coefs[moment], coef) if moment in coefs else coef
    return StateForm(tuple(coefs.items()), a.terms + b.terms)


def _scaled(form: StateForm, factor: Node, node: Node) -> StateForm:
    coefs = [(moment, _both_sides(factor, coef)) for moment, coef in form.coefs]
    on_row = factor.kind is Kind.KEY
    terms = []
    for t in form.terms:
        # a Scalar goes to the side of the read (its scale), else to the value
        if on_row or (factor.kind is Kind.SCALAR and t.read is not None and not t.read.left):
            terms.append(replace(t, row=algebra.mul(factor, t.row)))
        else:
            terms.append(replace(t, col=algebra.mul(factor, t.col)))
    return StateForm(tuple(coefs), tuple(terms))


def sides(coef: Node) -> tuple[Node, Node]:
    """A factor of a state as those of its rows and of its columns; a Scalar is of the rows."""
    if coef.kind is Kind.STATE:
        rows, columns = coef.args
        return rows, columns
    return (algebra.ONE, coef) if coef.kind is Kind.VALUE else (coef, algebra.ONE)


def _both_sides(factor: Node, coef: Node) -> Node:
    """The product of two factors of a state: of rows and of columns, their outer product."""
    kinds = {factor.kind, coef.kind}
    if kinds != {Kind.KEY, Kind.VALUE} and Kind.STATE not in kinds:
        return algebra.mul(factor, coef)
    (a, b), (c, d) = sides(factor), sides(coef)
    return Node(Op.OUTER, (algebra.mul(a, c), algebra.mul(b, d)), (), Kind.STATE)


def _per_entry(loc: Loc | None) -> errors.NoChunkForm:
    return errors.NoChunkForm(
        "the state is scaled by a sum of factors of its rows and of its columns",
        "what is left of a state between two tokens would be a number per entry, which no "
        "product of matrices gives",
        "multiply the factors instead: `exp(g) * S * exp(h)` scales rows and columns",
        loc,
    )


def _times(form: VectorForm, factor: Node) -> VectorForm:
    const = None if form.const is None else algebra.mul(factor, form.const)
    return VectorForm(const, tuple((algebra.mul(factor, c), r) for c, r in form.reads))


def _culprit(factor: Node, node: Node) -> Loc | None:
    return factor.loc or node.loc


def _not_affine(node: Node) -> errors.NotAffine:
    name = node.op.name.lower()
    if node.op in NOT_AFFINE_NAMES:
        return errors.NotAffine(
            f"the state enters {NOT_AFFINE_NAMES[node.op]}", "that operation", node.loc
        )
    return errors.NotAffine(f"the state passes through {name}", name, node.loc)
