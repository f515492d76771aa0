"""Gradients where a function has a corner: torch's conventions, the same on every engine."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, Scalar, State, Value, clamp, exp, maximum, minimum, outer, relu
from torch import Tensor

# every value meets every other one; exact in any dtype
VALUES = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0)


@cw.recurrence
def rectified(S: State, q: Key, k: Key, v: Value, g: Scalar):
    S = exp(-relu(g)) * S + outer(relu(k), relu(v))
    return S, q @ S


@cw.recurrence
def chosen(S: State, q: Key, k: Key, p: Key, v: Value, y: Value, b: Scalar):
    """The larger and the smaller of two operands, of an operand and a number, of two numbers."""
    S = 0.5 * S + outer(maximum(k, p) + minimum(k, 0.25), minimum(v, y) + maximum(-0.5, v))
    return S, maximum(q, b) @ S


@cw.recurrence
def clamped(S: State, q: Key, k: Key, v: Value, b: Scalar):
    S = 0.5 * S + clamp(b, 0.0, 0.5) * outer(clamp(k, lo=-0.5), clamp(v, hi=0.25))
    return S, q @ S


@cw.recurrence
def absolute(S: State, q: Key, k: Key, v: Value, b: Scalar):
    S = 0.5 * S + abs(b) * outer(abs(k), abs(v))
    return S, q @ S


@cw.recurrence
def rectified_recall(S: State, q: Key, k: Key, v: Value, b: Scalar):
    S = S + 0.25 * relu(b) * outer(k, relu(v) - relu(k) @ S)
    return S, (q @ S) * relu(v)


RULES = [x for x in globals().values() if isinstance(x, cw.Recurrence)]


@pytest.mark.parametrize("op", RULES, ids=lambda op: op.__name__)
def test_ties(kit: Any, engine: str, op: cw.Recurrence) -> None:
    inputs = kit.make_inputs(op, kit.Sizes(T=19, HV=4, K=5, V=3, initial=True))
    random = torch.Generator().manual_seed(3)
    for x in inputs.operands.values():
        x.data = _values(x, random)
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )


def _values(x: Tensor, random: torch.Generator) -> Tensor:
    chosen = torch.randint(len(VALUES), x.shape, generator=random)
    return torch.tensor(VALUES, dtype=x.dtype)[chosen].to(x.device)


def _clamped(x: Tensor) -> Tensor:
    """torch.clamp with the derivative that it has at its bounds in torch 2.13."""
    return torch.where((x < -0.5) | (x > 0.5), torch.clamp(x, -0.5, 0.5).detach(), x)


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (relu, torch.relu),
        (lambda x: maximum(x, 0.5), lambda x: torch.maximum(x, torch.full_like(x, 0.5))),
        (lambda x: minimum(0.5, x), lambda x: torch.minimum(x, torch.full_like(x, 0.5))),
        (lambda x: clamp(x, -0.5, 0.5), _clamped),
        (abs, torch.abs),
    ],
    ids=["relu", "maximum", "minimum", "clamp", "abs"],
)
def test_as_torch_has_it(kit: Any, engine: str, function: Any, same: Any) -> None:
    """One token, whose output is the function of its value."""

    @cw.recurrence
    def once(S: State, q: Key, k: Key, v: Value):
        S = 0.5 * S + outer(k, function(v))
        return S, q @ S

    one = torch.ones(1, 1, 1, 1, dtype=kit.engine.dtype, device=kit.engine.device)
    v = torch.tensor(VALUES, dtype=one.dtype, device=one.device)[None, None, None]
    v.requires_grad_()
    o, _ = once(one, one, v, engine=engine)
    want = same(v)
    weights = torch.arange(1.0, len(VALUES) + 1, dtype=one.dtype, device=one.device)
    got = {"o": o.detach(), "dv": torch.autograd.grad((o * weights).sum(), v)[0]}
    expected = {"o": want.detach(), "dv": torch.autograd.grad((want * weights).sum(), v)[0]}
    kit.assert_agree(got, expected, kit.tolerance)
