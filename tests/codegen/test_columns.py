"""A step size per Value channel: every column of the state solves a system of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, Scalar, State, Value, exp, outer, sigmoid
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.prove import prove
from torch import Tensor

from tests.codegen.forms import (
    CASES,
    COMPILED,
    check_engine,
    check_normal_form,
    check_one_token,
)
from tests.harness import Gates, Sizes, engine_results, make_inputs

longhorn = cw.library.longhorn_channels


@cw.recurrence
def gated_delta(S: State, q: Key, k: Key, v: Value, b: Value, g: Key):
    S = exp(g) * S
    S = S + outer(k, sigmoid(b) * (v - k @ S))
    return S, q @ S


@cw.recurrence
def undecayed(S: State, q: Key, k: Key, p: Key, v: Value, b: Value, g: Scalar):
    """A write of its own beside one that recalls the state before its decay."""
    old, S = S, exp(g) * S
    S = S + outer(p, 0.4 * sigmoid(b) * (v - k @ old)) + outer(k, v)
    return S, q @ S


@cw.recurrence
def rows(S: State, q: Key, v: Key, b: Key, x: Value, g: Scalar):
    """The same along the other axis."""
    S = exp(g) * S
    S = S + outer(0.5 * sigmoid(b) * (v - S @ x), x)
    return S, q @ S


@cw.recurrence
def scaled_products(
    S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], b: Value, g: Scalar
):
    """Micro-steps, each with its scales."""
    S = exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S + outer(k_i, 0.5 * sigmoid(b) * (v_i - k_i @ S))
    return S, q @ S


@cw.recurrence
def follows(A: State, B: State, q: Key, k: Key, v: Value, b: Value, c: Scalar, g: Scalar):
    """Scales per channel of what recalls a state that itself recalls."""
    A = exp(g) * A
    A = A + 0.5 * sigmoid(c) * outer(k, v - k @ A)
    B = exp(g) * B + outer(k, sigmoid(b) * (q @ A - k @ B))
    return (A, B), q @ B


RULES = {
    op.declaration.name: op
    for op in (longhorn, gated_delta, undecayed, rows, scaled_products, follows)
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], CASES[case], "eager")


@pytest.mark.parametrize("name", ["longhorn_channels", "gated_delta"])
def test_hard_gates(name: str) -> None:
    check_engine(RULES[name], replace(CASES["packed"], gates=Gates.HARD), "eager")


@pytest.mark.parametrize("name", RULES)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], COMPILED["tvm"], "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", ["longhorn_channels", "rows", "scaled_products"])
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], COMPILED["triton"], "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True))


@pytest.mark.parametrize("name", RULES)
def test_proofs(name: str) -> None:
    assert len(prove(RULES[name].declaration, 2).claims) >= 5


@pytest.mark.parametrize("name", RULES)
def test_one_token(name: str) -> None:
    check_one_token(RULES[name])


def test_one_scale_for_all_channels_is_the_delta_rule() -> None:
    @cw.recurrence
    def per_channel(S: State, q: Key, k: Key, v: Value, b: Value):
        S = S + outer(k, b * (v - k @ S))
        return S, q @ S

    inputs = make_inputs(cw.library.delta_rule, CASES["not packed"])
    want = engine_results(cw.library.delta_rule, inputs, "eager")
    beta, v = inputs.operands["beta"], inputs.operands["v"]
    named = {n: x for n, x in inputs.operands.items() if n != "beta"}
    o, _ = per_channel(**named, b=beta[..., None].expand_as(v), engine="eager", **inputs.options)
    torch.testing.assert_close(o.detach(), want["o"])


def test_what_several_writes_share_is_refused() -> None:
    @cw.recurrence
    def shared(A: State, B: State, q: Key, k: Key, v: Value, b: Value, c: Value, s: Scalar):
        error = v - k @ A
        A, B = 0.9 * A + 0.1 * B + outer(k, b * error), 0.9 * B + outer(q, c * error) - s * A
        return (A, B), q @ A

    with pytest.raises(cw.errors.NotLowered, match="scaled per channel, and several writes"):
        chunk_program(shared.declaration.normal_form())


@cw.recurrence
def exchanged_oja(S: State, q: Value, k: Value, v: Key, g: Key, beta: Scalar):
    """Gated Oja's rule with K and V exchanged: a delta rule that is read over its columns."""
    S = exp(g) * S
    S = S + beta * outer(v, k - v @ S)
    return S, S @ q


@pytest.mark.parametrize("case", ["not packed", "packed"])
def test_oja_and_the_delta_rule_exchange_under_keys_and_values(case: str) -> None:
    """Values, final states and every gradient, the states transposed."""
    sizes = replace(CASES[case], H=2, HV=2, K=5, V=3, initial=True)
    inputs = make_inputs(cw.library.oja, sizes)
    (initial,) = inputs.initial or ()
    leaves = [*inputs.operands.values(), initial]

    def results(op: cw.Recurrence, turned: Callable[[Tensor], Tensor]) -> list[Tensor]:
        o, state = op(
            **inputs.operands,
            initial_state=turned(initial),
            cu_seqlens=inputs.cu_seqlens,
            output_final_state=True,
            engine="eager",
        )
        state = turned(state)
        random = torch.Generator().manual_seed(4)
        weights = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in (o, state)]
        return [o, state, *torch.autograd.grad([o, state], leaves, weights)]

    oja = results(cw.library.oja, lambda x: x)
    delta = results(exchanged_oja, lambda x: x.mT)
    torch.testing.assert_close(delta, oja, rtol=1e-10, atol=1e-10)
    assert all(x.abs().max() > 1e-3 for x in oja)
