"""What is constant along some axes: sums over channels, operands per head, numbers.

Every rule has something that lacks an axis of what it is combined with, in one more place where a
printer or a gradient could take another axis for it, or forget how often it counts.
"""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
from chunkwise import (
    HeadKey,
    HeadScalar,
    HeadValue,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    exp,
    l2norm,
    log,
    maximum,
    minimum,
    outer,
    rsqrt,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    within,
)


@cw.recurrence
def value_summed(S: State, q: Key, k: Key, v: Value, y: Value):
    """An operand that enters only through its sum: its gradient is constant along channels."""
    S = 0.9 * S + outer(k, v * sigmoid(cw.sum(y)))
    return S, q @ S


@cw.recurrence
def key_summed(S: State, q: Key, k: Key, v: Value, y: Key):
    S = 0.9 * S + outer(k, v * sigmoid(cw.sum(y)))
    return S, q @ S


@cw.recurrence
def sum_in_the_output(S: State, q: Key, k: Key, v: Value):
    S = 0.9 * S
    S = S + outer(k, v - 0.3 * (k @ S))
    return S, (q @ S) * sigmoid(cw.sum(v)) + cw.sum(k)


@cw.recurrence
def scalar_in_a_sum(S: State, q: Key, k: Key, v: Value, h: HeadScalar, c: Scalar):
    """Counts K times in the sum, and V times in the other."""
    S = 0.9 * S + sigmoid(cw.sum(k + h)) * outer(k, v * sigmoid(cw.sum(v - c)))
    return S, q @ S


@cw.recurrence
def scalars_alone_in_a_sum(S: State, q: Key, k: Key, v: Value, h: HeadScalar, c: Scalar):
    """Nothing varies along the axis that is summed, but by name."""
    S = 0.9 * S + outer(k, v)
    return S, (q @ S) * sigmoid(cw.sum(0.0 * k + h * c)) + cw.sum(0.0 * v + c)


@cw.recurrence
def mean_and_deviation(S: State, q: Key, k: Key, v: Value):
    """Sums of numbers, and sums that are subtracted along the axis they are over."""
    count = cw.sum(0.0 * v + 1.0)
    mean = cw.sum(v) / count
    S = 0.9 * S + outer(k, (v - mean) * rsqrt(dot(v - mean, v - mean) / count + 1.0))
    return S, q @ S


@cw.recurrence
def factor_in_a_sum(S: State, q: Key, k: Key, v: Value, h: HeadScalar, c: Scalar, y: HeadKey):
    S = 0.9 * S + sigmoid(cw.sum(h * k) + cw.sum(c * y) + dot(k, y)) * outer(k, v)
    return S, q @ S


@cw.recurrence
def scale_of_a_recall(S: State, q: Key, k: Key, v: Value, h: HeadScalar, c: Scalar):
    S = S + 0.3 * sigmoid(cw.sum(k + h) + c) * outer(k, v - k @ S)
    return S, q @ S


@cw.recurrence
def decay_by_a_sum(S: State, q: Key, k: Key, v: Value, y: Key, h: HeadScalar):
    S = exp(-cw.sum(y * y + h * h)) * S + outer(k, v)
    return S, q @ S


@cw.recurrence
def decay_by_a_sum_per_head(S: State, q: Key, k: Key, v: Value, y: HeadKey, h: HeadScalar):
    S = exp(-0.3 * cw.sum(y * y) * sigmoid(h)) * S + outer(k, v)
    return S, q @ S


@cw.recurrence
def decay_by_channel(S: State, q: Key, k: Key, v: Value, y: HeadKey, h: HeadScalar, c: Scalar):
    """A gate per key channel to which scalars are added."""
    S = exp(-softplus(y + h) - softplus(k + c)) * S + outer(k, v)
    return S, q @ S


@cw.recurrence
def constant_gate_by_channel(S: State, q: Key, k: Key, v: Value, y: HeadKey):
    S = exp(-softplus(y)) * S + outer(l2norm(k * y), v)
    return S, q @ S


@cw.recurrence
def keys_per_head(S: State, q: Key, v: Value, y: HeadKey, x: HeadKey, c: Scalar):
    """Keys that do not vary in time: what is written, and what is read."""
    S = 0.9 * S + outer(l2norm(y), c * v)
    return S, l2norm(x) @ S + q @ S


@cw.recurrence
def values_per_head(S: State, q: Key, k: Key, w: HeadValue, h: HeadScalar):
    """Values that do not vary in time, nor does what multiplies the output."""
    S = 0.9 * S + outer(k, w)
    return S, (q @ S) * w + sigmoid(h)


@cw.recurrence
def recall_per_head(S: State, q: Key, v: Value, y: HeadKey, h: HeadScalar):
    y = l2norm(y)
    S = 0.9 * S
    S = S + sigmoid(h) * outer(y, v - y @ S)
    return S, q @ S


@cw.recurrence
def normaliser_per_head(z: KeyState, q: Key, v: Value, y: HeadKey, h: HeadScalar):
    z = sigmoid(h) * z + y
    return z, v * (q @ z)


@cw.recurrence
def normaliser_of_ones(z: KeyState, q: Key, k: Key, v: Value, c: Scalar):
    z = 0.9 * z + outer(k, c + 1.0)
    return z, v * (q @ z) + cw.sum(k)


@cw.recurrence
def output_of_sums(S: State, q: Key, k: Key, v: Value, y: Value, h: HeadScalar):
    """An output that is constant along its channels where nothing was written."""
    S = 0.9 * S + outer(k, v)
    return S, 0.0 * (q @ S) + cw.sum(y) * h


@cw.recurrence
def numbers(
    S: State, q: Key, k: Key, v: Value, h: HeadScalar, *, scale: float = 0.7, much: float = 3.0
):
    """Functions of numbers alone, and of parameters alone."""
    S = exp(-scale) * S + outer(k / 3, v * tanh(0.3) + log(much) * exp(-2.0))
    S = sigmoid(maximum(scale, 0.5) * minimum(h, much)) * S
    scaled = sqrt(scale) * q * maximum(scale, much) * within(rsqrt(much), 0.0, 1.0)
    return S, scaled @ S + minimum(0.25, scale / much) + maximum(exp(0.1), -1.0) * v


@cw.recurrence
def number_in_a_key(z: KeyState, q: Key, k: Key, v: Value, *, scale: float = 0.7):
    """A third is not a number of float32."""
    z = exp(-scale) * z + k / 3
    return z, v * (q @ z)


@cw.recurrence
def number_in_a_recall(S: State, q: Key, k: Key, v: Value, *, scale: float = 0.7):
    S = S + sqrt(scale) / 3 * outer(k, v / 3 - tanh(scale) * (k @ S))
    return S, q @ S


RULES = [x for x in globals().values() if isinstance(x, cw.Recurrence)]
SHAPES: dict[str, dict[str, Any]] = {
    # sizes that coincide: an axis taken for another one raises nothing
    "alike": {"B": 1, "T": 16, "H": 1, "HV": 1, "K": 16, "V": 16},
    "apart": {"B": 1, "T": 19, "H": 2, "HV": 4, "K": 5, "V": 3, "initial": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", RULES, ids=lambda op: op.__name__)
def test_what_is_constant_along_axes(kit: Any, engine: str, op: cw.Recurrence, shape: str) -> None:
    inputs = kit.make_inputs(op, kit.Sizes(**SHAPES[shape]))
    inputs.params |= {p.name: float(p.default) + 0.1 for p in op.declaration.params}
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )
