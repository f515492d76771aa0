"""Expressions as text: infix, with the fewest parentheses, as the user would have written them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .ir import Node, Op
from .notation import Level, Notation, Text

_SIGNS = {Op.ADD: " + ", Op.SUB: " - ", Op.MUL: "*", Op.DIV: "/"}
_NOTATION = Notation({**_SIGNS, Op.READ: " @ ", Op.READ_VALUE: " @ "}, negatives=Level.PRODUCT)


def infix(node: Node, names: Mapping[Node, str] | None = None) -> str:
    """An expression in infix; `names` replaces subexpressions by names."""
    return printed(node, names or {}).text


def printed(node: Node, names: Mapping[Node, str]) -> Text:
    """The same with its level, which says where it needs parentheses."""
    op = node.op
    if node in names:
        return Text(names[node])
    if op is Op.CONST:
        return _number(node.attrs[0])
    if op in (Op.PARAM, Op.STATE):
        return Text(str(node.attrs[0]))
    if op is Op.OPERAND:
        name, index = node.attrs
        return Text(str(name) if index is None else f"{name}[{index}]")
    if op is Op.RESULT:
        return Text(f"r{node.attrs[0]}")
    args = [printed(a, names) for a in node.args]
    if op in _NOTATION.signs:
        return _NOTATION.binary(op, *args)
    if op is Op.NEG:
        return _NOTATION.negative(*args)
    if op is Op.SCALE:
        return _NOTATION.binary(Op.MUL, *args[::-1])
    if op is Op.WITHIN:
        args += [_number(a) for a in node.attrs]
    if op is Op.SUM and node.args[0].op is Op.MUL:
        return Text(f"dot({', '.join(printed(a, names).text for a in node.args[0].args)})")
    return Text(f"{op.name.lower()}({', '.join(a.text for a in args)})")


def _number(value: object) -> Text:
    if isinstance(value, int | float):
        if value == 2.0**-126:
            return Text("2^-126")
        if math.isinf(value):
            return Text("inf" if value > 0 else "-inf")
        return Text(f"{value:.6g}", Level.ATOM if value >= 0 else Level.PRODUCT)
    return Text(str(value))
