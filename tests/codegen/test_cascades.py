"""Cascades: what is read of some states feeds keys, values, gates and scales of later ones.

Rules of the literature that need it, and rules that feed everything everywhere, are the token loop
on every engine; a cascade is its parts, one called after the other.
"""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise import (
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    clamp,
    dot,
    exp,
    l2norm,
    outer,
    sigmoid,
    silu,
    softplus,
    sqrt,
)
from chunkwise import sum as channels
from chunkwise.codegen.config import Dims
from chunkwise.codegen.plan import backward_plans, forward_plans
from chunkwise.codegen.programs import (
    chunk_program,
    transition_of,
)
from chunkwise.codegen.prove import prove
from chunkwise.dsl.classify import classify
from chunkwise.dsl.normal_form import levels_of
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.recurrence import Recurrence

from tests.codegen.forms import (
    CASES,
    COMPILED,
    check_engine,
    check_normal_form,
    check_one_token,
    eager_under,
)
from tests.harness import Sizes, engine_results, make_inputs, oracle_results
from tests.tolerances import FLOAT64_RANDOM, assert_agree

gated_slots = cw.library.gsa


@cw.recurrence
def residual(S: State, W: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar):
    error = v - k @ (exp(g) * S)
    S = exp(g) * S + beta * outer(k, v)
    W = exp(g) * W + beta * outer(k, clamp(error, -1.0, 1.0))
    return (S, W), q @ S + q @ W


@cw.recurrence
def second_order(S: State, C: State, q: Key, k: Key, k_too: Value, v: Key, g: Scalar):
    S = exp(g) * S + outer(k, k_too)
    C = exp(g) * C + outer(v, k_too)
    return (S, C), C @ (q @ S)


@cw.recurrence
def two_passes(S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar):
    S = exp(g) * S
    S = S + beta * outer(k, v - k @ S)
    return S, (q + S @ v) @ S


@cw.recurrence
def normalised_output(S: State, q: Key, k: Key, v: Value, g: Key):
    S = exp(g) * S + outer(k, v)
    return S, l2norm(q @ S)


@cw.recurrence
def gates_and_keys(S: State, W: State, q: Key, k: Key, v: Value, x: Value, g: Key):
    S = exp(g) * S + outer(k, v)
    y = l2norm(S @ x)
    W = exp(-softplus(y)) * W
    W = W + 0.5 * outer(y, v - y @ W)
    return (S, W), q @ W + y @ S


@cw.recurrence
def by_a_normaliser(z: KeyState, S: State, q: Key, k: Key, v: Value, g: Scalar):
    z = exp(g) * z + k * k
    x = dot(k, z)
    S = sigmoid(x) * S + x / (1 + x * dot(k, k)) * outer(k, v - k @ S)
    return (z, S), q @ S


@cw.recurrence
def three(S: State, z: KeyState, W: State, q: Key, k: Key, p: Key, v: Value, g: Key, beta: Scalar):
    S = exp(g) * S
    S = S + beta * outer(k, v - k @ S)
    a = q @ S
    z = sigmoid(channels(a)) * z + sqrt(dot(a, a)) * p  # whose slope is infinite at 0
    n = 1 + dot(q, z) ** 2
    W = exp(g) * W + beta / dot(p, p) * outer(p, silu(a) / n - p @ W)
    return (S, z, W), q @ W + a


@cw.recurrence
def sums(S: State, W: State, q: Key, k: Key, v: Value):
    r = k @ S  # of which nothing but its sum is used
    S = S + 0.5 * outer(k, v - r)
    W = sigmoid(channels(q @ S)) * W + outer(k, v)
    return (S, W), q @ W


RULES = {
    op.declaration.name: op
    for op in (
        *(gated_slots, residual, second_order, two_passes),
        *(normalised_output, gates_and_keys, by_a_normaliser, sums, three),
    )
}


def _sized(name: str, sizes: Sizes) -> Sizes:
    """Of the second order, the key comes as a Key and as a Value."""
    return replace(sizes, V=sizes.K) if name == "second_order" else sizes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], _sized(name, CASES[case]), "eager")


@pytest.mark.parametrize("name", ["gsa", "residual", "gates_and_keys", "three"])
def test_every_plan_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = RULES[name]
    inputs = make_inputs(op, CASES["packed"])
    want = oracle_results(op, inputs)
    body = chunk_program(op.declaration.normal_form())
    forward, backward = forward_plans(body), backward_plans(body)
    for n in range(max(len(forward), len(backward))):
        eager_under(monkeypatch, forward[n % len(forward)], backward[n % len(backward)])
        Records.forget()
        assert_agree(engine_results(op, inputs, "eager"), want, FLOAT64_RANDOM)


@pytest.mark.parametrize("name", RULES)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], _sized(name, COMPILED["tvm"]), "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", RULES)
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], _sized(name, COMPILED["triton"]), "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], _sized(name, Sizes(T=5, initial=True)))


@pytest.mark.parametrize("name", [n for n in RULES if n != "three"])
def test_proofs(name: str) -> None:
    claims = prove(RULES[name].declaration).claims
    assert len(claims) >= 5


def test_levels() -> None:
    levels = levels_of(three.declaration.normal_form())
    assert [level.states for level in levels] == [("S",), ("z",), ("W",)]
    assert classify(three.declaration.normal_form()).levels == 3
    assert "3 states in a cascade of 3 levels" in three.explain()
    assert len(levels_of(gated_slots.declaration.normal_form())) == 1  # only their reads meet


@pytest.mark.parametrize("op", [residual, by_a_normaliser, three])
def test_segments_are_for_states_that_are_affine_by_themselves(op: Recurrence) -> None:
    assert transition_of(op.declaration.normal_form(), Dims(8, 8)) is None


def test_one_token() -> None:
    check_one_token(three)


# ---- a cascade is its parts, one called after the other ------------------------------------------


@cw.recurrence
def first_pass(A: State, q: Value, k: Value, s: Key, g: Key):
    A = exp(g) * A + outer(s, k)
    return A, A @ q


@cw.recurrence
def second_pass(S: State, p: Key, v: Value, s: Key, g: Key):
    S = exp(g) * S + outer(s, v)
    return S, p @ S


def test_slots_are_two_calls() -> None:
    inputs = make_inputs(gated_slots, CASES["packed"])
    A, S = inputs.initial or (None, None)
    x = inputs.operands
    options = {"cu_seqlens": inputs.cu_seqlens, "engine": "eager", "output_final_state": True}
    scores, A_end = first_pass(x["q"], x["k"], x["s"], x["g"], initial_state=A, **options)
    p = scores.softmax(-1)
    o, S_end = second_pass(p, x["v"], x["s"], x["g"], initial_state=S, **options)
    got, (A_too, S_too) = gated_slots(**x, initial_state=(A, S), **options)
    torch.testing.assert_close(got, o)
    torch.testing.assert_close(A_too, A_end)
    torch.testing.assert_close(S_too, S_end)
    leaves = list(inputs.leaves.values())
    loss = torch.randn_like(o)
    ours, theirs = (torch.autograd.grad(y, leaves, loss, allow_unused=True) for y in (got, o))
    for n, a, b in zip(inputs.leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=n)


@cw.recurrence
def gate_of_keys(z: KeyState, k: Key, v: Value, g: Scalar):
    z = exp(g) * z + k * k
    return z, v * dot(k, z)


@cw.recurrence
def gated_by(S: State, q: Key, k: Key, v: Value, x: Scalar):
    S = sigmoid(x) * S + x / (1 + x * dot(k, k)) * outer(k, v - k @ S)
    return S, q @ S


def test_a_gate_that_is_read_is_two_calls() -> None:
    inputs = make_inputs(by_a_normaliser, CASES["packed"])
    z, S = inputs.initial or (None, None)
    q, k, v, g = inputs.operands.values()
    options = {"cu_seqlens": inputs.cu_seqlens, "engine": "eager"}
    x, _ = gate_of_keys(k, torch.ones_like(v), g, initial_state=z, **options)
    o, _ = gated_by(q, k, v, x[..., 0], initial_state=S, **options)
    got, _ = by_a_normaliser(q, k, v, g, initial_state=(z, S), **options)
    torch.testing.assert_close(got, o)
    leaves = list(inputs.leaves.values())
    loss = torch.randn_like(o)
    ours, theirs = (torch.autograd.grad(y, leaves, loss) for y in (got, o))
    for n, a, b in zip(inputs.leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=n)


# ---- what is no cascade --------------------------------------------------------------------------


def test_reads_of_a_state_that_is_not_kept() -> None:
    """The output reads what a token would write; what it would write is made of reads."""

    @cw.recurrence
    def imagined(S: State, q: Key, k: Key, v: Value, u: Value, g: Scalar):
        S = exp(g) * S + outer(k, v)
        return S, q @ (S + outer(l2norm(S @ u), silu(k @ S)))

    inputs = make_inputs(imagined, CASES["packed"])
    got = engine_results(imagined, inputs, "eager")
    assert_agree(got, oracle_results(imagined, inputs), FLOAT64_RANDOM)


def test_a_cycle_is_refused_at_the_line() -> None:
    with pytest.raises(cw.errors.NotAffine) as caught:

        @cw.recurrence
        def cycle(S: State, W: State, q: Key, k: Key, v: Value):
            r = k @ S
            S = S + outer(k, v - silu(k @ W))
            W = W + outer(k, silu(r))
            return (S, W), q @ S

    assert "S and W see one another" in str(caught.value)
    assert "silu(k @ W)" in str(caught.value)
