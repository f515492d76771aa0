"""The derived chunk form, run eagerly in float64, is the token loop: gradients included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, Scalar, State, Value, outer, sigmoid
from chunkwise.codegen.plan import Plan
from chunkwise.dsl.library import all_declarations
from torch import Tensor

from tests.classes import CLASSES, costly, plan_pairs
from tests.codegen.forms import eager_under
from tests.harness import (
    Gates,
    Inputs,
    Layout,
    Sizes,
    engine_results,
    make_inputs,
    oracle_results,
)
from tests.tolerances import FLOAT64_RANDOM, assert_agree

NAMES = [d.name for d in all_declarations()]

C = 64  # the eager engine's chunk, for 64 tokens and more
# each row is one way in which indexing, masking or rounding could go wrong
CASES: dict[str, Sizes] = {
    "plain": Sizes(T=19),  # a chunk that is not full
    # every position of a sequence's end relative to a chunk's; empty ones first, inside and last
    "packed": Sizes(HV=4, K=5, V=3, initial=True).packed(0, C - 1, 1, C, 0, 0, C + 1, 2, 0),
    "packed, zero state": Sizes(H=1, HV=1, K=3, V=4).packed(1, 0, C + 1),
    "grouped heads": Sizes(HV=4, K=7, V=6, initial=True),  # Keys per head, values and gates twice
    "K > V": Sizes(B=1, K=11, V=5, initial=True),
    "K < V": Sizes(B=1, K=3, V=12, initial=True),
    "K = 100": Sizes(B=1, H=1, HV=2, T=9, K=100, V=20, initial=True),  # no power of two
    "one channel": Sizes(K=1, V=1, T=5, initial=True),
    # around nothing, one token, and the end of a chunk
    "T = 0": Sizes(T=0, initial=True),
    "T = 0, zero state": Sizes(T=0),
    "T = 1": Sizes(T=1, initial=True),
    "T = C - 1": Sizes(B=1, T=C - 1, K=4, V=4),
    "T = C": Sizes(B=1, T=C, K=4, V=4, initial=True),
    "T = C + 1": Sizes(B=1, T=C + 1, K=4, V=4),
    "views": Sizes(HV=4, layout=Layout.VIEWS),  # what projections hand over
    "copied": Sizes(HV=4, layout=Layout.COPIED),  # the last axis strided
    # a factorised vector gate overflows, a formed diagonal cancels; three chunks, unequal
    "hard gates": Sizes(HV=4, K=6, V=4, initial=True, gates=Gates.HARD).packed(2 * C + 7, 9),
}


def op_of(name: str) -> cw.Recurrence:
    return getattr(cw.library, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", costly(NAMES))
def test_eager_is_the_token_loop(name: str, case: str) -> None:
    op = op_of(name)
    inputs = make_inputs(op, CASES[case])
    assert_agree(engine_results(op, inputs, "eager"), oracle_results(op, inputs), FLOAT64_RANDOM)


@pytest.mark.parametrize("name", costly(NAMES))
def test_packed_is_the_loop_over_sequences(name: str) -> None:
    """Also with the neighbours' tokens replaced by NaN: nothing leaks between sequences."""
    op = op_of(name)
    lengths = (3, 0, C + 2, 1)
    inputs = make_inputs(op, Sizes(K=3, V=4, initial=True).packed(*lengths))
    assert inputs.initial is not None
    o, finals = _call(op, inputs.operands, inputs.initial, inputs.cu_seqlens)
    per_token = {x.name for x in op.declaration.operands if x.per is cw.dsl.ir.Per.TOKEN}
    start = 0
    for n, length in enumerate(lengths):
        own = slice(start, start + length)
        alone = {m: x.detach()[:, own] if m in per_token else x for m, x in inputs.operands.items()}
        states = tuple(s[n : n + 1] for s in inputs.initial)
        want, want_finals = _call(op, alone, states, None)
        torch.testing.assert_close(o[:, own], want, rtol=1e-12, atol=1e-12)
        for got, expected in zip(finals, want_finals, strict=True):
            torch.testing.assert_close(got[n : n + 1], expected, rtol=1e-12, atol=1e-12)
        poisoned = {
            m: _nan_outside(x.detach(), own) if m in per_token else x
            for m, x in inputs.operands.items()
        }
        again, again_finals = _call(op, poisoned, inputs.initial, inputs.cu_seqlens)
        assert torch.equal(again[:, own], o[:, own])
        for got, expected in zip(again_finals, finals, strict=True):
            assert torch.equal(got[n], expected[n])
        start += length


@pytest.mark.parametrize("at", [1, 20, C - 1, C, C + 3])  # in, at the end of, and after a chunk
@pytest.mark.parametrize("name", costly(NAMES))
def test_the_future_does_not_change_the_past(name: str, at: int) -> None:
    """Bit for bit: a token changes no output before it, whatever the rounding."""
    op = op_of(name)
    sizes = Sizes(B=1, T=C + 8, K=4, V=3, dtype=torch.float32, gates=Gates.HARD)
    inputs = make_inputs(op, sizes)
    before, _ = _call(op, inputs.operands, None, None)
    changed = {n: x.detach().clone() for n, x in inputs.operands.items()}
    for x in op.declaration.operands:
        if x.per is cw.dsl.ir.Per.TOKEN:
            changed[x.name][:, at:] *= 0.5
    after, _ = _call(op, changed, None, None)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


@pytest.mark.parametrize("name", costly(NAMES))
def test_gradients_do_not_depend_on_what_asks_for_them(name: str) -> None:
    """Through o alone, and through the final state alone, they add up to those through both."""
    op = op_of(name)
    inputs = make_inputs(op, Sizes(B=1, T=11, K=3, V=3, initial=True))
    leaves = list(inputs.leaves.values())

    def gradients(*weights: float) -> list[Tensor]:
        o, finals = _call(op, inputs.operands, inputs.initial, None)
        loss = weights[0] * o.sin().sum() + weights[1] * sum(s.cos().sum() for s in finals)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    through_o, through_states, both = gradients(1, 0), gradients(0, 1), gradients(1, 1)
    for a, b, c in zip(through_o, through_states, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-10, atol=1e-10)


PLANS = [
    pytest.param(name, *pair, id=f"{name}-{n}") for name in CLASSES for n, pair in plan_pairs(name)
]


@pytest.mark.parametrize(("name", "forward", "backward"), PLANS)
def test_every_plan_computes_the_same(
    name: str, forward: Plan, backward: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager_under(monkeypatch, forward, backward)
    op = op_of(name)
    inputs = make_inputs(op, Sizes(HV=4, K=5, V=3, initial=True).packed(C + 1, 0, 7))
    assert_agree(engine_results(op, inputs, "eager"), oracle_results(op, inputs), FLOAT64_RANDOM)


def _call(
    op: cw.Recurrence,
    operands: dict[str, Tensor],
    initial: tuple[Tensor, ...] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    options: dict[str, Any] = Inputs(operands, initial, cu_seqlens).options
    o, finals = op(**operands, **options, engine="eager", output_final_state=True)
    return o, finals if isinstance(finals, tuple) else (finals,)


def _nan_outside(x: Tensor, own: slice) -> Tensor:
    poisoned = torch.full_like(x, torch.nan)
    poisoned[:, own] = x[:, own]
    return poisoned


@cw.recurrence
def deep(S: State, q: Key, k: Key, v: Value, g: Scalar):
    x, y, a = k, v, g
    for _ in range(40):
        x, y, a = x * sigmoid(x) + x, y * y + y, a * a + a
    S = sigmoid(a) * S + outer(x, y)
    return S, q @ S


def test_expressions_that_use_their_parts_twice() -> None:
    """Each part is asked about once: along every path there would be 2 ** 40 of them."""
    inputs = make_inputs(deep, Sizes(T=9))
    small = {n: (1e-9 * x.detach()).requires_grad_() for n, x in inputs.operands.items()}
    inputs = replace(inputs, operands=small)
    got, want = engine_results(deep, inputs, "eager"), oracle_results(deep, inputs)
    assert_agree(got, want, FLOAT64_RANDOM)


def test_decays_that_are_powers_of_powers() -> None:
    @cw.recurrence
    def powers(S: State, q: Key, k: Key, v: Value, g: Scalar):
        a = sigmoid(g)
        for _ in range(40):
            a = a * a
        return a * S + outer(k, v), q @ S

    assert powers.declaration.normal_form().micro_steps[0].updates[0].log_decay is not None
