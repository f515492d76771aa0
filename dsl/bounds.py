"""Interval analysis of the preamble: bounds of a gate that hold for all operands."""

from __future__ import annotations

import math

from . import algebra
from .elementwise import ELEMENTWISE
from .intervals import Interval
from .ir import Node, Op, topological


def _is_unit_vector(node: Node) -> bool:
    """x * rsqrt(sum(x²) + eps), eps >= 0: every channel lies in [-1, 1]."""
    for x, r in (node.args, node.args[::-1]):
        if r.op is not Op.RSQRT:
            continue
        below = r.args[0]
        eps = algebra.number(below.args[1]) if below.op is Op.ADD else None
        if eps is not None and eps >= 0:
            below = below.args[0]
        if below.op is Op.SUM and below.args[0].op is Op.MUL and below.args[0].args == (x, x):
            return True
    return False


def _bounds(node: Node, args: list[Interval]) -> Interval:
    value = algebra.number(node)
    if value is not None:
        return Interval(value, value)
    if node.op is Op.SUM:  # the number of channels is unknown, so only the sign survives
        lo = 0.0 if args[0].lo >= 0.0 else -math.inf
        return Interval(lo, 0.0 if args[0].hi <= 0.0 else math.inf)
    if node.op not in ELEMENTWISE:
        return Interval()
    if node.op is Op.MUL and node.args[0] == node.args[1]:
        size = abs(args[0])
        return size * size
    found = ELEMENTWISE[node.op].interval(*args, *node.attrs)
    if node.op is Op.MUL and _is_unit_vector(node):
        return found.meet(Interval(-1.0, 1.0))
    return found


def interval(node: Node) -> Interval:
    """An interval that holds every channel of `node` for all operands; sound, not tight."""
    found: dict[Node, Interval] = {}
    for n in topological(node):
        found[n] = _bounds(n, [found[a] for a in n.args]).finite()
    return found[node]
