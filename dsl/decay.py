"""Pass: a multiplier of the state to its log-decay, by rule (mathematics, numerics 7)."""

from __future__ import annotations

import functools
import math

from . import algebra, errors
from .bounds import interval
from .intervals import Interval
from .ir import Loc, Node, Op, constant
from .printing import infix

SMALLEST = 2.0**-126  # the least normal float32: log of 0 would give -inf - (-inf) inside a chunk


def log_decay(multiplier: Node, loc: Loc | None = None) -> tuple[Node | None, Interval]:
    """The natural log of a state's multiplier, and its bounds; None for a multiplier of 1.

    `exp(g)` with g unknown is accepted: gates are log-decays ≤ 0 by convention.
    Raises StateGrows, UnboundedDecay, DecayNotPositive.
    """
    if algebra.number(multiplier) == 1.0:
        return None, Interval(0.0, 0.0)
    loc = multiplier.loc or loc
    log = _log(multiplier, loc)
    return log, _checked(multiplier, log, loc)


def _checked(multiplier: Node, log: Node, loc: Loc | None) -> Interval:
    """The bounds of a log-decay. Raises StateGrows."""
    bound = interval(log)
    if bound.hi > 0.0 and (bound.lo >= 0.0 or bound.hi < math.inf):
        own = interval(multiplier)
        if own.lo >= 0.0:
            hi = math.exp(bound.hi) if bound.hi < 700 else math.inf
            own = Interval(math.exp(min(bound.lo, 700.0)), hi)
        raise errors.StateGrows(infix(multiplier), own.lo, own.hi, loc)
    return bound


def is_forgotten(log_decay: Node | None) -> bool:
    """Whether nothing is left of a state under a log-decay: a factor of its own may follow."""
    return log_decay is not None and algebra.number(log_decay) == -math.inf


def is_signed(multiplier: Node) -> bool:
    """Whether a multiplier may be negative, for all that is known: then it has no logarithm."""
    try:
        log_decay(multiplier)
    except (errors.DecayNotPositive, errors.UnboundedDecay):
        return True
    except errors.StateGrows:
        return False
    return False


def signed_part(multiplier: Node) -> Node:
    """The factors of a multiplier that may be negative, with its sign: others are at least 0.

    Where another factor is 0, the sign of this part is still that of its own.
    """
    outside, powers = algebra.factors(multiplier)
    return algebra.product(outside, {x: n for x, n in powers.items() if is_signed(x)})


def log_magnitude(multiplier: Node, sign: Node, loc: Loc | None = None) -> Node | None:
    """The log of |f|, for a multiplier f in [-1, 1]; None where |f| is 1.

    `sign`: an expression of the sign of `signed_part(f)`, by which this is multiplied.
    Raises StateGrows, UnboundedDecay, DecayNotPositive.
    """
    loc = multiplier.loc or loc
    log = _log_magnitude(multiplier, sign, loc)
    _checked(multiplier, log, loc)
    return None if algebra.number(log) == 0.0 else log


def _log_magnitude(f: Node, sign: Node, loc: Loc | None) -> Node:
    if not is_signed(f) or algebra.number(f) == 0.0:
        return _log(f, loc)
    powers = algebra.factors(f)[1].items()
    logs = [algebra.mul(constant(n), _log(x, loc)) for x, n in powers if not is_signed(x)]
    rest = signed_part(f)
    if algebra.number(rest) is None:
        bound = interval(rest)
        if math.inf in (-bound.lo, bound.hi):
            raise errors.UnboundedDecay(infix(f), f.loc or loc)
        if not bound.inside(-1.0, 1.0):
            raise errors.StateGrows(infix(f), bound.lo, bound.hi, f.loc or loc)
        logs.append(algebra.unary(Op.LOG, _at_least(algebra.mul(sign, rest), SMALLEST)))
    return functools.reduce(algebra.add, logs, constant(0.0))


@functools.lru_cache(maxsize=4096)  # a factor that is used twice is asked about once
def _log(f: Node, loc: Loc | None) -> Node:
    """The log of a positive expression, each rule exact except the last."""
    value = algebra.number(f)
    if value is not None:
        if value <= 0.0:
            raise errors.DecayNotPositive(f"the constant {value:g}", value, value, f.loc or loc)
        return constant(math.log(value))
    if f.op is Op.EXP:
        return f.args[0]
    if f.op is Op.SIGMOID:
        return algebra.unary(Op.LOGSIGMOID, f.args[0])
    complement = _one_minus(f)
    if complement is not None and complement.op is Op.SIGMOID:
        return algebra.unary(Op.LOGSIGMOID, algebra.neg(complement.args[0]))
    if f.op is Op.MUL:
        return algebra.add(_log(f.args[0], loc), _log(f.args[1], loc))
    if f.op is Op.SQRT:
        return algebra.mul(constant(0.5), _log(f.args[0], loc))
    if f.op is Op.DIV:
        divisor = _exponent(f.args[1])
        if divisor is not None:
            return algebra.add(_log(f.args[0], loc), algebra.neg(divisor))
    bound = interval(f)
    if bound.inside(0.0, 1.0):
        return algebra.unary(Op.LOG, _at_least(f, SMALLEST))
    if bound.lo < 1.0 and math.inf in (-bound.lo, bound.hi):
        raise errors.UnboundedDecay(infix(f), f.loc or loc)
    if bound.lo < 0.0:
        raise errors.DecayNotPositive(infix(f), bound.lo, bound.hi, f.loc or loc)
    raise errors.StateGrows(infix(f), bound.lo, bound.hi, f.loc or loc)


def _exponent(f: Node) -> Node | None:
    """The log of a product, quotient or root of powers of e and positive numbers; of no other."""
    value = algebra.number(f)
    if value is not None:
        return constant(math.log(value)) if value > 0.0 else None
    if f.op is Op.EXP:
        return f.args[0]
    logs = [_exponent(a) for a in f.args] if f.op in (Op.MUL, Op.DIV, Op.SQRT) else [None]
    if None in logs:
        return None
    first, *second = (n for n in logs if n is not None)
    if f.op is Op.SQRT:
        return algebra.mul(constant(0.5), first)
    return algebra.add(first, second[0] if f.op is Op.MUL else algebra.neg(second[0]))


def _at_least(f: Node, floor: float) -> Node:
    return Node(Op.MAXIMUM, (f, constant(floor)), (), f.kind)


def _one_minus(f: Node) -> Node | None:
    """x, if f is 1 - x."""
    if f.op is Op.SUB and algebra.number(f.args[0]) == 1.0:
        return f.args[1]
    return None
