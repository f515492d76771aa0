"""The functions of the language, on traced values (and on Python numbers, as constants)."""

from __future__ import annotations

import math
import numbers

from . import errors
from .ir import Kind, Op
from .source import here
from .traced import Traced, binary, build, lift, name_if_leaf, name_of, unary

__all__ = [
    "abs",
    "clamp",
    "dot",
    "exp",
    "expm1",
    "l2norm",
    "log",
    "log1p",
    "log2",
    "logsigmoid",
    "maximum",
    "minimum",
    "outer",
    "relu",
    "rsqrt",
    "sigmoid",
    "silu",
    "softplus",
    "sqrt",
    "sum",
    "tanh",
    "within",
]
errors.FUNCTION_NAMES.update(__all__)


def exp(x: Traced | float) -> Traced:
    """e**x, elementwise."""
    return unary(Op.EXP, x)


def log(x: Traced | float) -> Traced:
    """Natural logarithm, elementwise."""
    return unary(Op.LOG, x)


def log2(x: Traced | float) -> Traced:
    """Logarithm to base 2, elementwise."""
    return unary(Op.LOG, x) * (1.0 / math.log(2.0))


def expm1(x: Traced | float) -> Traced:
    """e**x - 1, exact for small x."""
    return unary(Op.EXPM1, x)


def log1p(x: Traced | float) -> Traced:
    """log(1 + x), exact for small x."""
    return unary(Op.LOG1P, x)


def sigmoid(x: Traced | float) -> Traced:
    """1 / (1 + e**-x), in (0, 1)."""
    return unary(Op.SIGMOID, x)


def logsigmoid(x: Traced | float) -> Traced:
    """log sigmoid(x), a log-decay by construction: it is at most 0."""
    return unary(Op.LOGSIGMOID, x)


def softplus(x: Traced | float) -> Traced:
    """log(1 + e**x), at least 0."""
    return unary(Op.SOFTPLUS, x)


def silu(x: Traced | float) -> Traced:
    """x * sigmoid(x)."""
    y = lift(x)
    return y * unary(Op.SIGMOID, y)


def tanh(x: Traced | float) -> Traced:
    """Hyperbolic tangent."""
    return unary(Op.TANH, x)


def relu(x: Traced | float) -> Traced:
    """The larger of x and 0; its derivative at 0 is 0."""
    return binary(Op.AT_LEAST, 0.0, x, "relu")


def sqrt(x: Traced | float) -> Traced:
    """Square root."""
    return unary(Op.SQRT, x)


def rsqrt(x: Traced | float) -> Traced:
    """1 / sqrt(x)."""
    return unary(Op.RSQRT, x)


def abs(x: Traced | float) -> Traced:
    """|x|; its derivative at 0 is 0."""
    return unary(Op.ABS, x)


def maximum(x: Traced | float, y: Traced | float) -> Traced:
    """The larger of x and y, elementwise; where they are equal, each has half of the gradient."""
    return binary(Op.MAXIMUM, x, y, "maximum")


def minimum(x: Traced | float, y: Traced | float) -> Traced:
    """The smaller of x and y, elementwise; where they are equal, each has half of the gradient."""
    return binary(Op.MINIMUM, x, y, "minimum")


def clamp(x: Traced | float, lo: float | None = None, hi: float | None = None) -> Traced:
    """x moved into [lo, hi]; the bound is applied, and known to the compiler.

    The derivative is 1 at the bounds too, as torch.clamp's in torch 2.13 (in 2.15 it is 0 there).

    Raises BadBounds unless lo and hi are Python numbers (or None) with lo <= hi.
    """
    result = lift(x)
    low, high = _bounds("clamp", lo, hi)
    if low > -math.inf:
        result = binary(Op.AT_LEAST, result, low, "clamp")
    if high < math.inf:
        result = binary(Op.AT_MOST, result, high, "clamp")
    return result


def within(x: Traced | float, lo: float | None = None, hi: float | None = None) -> Traced:
    """x, promised to lie in [lo, hi]: checked under CHUNKWISE_CHECK, trusted otherwise.

    Raises BadBounds unless lo and hi are Python numbers (or None) with lo <= hi.
    """
    return build(Op.WITHIN, lift(x), attrs=_bounds("within", lo, hi))


def _bounds(what: str, lo: object, hi: object) -> tuple[float, float]:
    low = -math.inf if lo is None else lo
    high = math.inf if hi is None else hi
    if isinstance(low, numbers.Real) and isinstance(high, numbers.Real) and low <= high:
        return float(low), float(high)
    raise errors.BadBounds(what, _plain(lo), _plain(hi), here())


def _plain(x: object) -> object:
    return "a traced value" if isinstance(x, Traced) else x


def sum(x: Traced) -> Traced:
    """Sum over the channels of a Key or a Value: a Scalar.

    Raises StateAsVector for a state, KindMismatch for a Scalar, which has no channels.
    """
    y = lift(x)
    if y.kind.is_state:
        raise errors.StateAsVector("sum", name_of(y), here())
    if y.kind is Kind.SCALAR:
        raise errors.KindMismatch("sum", "a Scalar", "a Key or a Value", "", here())
    return build(Op.SUM, y, kind=Kind.SCALAR)


def dot(x: Traced, y: Traced) -> Traced:
    """Inner product of two Keys or two Values: a Scalar. With a KeyState, the same as `q @ z`."""
    a, b = lift(x), lift(y)
    if a.kind is Kind.KEY_STATE and b.kind is Kind.KEY:
        a, b = b, a
    if a.kind is Kind.KEY and b.kind is Kind.KEY_STATE:
        return a @ b
    for z in (a, b):
        if z.kind.is_state:
            raise errors.StateAsVector("dot", name_of(z), here())
    if a.kind is not b.kind or a.kind is Kind.SCALAR:
        raise errors.KindMismatch(
            "dot",
            f"a {name_of(a)} and a {name_of(b)}",
            "two Keys or two Values",
            "the matrix k vᵀ is `outer(k, v)`",
            here(),
        )
    return build(Op.SUM, build(Op.MUL, a, b), kind=Kind.SCALAR)


def l2norm(x: Traced, eps: float = 1e-6) -> Traced:
    """x * rsqrt(sum(x²) + eps): a Key or Value scaled to length 1."""
    return x * rsqrt(dot(x, x) + eps)


def outer(k: Traced, v: Traced | float) -> Traced:
    """The rank-one state k vᵀ of a Key and a Value; of a Key and a Scalar, a KeyState.

    Raises OuterOrder when the Key does not come first.
    """
    a, b = lift(k), lift(v)
    for z in (a, b):
        if z.kind.is_state:
            raise errors.StateAsVector("outer", name_of(z), here())
    if a.kind is not Kind.KEY or b.kind is Kind.KEY:
        raise errors.OuterOrder(name_of(a), name_of(b), here(), name_if_leaf(b))
    return build(Op.OUTER, a, b, kind=Kind.STATE if b.kind is Kind.VALUE else Kind.KEY_STATE)
