"""Expressions in a notation, with the fewest parentheses; by default as the user wrote them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from .ir import Node, Op, topological
from .notation import Level, Notation, Text

_LONGEST = 400  # a line that would be longer in characters has names for parts that come again,
_LONGEST_PART = 60  # if they are longer than that
_ALGEBRA = (Op.SCALE, Op.OUTER, Op.READ, Op.READ_VALUE, Op.SUM)


class _Infix(Notation):
    """Python's signs, and powers of two that are no one's choice as such."""

    def number(self, value: float) -> Text:
        if value == 2.0**-126:
            return Text("2^-126")
        if math.isinf(value):
            return Text("inf" if value > 0 else "-inf")
        return Text(f"{value:.6g}", Level.ATOM if value >= 0 else Level.PRODUCT)


_SIGNS = {Op.ADD: " + ", Op.SUB: " - ", Op.MUL: "*", Op.DIV: "/"}
INFIX = _Infix({**_SIGNS, Op.READ: " @ ", Op.READ_VALUE: " @ "}, negatives=Level.PRODUCT)


def infix(node: Node, names: Mapping[Node, str] | None = None) -> str:
    """An expression in infix; `names` replaces subexpressions by names.

    Without them, one that would be too long ends with what its parts are.
    """
    if names is not None:
        return printed(node, names).text
    names = naming(node)
    text = printed(node, names).text
    where = [f"{name} = {definition(part, names)}" for part, name in names.items()]
    return f"{text} where {', '.join(where)}" if where else text


def definition(node: Node, names: Mapping[Node, str]) -> str:
    """A named expression, of other names."""
    return infix(node, {n: name for n, name in names.items() if n != node})


def naming(
    *roots: Node, known: Collection[Node] = (), taken: Collection[str] = ()
) -> dict[Node, str]:
    """Names x1, x2, ... for parts that expressions use several times, each defined by earlier ones.

    There are none where every line is short, as almost always; else a text would be as long as the
    ways through its expression are many. `known`: expressions that have names, and lines of their
    own; `taken`: names.
    """
    order = topological(*roots)
    _, longest = _repeated(order, roots, known, math.inf)
    if longest <= _LONGEST:
        return {}
    parts, _ = _repeated(order, roots, known, _LONGEST_PART)
    taken = {*taken, *(str(n.attrs[0]) for n in order if n.attrs)}
    free = (name for k in range(1, len(parts) + len(taken) + 1) if (name := f"x{k}") not in taken)
    return dict(zip(parts, free, strict=False))


def _repeated(
    order: Sequence[Node], roots: Sequence[Node], known: Collection[Node], least: float
) -> tuple[list[Node], int]:
    """Parts with several uses that are longer than `least`, and how long the longest line is that
    has names for them: about, in characters."""
    uses = Counter([*roots, *(a for n in order for a in n.args)])
    parts: list[Node] = []
    lengths: dict[Node, int] = {}
    longest = 0
    for n in order:
        own = len(n.op.name) + 2 if n.args else len(str(n.attrs[0]))
        lengths[n] = own + sum(lengths[a] for a in n.args)
        if n in known or (uses[n] > 1 and lengths[n] > least):
            longest = max(longest, lengths[n])
            parts += [] if n in known else [n]
            lengths[n] = len("x10")
    return parts, max(longest, *(lengths[r] for r in roots))


def printed(node: Node, names: Mapping[Node, str], notation: Notation = INFIX) -> Text:
    """The same in any notation, with its level, which says where it needs parentheses."""
    op = node.op
    if node in names:
        return Text(names[node])
    if op in (Op.PARAM, Op.STATE):
        return Text(notation.symbol(str(node.attrs[0])))
    if op is Op.OPERAND:
        name, index = node.attrs
        return Text(notation.symbol(str(name), [] if index is None else [str(index)]))
    if op is Op.RESULT:
        return Text(notation.symbol(f"r{node.attrs[0]}"))
    if op is Op.CONST:
        return _number(node.attrs[0], notation)
    dot = op is Op.SUM and node.args[0].op is Op.MUL
    args = [printed(a, names, notation) for a in (node.args[0] if dot else node).args]
    if op in _ALGEBRA:
        return notation.algebra(node, args)
    if op in notation.signs:
        return notation.elementwise(node, args)
    if op is Op.NEG:
        return notation.negative(*args)
    if op is Op.WITHIN:
        args += [_number(a, notation) for a in node.attrs]
    return notation.function(op, args)


def _number(value: object, notation: Notation) -> Text:
    return notation.number(value) if isinstance(value, int | float) else Text(str(value))
