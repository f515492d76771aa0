"""Interval analysis of the preamble: what is known of a gate before any data is seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .ir import Node, Op, topological

_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Interval:
    """The closed interval [lo, hi] of the extended reals."""

    lo: float = -math.inf
    hi: float = math.inf

    def __add__(self, other: Interval) -> Interval:
        lo, hi = self.lo + other.lo, self.hi + other.hi
        return Interval(-math.inf if math.isnan(lo) else lo, math.inf if math.isnan(hi) else hi)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __mul__(self, other: Interval) -> Interval:
        corners = [_times(a, b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return Interval(min(corners), max(corners))

    def meet(self, other: Interval) -> Interval:
        """What lies in both; `other` where they do not meet (a promise overrides)."""
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        return Interval(lo, hi) if lo <= hi else other

    def inside(self, lo: float, hi: float) -> bool:
        return lo <= self.lo and self.hi <= hi


def _times(a: float, b: float) -> float:
    """a*b where 0 times infinity is 0: a corner of a product of intervals."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


def _finite(x: Interval) -> Interval:
    """An inner end that overflowed is a large number: an infinite one would not be sound."""
    return Interval(min(x.lo, _LARGEST), max(x.hi, -_LARGEST))


def _guarded(function: Callable[[float], float], x: float, low: float, high: float) -> float:
    """A monotone function at an end of an interval, with its limits where it overflows."""
    if x == -math.inf:
        return low
    if x == math.inf:
        return high
    try:
        return function(x)
    except OverflowError:
        return high
    except ValueError:  # below the domain of log or sqrt
        return low


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _rsqrt_up(x: float) -> float:
    return -1.0 / math.sqrt(x) if x > 0 else -math.inf


# increasing functions: (f, limit at -inf or below the domain, limit at +inf)
_INCREASING: dict[Op, tuple[Callable[[float], float], float, float]] = {
    Op.EXP: (math.exp, 0.0, math.inf),
    Op.LOG: (math.log, -math.inf, math.inf),
    Op.EXPM1: (math.expm1, -1.0, math.inf),
    Op.LOG1P: (math.log1p, -math.inf, math.inf),
    Op.SIGMOID: (_sigmoid, 0.0, 1.0),
    Op.LOGSIGMOID: (lambda x: -_softplus(-x), -math.inf, 0.0),
    Op.SOFTPLUS: (_softplus, 0.0, math.inf),
    Op.TANH: (math.tanh, -1.0, 1.0),
    Op.SQRT: (math.sqrt, 0.0, math.inf),
}


def _monotone(op: Op, x: Interval) -> Interval:
    function, low, high = _INCREASING[op]
    return Interval(_guarded(function, x.lo, low, high), _guarded(function, x.hi, low, high))


def _reciprocal(x: Interval) -> Interval:
    if x.lo < 0.0 < x.hi or (x.lo == x.hi == 0.0):
        return Interval()
    if x.lo >= 0.0:
        return _finite(Interval(1.0 / x.hi, math.inf if x.lo == 0.0 else 1.0 / x.lo))
    return _finite(Interval(-math.inf if x.hi == 0.0 else 1.0 / x.hi, 1.0 / x.lo))


def _attr(node: Node, index: int) -> float:
    value = node.attrs[index]
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"{node.op.name} holds {value!r}, expected a number")


def _is_unit_vector(node: Node) -> bool:
    """x * rsqrt(sum(x²) + eps), eps >= 0: every channel lies in [-1, 1]."""
    for x, r in (node.args, node.args[::-1]):
        if r.op is not Op.RSQRT:
            continue
        below = r.args[0]
        if below.op is Op.ADD and below.args[1].op is Op.CONST and _attr(below.args[1], 0) >= 0:
            below = below.args[0]
        if below.op is Op.SUM and below.args[0].op is Op.MUL and below.args[0].args == (x, x):
            return True
    return False


def _rule(node: Node, args: list[Interval]) -> Interval:
    op = node.op
    if op is Op.CONST:
        value = _attr(node, 0)
        return Interval(value, value)
    if op in _INCREASING:
        return _monotone(op, args[0])
    if op is Op.ADD:
        return args[0] + args[1]
    if op is Op.SUB:
        return args[0] + -args[1]
    if op is Op.NEG:
        return -args[0]
    if op is Op.MUL:
        if node.args[0] == node.args[1]:
            low, high = sorted((abs(args[0].lo), abs(args[0].hi)))
            spans_zero = args[0].lo <= 0.0 <= args[0].hi
            return Interval(0.0 if spans_zero else low * low, high * high)
        product = args[0] * args[1]
        return product.meet(Interval(-1.0, 1.0)) if _is_unit_vector(node) else product
    if op is Op.DIV:
        return args[0] * _reciprocal(args[1])
    if op in (Op.MAXIMUM, Op.AT_LEAST):
        return Interval(max(args[0].lo, args[1].lo), max(args[0].hi, args[1].hi))
    if op in (Op.MINIMUM, Op.AT_MOST):
        return Interval(min(args[0].lo, args[1].lo), min(args[0].hi, args[1].hi))
    if op is Op.RSQRT:
        hi = _guarded(_rsqrt_up, args[0].lo, -math.inf, 0.0)
        return Interval(-_guarded(_rsqrt_up, args[0].hi, -math.inf, 0.0), -hi)
    if op is Op.ABS:
        low, high = sorted((abs(args[0].lo), abs(args[0].hi)))
        return Interval(0.0 if args[0].lo <= 0.0 <= args[0].hi else low, high)
    if op is Op.WITHIN:
        return args[0].meet(Interval(_attr(node, 0), _attr(node, 1)))
    if op is Op.SUM:  # the number of channels is unknown, so only the sign survives
        lo = 0.0 if args[0].lo >= 0.0 else -math.inf
        return Interval(lo, 0.0 if args[0].hi <= 0.0 else math.inf)
    return Interval()


def interval(node: Node) -> Interval:
    """An interval that holds every channel of `node`, whatever the operands; sound, not tight."""
    found: dict[Node, Interval] = {}
    for n in topological(node):
        found[n] = _finite(_rule(n, [found[a] for a in n.args]))
    return found[node]
