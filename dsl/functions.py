"""The functions of the language, on traced values (and on Python numbers, as constants)."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import TypeVar

from . import errors
from .ir import Kind, Op
from .source import here
from .traced import Traced, binary, build, lift, name_if_leaf, name_of, unary

__all__ = [
    "abs",
    "clamp",
    "cos",
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
    "rotate",
    "rsqrt",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "sqrt",
    "sum",
    "tanh",
    "within",
]
errors.FUNCTION_NAMES.update(__all__)

_Function = TypeVar("_Function", bound=Callable[..., Traced])
_SAID = """

Args:
    x: a Key, Value or Scalar, or a Python number.

Returns:
    A value of the kind of x.

Raises:
    CapturedTensor: x is a tensor from outside the step."""
_SAID_OF_TWO = """

Args:
    x: a Key, Value or Scalar, or a Python number.
    y: the same, of the kind of x, or one of the two a Scalar.

Returns:
    A value of the kind of x and y; a Scalar is compared with every channel.

Raises:
    StateAsVector: x or y is a state.
    KindMismatch: one is a Key and the other a Value."""


def _of_every_channel(function: _Function) -> _Function:
    """Says in the docstring what functions of one value, or of two, have in common."""
    said = _SAID if function.__code__.co_argcount == 1 else _SAID_OF_TWO
    function.__doc__ = inspect.cleandoc(function.__doc__ or "") + said
    return function


@_of_every_channel
def exp(x: Traced | float) -> Traced:
    """e**x of every channel."""
    return unary(Op.EXP, x)


@_of_every_channel
def log(x: Traced | float) -> Traced:
    """The natural logarithm of every channel; NaN below 0, −∞ at 0."""
    return unary(Op.LOG, x)


@_of_every_channel
def log2(x: Traced | float) -> Traced:
    """The logarithm to base 2 of every channel."""
    return unary(Op.LOG, x) * (1.0 / math.log(2.0))


@_of_every_channel
def expm1(x: Traced | float) -> Traced:
    """e**x − 1 of every channel, to full precision for small x."""
    return unary(Op.EXPM1, x)


@_of_every_channel
def log1p(x: Traced | float) -> Traced:
    """log(1 + x) of every channel, to full precision for small x."""
    return unary(Op.LOG1P, x)


@_of_every_channel
def sigmoid(x: Traced | float) -> Traced:
    """1 / (1 + e**−x) of every channel, in (0, 1).

    As a multiplier of a state it is a decay: `sigmoid(x) * S` has the log-decay `logsigmoid(x)`.
    """
    return unary(Op.SIGMOID, x)


@_of_every_channel
def logsigmoid(x: Traced | float) -> Traced:
    """log sigmoid(x) of every channel: a log-decay by construction, for it is at most 0."""
    return unary(Op.LOGSIGMOID, x)


@_of_every_channel
def softplus(x: Traced | float) -> Traced:
    """log(1 + e**x) of every channel: at least 0."""
    return unary(Op.SOFTPLUS, x)


def silu(x: Traced | float) -> Traced:
    """x · sigmoid(x) of every channel (Elfwing, Uchibe, Doya 2017).

    Args:
        x: a Key, Value or Scalar, or a Python number.

    Returns:
        A value of the kind of x.

    Raises:
        KindMismatch: x is a state.
    """
    y = lift(x)
    return y * unary(Op.SIGMOID, y)


@_of_every_channel
def tanh(x: Traced | float) -> Traced:
    """The hyperbolic tangent of every channel, in (−1, 1)."""
    return unary(Op.TANH, x)


@_of_every_channel
def cos(x: Traced | float) -> Traced:
    """The cosine of every channel, x in radians."""
    return unary(Op.COS, x)


@_of_every_channel
def sin(x: Traced | float) -> Traced:
    """The sine of every channel, x in radians."""
    return unary(Op.SIN, x)


def rotate(x: Traced, y: Traced, angle: Traced | float) -> tuple[Traced, Traced]:
    """x and y turned by an angle: the parts of (x + i y) e^(i angle).

    Two states that are turned pass as the parts of a complex one: by one angle for all channels (a
    Scalar), or by an angle for every row (a Key) or column (a Value). Both decay alike, if they do.

    Args:
        x: a state, Key, Value or Scalar: the real part.
        y: the same, of the kind of x: the imaginary part.
        angle: a Scalar, or a vector by which x and y can be multiplied, or a number; in radians.

    Returns:
        `cos(angle) * x - sin(angle) * y` and `sin(angle) * x + cos(angle) * y`.

    Raises:
        KindMismatch: the kinds of x, y and the angle do not go together.
    """
    c, s = cos(angle), sin(angle)
    return c * x - s * y, s * x + c * y


def relu(x: Traced | float) -> Traced:
    """The larger of x and 0, of every channel; its derivative at 0 is 0.

    Args:
        x: a Key, Value or Scalar, or a Python number.

    Returns:
        A value of the kind of x.

    Raises:
        StateAsVector: x is a state.
    """
    return binary(Op.AT_LEAST, 0.0, x, "relu")


@_of_every_channel
def sqrt(x: Traced | float) -> Traced:
    """The square root of every channel; also written `x ** 0.5`."""
    return unary(Op.SQRT, x)


@_of_every_channel
def rsqrt(x: Traced | float) -> Traced:
    """1 / sqrt(x) of every channel; also written `x ** -0.5`."""
    return unary(Op.RSQRT, x)


@_of_every_channel
def abs(x: Traced | float) -> Traced:
    """|x| of every channel; its derivative at 0 is 0.

    Python's own `abs` does the same on a value of a step.
    """
    return unary(Op.ABS, x)


@_of_every_channel
def maximum(x: Traced | float, y: Traced | float) -> Traced:
    """The larger of x and y, of every channel; equal ones have half of the gradient each."""
    return binary(Op.MAXIMUM, x, y, "maximum")


@_of_every_channel
def minimum(x: Traced | float, y: Traced | float) -> Traced:
    """The smaller of x and y, of every channel; equal ones have half of the gradient each."""
    return binary(Op.MINIMUM, x, y, "minimum")


def clamp(x: Traced | float, lo: float | None = None, hi: float | None = None) -> Traced:
    """x moved into [lo, hi], of every channel; the compiler knows the bounds.

    The derivative is 1 at the bounds too, as torch.clamp's in torch 2.13 (in 2.15 it is 0 there).

    Args:
        x: a Key, Value or Scalar, or a Python number.
        lo: the lower bound, a Python number; None for none.
        hi: the upper bound, a Python number; None for none.

    Returns:
        A value of the kind of x.

    Raises:
        StateAsVector: x is a state.
        BadBounds: lo and hi are no Python numbers with lo <= hi.
    """
    result = lift(x)
    low, high = _bounds("clamp", lo, hi)
    if low > -math.inf:
        result = binary(Op.AT_LEAST, result, low, "clamp")
    if high < math.inf:
        result = binary(Op.AT_MOST, result, high, "clamp")
    return result


def within(x: Traced | float, lo: float | None = None, hi: float | None = None) -> Traced:
    """x itself, promised to lie in [lo, hi]: the compiler knows the bounds.

    CHUNKWISE_CHECK (or `check=True`) looks whether the promise holds; otherwise it is trusted.

    Args:
        x: a Key, Value or Scalar, or a Python number.
        lo: the lower bound, a Python number; None for none.
        hi: the upper bound, a Python number; None for none.

    Returns:
        A value of the kind of x.

    Raises:
        BadBounds: lo and hi are no Python numbers with lo <= hi.
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
    """The sum over the channels of a Key or a Value.

    Python's own `sum` is refused on a value of a step.

    Args:
        x: a Key or a Value.

    Returns:
        A Scalar.

    Raises:
        StateAsVector: x is a state.
        KindMismatch: x is a Scalar, which has no channels.
    """
    y = lift(x)
    if y.kind.is_state:
        raise errors.StateAsVector("sum", name_of(y), here())
    if y.kind is Kind.SCALAR:
        raise errors.KindMismatch("sum", "a Scalar", "a Key or a Value", "", here())
    return build(Op.SUM, y, kind=Kind.SCALAR)


def dot(x: Traced, y: Traced) -> Traced:
    """The inner product of two Keys or of two Values; of a Key and a KeyState, the same as `q @ z`.

    Args:
        x: a Key or a Value; or a Key or a KeyState.
        y: the same; or the other of the two.

    Returns:
        A Scalar.

    Raises:
        StateAsVector: one of them is a State.
        KindMismatch: one is a Key and the other a Value, or one is a Scalar.
    """
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
    """x · rsqrt(sum(x²) + eps): a Key or Value scaled to length 1.

    Args:
        x: a Key or a Value.
        eps: what keeps a zero vector from a division by 0.

    Returns:
        A value of the kind of x.

    Raises:
        StateAsVector: x is a state.
        KindMismatch: x is a Scalar.
    """
    return x * rsqrt(dot(x, x) + eps)


def outer(k: Traced, v: Traced | float) -> Traced:
    """The rank-one state k vᵀ: what a step writes.

    Args:
        k: a Key.
        v: a Value; or a Scalar or a Python number, for a KeyState.

    Returns:
        A State of a Key and a Value; a KeyState of a Key and a Scalar.

    Raises:
        OuterOrder: the Key does not come first.
        StateAsVector: one of them is a state.
    """
    a, b = lift(k), lift(v)
    for z in (a, b):
        if z.kind.is_state:
            raise errors.StateAsVector("outer", name_of(z), here())
    if a.kind is not Kind.KEY or b.kind is Kind.KEY:
        raise errors.OuterOrder(name_of(a), name_of(b), here(), name_if_leaf(b))
    return build(Op.OUTER, a, b, kind=Kind.STATE if b.kind is Kind.VALUE else Kind.KEY_STATE)
