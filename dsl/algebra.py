"""Constructors of elementwise expressions for the passes; they fold constants, signs and ones."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .ir import Kind, Node, Op, constant, topological

ONE = constant(1.0)
MINUS_ONE = constant(-1.0)


def number(node: Node) -> float | None:
    """The value of a constant; None for anything else."""
    if node.op is not Op.CONST:
        return None
    value = node.attrs[0]
    return float(value) if isinstance(value, int | float) else None


def _kind(a: Node, b: Node) -> Kind:
    return b.kind if a.kind is Kind.SCALAR else a.kind


def mul(a: Node, b: Node) -> Node:
    """a * b; a Scalar broadcasts."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return constant(x * y)
    if x == 1.0:
        return b
    if y == 1.0:
        return a
    if x == -1.0:
        return neg(b)
    if y == -1.0:
        return neg(a)
    if a.op is Op.NEG:
        return neg(mul(a.args[0], b))
    if b.op is Op.NEG:
        return neg(mul(a, b.args[0]))
    return Node(Op.MUL, (a, b), (), _kind(a, b))


def neg(a: Node) -> Node:
    """-a."""
    x = number(a)
    if x is not None:
        return constant(-x)
    return a.args[0] if a.op is Op.NEG else Node(Op.NEG, (a,), (), a.kind)


def add(a: Node, b: Node) -> Node:
    """a + b; a Scalar broadcasts."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return constant(x + y)
    if x == 0.0 and b.kind is _kind(a, b):
        return b
    if y == 0.0 and a.kind is _kind(a, b):
        return a
    if b.op is Op.NEG:
        return Node(Op.SUB, (a, b.args[0]), (), _kind(a, b))
    if a.op is Op.NEG:
        return Node(Op.SUB, (b, a.args[0]), (), _kind(a, b))
    return Node(Op.ADD, (a, b), (), _kind(a, b))


def div(a: Node, b: Node) -> Node:
    """a / b; a Scalar broadcasts."""
    y = number(b)
    if y == 1.0:
        return a
    return Node(Op.DIV, (a, b), (), _kind(a, b))


def unary(op: Op, a: Node) -> Node:
    """An elementwise function."""
    return Node(op, (a,), (), a.kind)


def dot(a: Node, b: Node) -> Node:
    """Inner product of two vectors of one kind."""
    product = mul(a, b)
    if product.op is Op.NEG:
        return neg(Node(Op.SUM, product.args, (), Kind.SCALAR))
    return Node(Op.SUM, (product,), (), Kind.SCALAR)


def total(nodes: Iterable[Node]) -> Node | None:
    """The sum of some expressions; None of none."""
    result: Node | None = None
    for node in nodes:
        result = node if result is None else add(result, node)
    return result


def factors(node: Node) -> tuple[int, Counter[Node]]:
    """A product as a sign, 1 or -1, and its factors with their powers; numbers are positive.

    Each part of the expression is looked at once, however often it is a factor.
    """
    order = topological(node)
    powers = Counter({node: 1})
    negative = 0
    for n in reversed(order):
        if n.op in (Op.NEG, Op.MUL) and n in powers:
            count = powers.pop(n)
            negative += count if n.op is Op.NEG else 0
            for a in n.args:
                powers[a] += count
    found: Counter[Node] = Counter()
    for n in (n for n in order if n in powers):
        value = number(n)
        if value is not None and value < 0.0:
            negative += powers[n]
            found[constant(-value)] += powers[n]
        else:
            found[n] += powers[n]
    return -1 if negative % 2 else 1, found


def product(sign: int, powers: Mapping[Node, int]) -> Node:
    """The product of such factors."""
    return functools.reduce(mul, (_power(x, n) for x, n in powers.items()), constant(float(sign)))


def _power(x: Node, n: int) -> Node:
    """x to the n-th: squares of squares, so that a large power is a short expression."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    square = mul(half, half)
    return mul(square, x) if n % 2 else square


def common_factor(nodes: Sequence[Node | None]) -> tuple[Node | None, tuple[Node | None, ...]]:
    """The Scalar factors that all have, with the sign of the first, and what is left of each.

    None among `nodes` is 0, and stays; the factor of nothing else is None.
    """
    terms = [None if n is None else factors(n) for n in nodes]
    known = [t for t in terms if t is not None]
    if not known:
        return None, tuple(nodes)
    scalars = [
        Counter({x: n for x, n in found.items() if x.kind is Kind.SCALAR}) for _, found in known
    ]
    shared = functools.reduce(operator.and_, scalars)
    first, _ = known[0]
    rest = tuple(None if t is None else product(t[0] * first, t[1] - shared) for t in terms)
    return product(first, shared), rest


def leaves(node: Node) -> frozenset[str]:
    """The names of operands and parameters, and numbers of reads, that an expression depends on."""
    found = (n for n in topological(node) if n.op in (Op.OPERAND, Op.PARAM, Op.RESULT))
    return frozenset(str(n.attrs[:2]) for n in found)


def split_scalar(vector: Node) -> tuple[Node, Node]:
    """`(s, x)` with `vector = s * x`, s the Scalar factors that do not depend on x.

    A normalisation `k * rsqrt(sum(k²))` stays whole: half precision needs keys of length 1.
    """
    if vector.op is Op.NEG:
        s, x = split_scalar(vector.args[0])
        return neg(s), x
    if vector.op is Op.MUL and vector.kind is not Kind.SCALAR:
        a, b = vector.args
        if b.kind is Kind.SCALAR:
            a, b = b, a
        if a.kind is Kind.SCALAR and not leaves(a) & leaves(b):
            s, x = split_scalar(b)
            return mul(a, s), x
    if vector.op is Op.DIV and vector.args[1].kind is Kind.SCALAR:
        a, b = vector.args
        if a.kind is not Kind.SCALAR and not leaves(a) & leaves(b):
            s, x = split_scalar(a)
            return div(s, b), x
    return ONE, vector
