"""The functions of the language, a row for each elementwise one: in torch, digits, intervals.

Another function is one op in `ir`, one row here, one definition in `functions` and one row in
`codegen/elementwise.py`, with an implementation for each target that does not have the function.
"""

from __future__ import annotations

import decimal
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .intervals import Interval, increasing
from .ir import Kind, Node, Op

DIGITS = 50


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The meaning of one function, for each kind of number that it is taken of.

    `torch`: an expression of the tensors {x} and {y}. The oracle computes it, exported references
    print it. `value`: of Decimals, in as many digits as their context has; arithmetic is taken of
    polynomials too. `interval`: of intervals, followed by the attributes of the op.
    """

    torch: str
    value: Callable[..., Any]
    interval: Callable[..., Interval]


@contextmanager
def many_digits() -> Iterator[None]:
    """Decimal arithmetic of DIGITS digits that never raises, in this thread.

    Decimals follow IEEE where a number does not exist: 0/0 is NaN, log 0 is -Infinity.
    """
    with decimal.localcontext(decimal.Context(prec=DIGITS, traps=[])):
        yield


@functools.cache
def at_zeros(op: Op) -> Decimal:
    """The value of a function where all arguments are 0, as they are in the padding of tiles."""
    with many_digits():
        return Decimal(ELEMENTWISE[op].value(*[Decimal(0)] * op.arity))


_SUMMED = {Op.READ: -2, Op.READ_VALUE: -1}  # K and V, the last axes of values


def value_of(
    node: Node, args: Sequence[Any], entrywise: Callable[[Node, Sequence[Any]], Any]
) -> Any:
    """The value of an op on numpy's arrays, whose last axes are K and V, of length 1 where missing.

    So kinds broadcast by themselves; `entrywise` has the values of elementwise ops and of leaves.
    """
    if node.op is Op.SUM:
        return args[0].sum(-2 if node.args[0].kind is Kind.KEY else -1, keepdims=True)
    if node.op in (Op.SCALE, Op.OUTER):
        return args[0] * args[1]
    if node.op in _SUMMED:
        return (args[0] * args[1]).sum(_SUMMED[node.op], keepdims=True)
    return entrywise(node, args)


def _larger(x: Decimal, y: Decimal) -> Decimal:
    return x if x >= y or x.is_nan() else y


def _smaller(x: Decimal, y: Decimal) -> Decimal:
    return x if x <= y or x.is_nan() else y


def _sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def _sigmoid_of_float(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _softplus_of_float(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# half of pi
_QUARTER = Decimal("1.57079632679489661923132169163975144209858469968755291048747229615391")


def _sine(x: Decimal) -> Decimal:
    """The sine, by its series."""
    if not x.is_finite():
        return Decimal("NaN")
    x -= 4 * _QUARTER * (x / (4 * _QUARTER)).to_integral_value()
    result, term, n = x, x, 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        n += 2
        term *= -x * x / (n * (n - 1))
        result += term
    return result


def _of_a_circle(_: Interval) -> Interval:
    return Interval(-1.0, 1.0)


_minus_rsqrt = increasing(lambda x: -1.0 / math.sqrt(x) if x > 0 else -math.inf, high=0.0)

ELEMENTWISE: dict[Op, Elementwise] = {
    Op.ADD: Elementwise("{x} + {y}", operator.add, operator.add),
    Op.SUB: Elementwise("{x} - {y}", operator.sub, operator.sub),
    Op.MUL: Elementwise("{x} * {y}", operator.mul, operator.mul),
    Op.DIV: Elementwise("{x} / {y}", operator.truediv, operator.truediv),
    Op.MAXIMUM: Elementwise("torch.maximum({x}, {y})", _larger, Interval.larger),
    Op.MINIMUM: Elementwise("torch.minimum({x}, {y})", _smaller, Interval.smaller),
    # not torch.clamp_min and clamp_max: their derivative at the bound is 1 in torch 2.13, 0 in 2.15
    Op.AT_LEAST: Elementwise("torch.where({x} < {y}, {y}, {x})", _larger, Interval.larger),
    Op.AT_MOST: Elementwise("torch.where({x} > {y}, {y}, {x})", _smaller, Interval.smaller),
    Op.NEG: Elementwise("-{x}", operator.neg, operator.neg),
    Op.EXP: Elementwise("torch.exp({x})", Decimal.exp, increasing(math.exp, low=0.0)),
    Op.LOG: Elementwise("torch.log({x})", Decimal.ln, increasing(math.log)),
    Op.EXPM1: Elementwise(
        "torch.expm1({x})", lambda x: x.exp() - 1, increasing(math.expm1, low=-1.0)
    ),
    Op.LOG1P: Elementwise("torch.log1p({x})", lambda x: (1 + x).ln(), increasing(math.log1p)),
    Op.SIGMOID: Elementwise(
        "torch.sigmoid({x})", _sigmoid, increasing(_sigmoid_of_float, low=0.0, high=1.0)
    ),
    Op.LOGSIGMOID: Elementwise(
        "torch.nn.functional.logsigmoid({x})",
        lambda x: _sigmoid(x).ln(),
        increasing(lambda x: -_softplus_of_float(-x), high=0.0),
    ),
    Op.SOFTPLUS: Elementwise(
        "torch.logaddexp({x}, torch.zeros_like({x}))",
        lambda x: (1 + x.exp()).ln(),
        increasing(_softplus_of_float, low=0.0),
    ),
    Op.TANH: Elementwise(
        "torch.tanh({x})",
        lambda x: 2 * _sigmoid(2 * x) - 1,
        increasing(math.tanh, low=-1.0, high=1.0),
    ),
    Op.COS: Elementwise("torch.cos({x})", lambda x: _sine(x + _QUARTER), _of_a_circle),
    Op.SIN: Elementwise("torch.sin({x})", lambda x: _sine(x), _of_a_circle),
    Op.SQRT: Elementwise("torch.sqrt({x})", Decimal.sqrt, increasing(math.sqrt, low=0.0)),
    Op.RSQRT: Elementwise("torch.rsqrt({x})", lambda x: 1 / x.sqrt(), lambda x: -_minus_rsqrt(x)),
    Op.ABS: Elementwise("torch.abs({x})", abs, abs),
    Op.WITHIN: Elementwise(
        "{x}", lambda x: x, lambda x, least, most: x.meet(Interval(least, most))
    ),
}
