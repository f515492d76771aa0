"""Calls with resets: the operands that make a recurrence forget its state at once, and where."""

from __future__ import annotations

import math

import chunkwise as cw
import torch
from chunkwise.dsl import Key, Scalar, State, Value, exp, outer, sigmoid, within
from chunkwise.dsl.ir import Kind, Op, Per, topological
from torch import Tensor

from tests.harness import Inputs, Sizes, make_inputs

LOGARITHMS = (-1e3, -1e6, -1e9, -math.inf)
FACTORS = (0.0, 1e-9, 1e-6, 1e-4)
# one of a chunk of 64, and eight: neighbours, the first token, the last of a chunk, the next one
ONE, EIGHT = (30,), (0, 5, 20, 21, 22, 50, 63, 64)


# Spellings beside the library's. A gate that is left out where a read comes before the decay is
# in the library: comba, rwkv6, rwkv7.
@cw.recurrence
def squashed(S: State, q: Key, k: Key, v: Value, x: Scalar):  # type: ignore[no-untyped-def]
    """A gate that reaches 0 as its argument goes to minus infinity."""
    S = sigmoid(x) * S + outer(k, v)
    return S, q @ S


@cw.recurrence
def two_factors(S: State, q: Key, k: Key, v: Value, f: Key, a: Scalar):  # type: ignore[no-untyped-def]
    """One or both factors may be 0; the gradient of each contains the other."""
    S = within(a, 0.0, 1.0) * (within(f, 0.0, 1.0) * S) + outer(k, v)
    return S, q @ S


@cw.recurrence
def read_before(S: State, q: Key, k: Key, v: Value, f: Key, a: Scalar):  # type: ignore[no-untyped-def]
    """Reads come before the token's own decay, which has a vector gate and a scalar one."""
    o = q @ S
    S = within(a, 0.0, 1.0) * within(f, 0.0, 1.0) * S + outer(k, v)
    return S, o


@cw.recurrence
def squared(S: State, q: Key, k: Key, v: Value, w: Key):  # type: ignore[no-untyped-def]
    """A gate whose derivative is large where the gate is 0."""
    S = exp(-(w * w)) * S + outer(k, v)
    return S, q @ S


@cw.recurrence
def scalar_factor(S: State, q: Key, k: Key, v: Value, f: Scalar, beta: Scalar):  # type: ignore[no-untyped-def]
    """A delta rule whose state is multiplied by a factor."""
    S = within(f, 0.0, 1.0) * S
    S = S + beta * outer(k, v - k @ S)
    return S, q @ S


SPELLINGS = (squashed, two_factors, read_before, squared, scalar_factor)
# what the operand of a reset is in a declaration whose gate is an expression of it
ARGUMENTS = {"squashed": ("x", 1.0), "squared": ("w", 1.0), "mamba2": ("dt", -1.0)}


def values_of(op: cw.Recurrence) -> tuple[float, ...]:
    """The values of an operand that reset a state."""
    if op.__name__ in ARGUMENTS:
        if op.__name__ == "squashed":
            return LOGARITHMS
        return tuple(x for x in LOGARITHMS if math.isfinite(x))  # the operand is no gate alone
    return FACTORS if "factor" in _gates(op).values() else LOGARITHMS


def _gates(op: cw.Recurrence) -> dict[str, str]:
    """The per-token operands that are a log-decay or a decay factor."""
    form = op.declaration.normal_form(op.declaration.default_micro)
    tokens = {x.name for x in form.operands if x.per is Per.TOKEN}
    found = {}
    for update in (u for m in form.micro_steps for u in m.updates):
        if update.log_decay is None:
            continue
        for node in topological(update.log_decay):
            spelled = "log"
            if node.op is Op.LOG and node.args[0].op is Op.MAXIMUM:
                node, spelled = node.args[0].args[0], "factor"
                while node.op is Op.WITHIN:
                    (node, *_) = node.args
            elif node is not update.log_decay:
                continue
            if node.op is Op.OPERAND and node.attrs[0] in tokens:
                found[str(node.attrs[0])] = spelled
    return found


def with_resets(op: cw.Recurrence, sizes: Sizes, value: float, rows: tuple[int, ...]) -> Inputs:
    """The inputs of a call in which operands have `value` at those tokens of every sequence."""
    inputs = make_inputs(op, sizes)
    name, sign = ARGUMENTS.get(op.__name__, ("", 1.0))
    gates = {name: "log"} if name else _gates(op)
    assert gates, f"{op.__name__} has no operand that resets its state"
    tokens = torch.tensor(_tokens(sizes, rows))
    for gate in gates:
        x = inputs.operands[gate]
        if "factor" in gates.values() and x.requires_grad:
            _into_unit_interval(x)
        x.data[:, tokens] = sign * value
    for x in op.declaration.operands:  # what is written stays of one size
        if op.__name__ == "mamba2" and x.kind is Kind.VALUE:
            inputs.operands[x.name].data[:, tokens] /= abs(value)
    return inputs


def _into_unit_interval(x: Tensor) -> None:
    x.data = (0.5 + 0.5 * x.data.double().sigmoid()).to(x.dtype)


def _tokens(sizes: Sizes, rows: tuple[int, ...]) -> list[int]:
    if sizes.lengths is None:
        return [r for r in rows if r < sizes.T]
    starts = [sum(sizes.lengths[:n]) for n in range(len(sizes.lengths))]
    return [s + r for s, n in zip(starts, sizes.lengths, strict=True) for r in rows if r < n]
