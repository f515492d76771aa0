"""Expressions in a notation, with the fewest parentheses; by default as the user wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .ir import Node, Op
from .notation import Level, Notation, Text

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
    """An expression in infix; `names` replaces subexpressions by names."""
    return printed(node, names or {}).text


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
