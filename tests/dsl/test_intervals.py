"""Interval analysis is sound on samples and knows the bounds that gates rely on."""

from __future__ import annotations

import math

import pytest
import torch
from chunkwise.dsl import (
    abs,
    clamp,
    dot,
    exp,
    expm1,
    l2norm,
    log,
    log1p,
    logsigmoid,
    maximum,
    minimum,
    oracle,
    relu,
    rsqrt,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    within,
)
from chunkwise.dsl.bounds import interval
from chunkwise.dsl.intervals import Interval
from chunkwise.dsl.ir import Kind, Node, Op
from chunkwise.dsl.traced import Traced
from hypothesis import given
from hypothesis import strategies as st

INF = math.inf
x = Traced(Node(Op.OPERAND, (), ("x", None), Kind.SCALAR))
k = Traced(Node(Op.OPERAND, (), ("k", None), Kind.KEY))


@pytest.mark.parametrize(
    ("expression", "lo", "hi"),
    [
        (x, -INF, INF),
        (-5 * sigmoid(x), -5, 0),  # the bounded gate: its chunk may be factorised
        (-exp(x) * softplus(x), -INF, 0),  # Mamba's gate: the sign is known, the size is not
        (exp(x) * softplus(x), 0, INF),  # the same with its sign forgotten
        (logsigmoid(x), -INF, 0),
        (1 - sigmoid(x), 0, 1),
        (clamp(x, -5, 0), -5, 0),
        (within(x, 0, 1), 0, 1),
        (within(sigmoid(x), -3, 0.5), 0, 0.5),
        (tanh(x), -1, 1),
        (x * x, 0, INF),
        (tanh(x) ** 2, 0, 1),
        (dot(k, k), 0, INF),
        (rsqrt(dot(k, k) + 4), 0, 0.5),
        (l2norm(k), -1, 1),
        (sqrt(abs(tanh(x))), 0, 1),
        (log(sigmoid(x)), -INF, 0),
        (1 / (1 + exp(x)), 0, 1),
        (maximum(tanh(x), 0.5), 0.5, 1),
        (minimum(x, 2), -INF, 2),
        (relu(x), 0, INF),
        (expm1(-abs(x)), -1, 0),
        (log1p(softplus(x)), 0, INF),
        (x / 0, -INF, INF),
    ],
    ids=str,
)
def test_known_bounds(expression: Traced, lo: float, hi: float) -> None:
    assert interval(expression.node) == Interval(lo, hi)


UNARY = [exp, log, expm1, log1p, sigmoid, logsigmoid, softplus, tanh, sqrt, rsqrt, abs]
leaf = st.one_of(st.just(x), st.floats(-4, 4).map(lambda c: x * 0 + c))
expressions = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(lambda f, a: f(a), st.sampled_from(UNARY), inner),
        st.builds(
            lambda f, a, b: f(a, b),
            st.sampled_from(
                [
                    lambda a, b: a + b,
                    lambda a, b: a - b,
                    lambda a, b: a * b,
                    lambda a, b: a / b,
                    maximum,
                    minimum,
                ]
            ),
            inner,
            inner,
        ),
    ),
    max_leaves=6,
)


@given(expressions)
def test_sound(expression: Traced) -> None:
    """Every finite value lies in the interval (up to rounding)."""
    samples = torch.tensor([-20.0, -3.0, -1.0, -0.1, 0.0, 0.3, 1.0, 2.5, 18.0], dtype=torch.float64)
    (values,) = oracle.evaluate([expression.node], {x.node: samples})
    values = values[torch.isfinite(values)]
    found = interval(expression.node)
    slack = 1e-9 * (1 + values.abs())
    assert bool((values >= found.lo - slack).all())
    assert bool((values <= found.hi + slack).all())
