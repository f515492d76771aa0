"""Expressions as text: infix, with the fewest parentheses, as the user would have written them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .ir import Node, Op

_BINARY = {Op.ADD: (" + ", 1), Op.SUB: (" - ", 1), Op.MUL: ("*", 2), Op.DIV: ("/", 2)}
_ATOM = 9


def infix(node: Node, names: Mapping[Node, str] | None = None) -> str:
    """An expression in infix; `names` replaces subexpressions by names."""
    return _text(node, names or {})[0]


def _text(node: Node, names: Mapping[Node, str]) -> tuple[str, int]:
    if node in names:
        return names[node], _ATOM
    op = node.op
    if op is Op.CONST:
        return _number(node.attrs[0])
    if op in (Op.PARAM, Op.STATE):
        return str(node.attrs[0]), _ATOM
    if op is Op.OPERAND:
        name, index = node.attrs
        return (str(name) if index is None else f"{name}[{index}]"), _ATOM
    if op is Op.RESULT:
        return f"r{node.attrs[0]}", _ATOM
    if op in _BINARY:
        symbol, level = _BINARY[op]
        left = _wrapped(node.args[0], level, names)
        # the right side of - and / binds tighter, and no sign follows an operator
        right = _wrapped(node.args[1], level + (op in (Op.SUB, Op.DIV)), names)
        right = f"({right})" if right.startswith("-") else right
        return f"{left}{symbol}{right}", level
    if op is Op.NEG:
        return f"-{_wrapped(node.args[0], 2, names)}", 2
    if op is Op.SCALE:
        return f"{_wrapped(node.args[1], 2, names)}*{_wrapped(node.args[0], 2, names)}", 2
    if op in (Op.READ, Op.READ_VALUE):
        return f"{_wrapped(node.args[0], 2, names)} @ {_wrapped(node.args[1], 3, names)}", 2
    if op is Op.WITHIN:
        lo, hi = (_number(a)[0] for a in node.attrs)
        return f"within({_text(node.args[0], names)[0]}, {lo}, {hi})", _ATOM
    if op is Op.SUM and node.args[0].op is Op.MUL:
        return f"dot({', '.join(_text(a, names)[0] for a in node.args[0].args)})", _ATOM
    return f"{op.name.lower()}({', '.join(_text(a, names)[0] for a in node.args)})", _ATOM


def _wrapped(node: Node, level: int, names: Mapping[Node, str]) -> str:
    text, own = _text(node, names)
    return f"({text})" if own < level else text


def _number(value: object) -> tuple[str, int]:
    if isinstance(value, int | float):
        if value == 2.0**-126:
            return "2^-126", _ATOM
        if math.isinf(value):
            return ("inf" if value > 0 else "-inf"), _ATOM
        return f"{value:.6g}", _ATOM if value >= 0 else 2
    return str(value), _ATOM
