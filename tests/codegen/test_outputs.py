"""Several outputs of a step: Values, Keys and Scalars, or one read for each entry of a tuple."""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, KeyState, Scalar, State, Value, dot, errors, exp, outer, sigmoid
from chunkwise.codegen.prove import prove
from chunkwise.dsl import oracle
from chunkwise.nn import RecurrentLayer

from tests.codegen.forms import CASES, COMPILED, check_engine, check_normal_form
from tests.harness import Sizes, make_inputs


@cw.recurrence
def two_values(S: State, q: Key, p: Key, k: Key, v: Value, b: Scalar, g: Scalar):
    before = p @ S
    S = exp(g) * S
    S = S + 0.4 * sigmoid(b) * outer(k, v - k @ S)
    return S, (q @ S, before)


@cw.recurrence
def all_kinds(S: State, z: KeyState, q: Key, k: Key, v: Value, x: Value, g: Key):
    S = exp(g) * S + outer(k, v)
    z = exp(g) * z + k
    return (S, z), (dot(q, z), S @ x, q @ S, x)


@cw.recurrence
def reads(S: State, q: tuple[Key, ...], k: tuple[Key, ...], v: tuple[Value, ...], g: Scalar):
    S = exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S + outer(k_i, v_i)
    return S, tuple(q_i @ S for q_i in q)


@cw.recurrence
def each_step(S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], b: Scalar):
    """What is read after each of a token's delta rules."""
    found = []
    for k_i, v_i in zip(k, v, strict=True):
        S = S + 0.4 * sigmoid(b) * outer(k_i, v_i - k_i @ S)
        found.append(q @ S)
    return S, tuple(found)


@cw.recurrence
def last_of_rows(S: State, q: Key, p: Key, k: tuple[Key, ...], v: tuple[Value, ...], g: Scalar):
    """Rows of micro-steps, whose last row has both outputs."""
    S = exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S + 0.3 * outer(k_i, v_i - k_i @ S)
    return S, (q @ S, dot(p, q) * (p @ S))


RULES = {op.declaration.name: op for op in (two_values, all_kinds, reads, each_step, last_of_rows)}


def of_rule(name: str, sizes: Sizes) -> Sizes:
    return replace(sizes, micro=3 if name == "reads" else 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], of_rule(name, CASES[case]), "eager")


@pytest.mark.parametrize("name", RULES)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], of_rule(name, COMPILED["tvm"]), "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", ["all_kinds", "reads", "last_of_rows"])
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], of_rule(name, COMPILED["triton"]), "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True, micro=2))


@pytest.mark.parametrize("name", RULES)
def test_proofs(name: str) -> None:
    assert len(prove(RULES[name].declaration, 2).claims) >= 5


@pytest.mark.parametrize("engine", ["reference", "tvm"])
@pytest.mark.parametrize("name", RULES)
def test_one_token(name: str, engine: str) -> None:
    if engine == "tvm":
        pytest.importorskip("tvm")
    op = RULES[name]
    inputs = make_inputs(op, Sizes(T=1, initial=True, dtype=torch.float32))
    token = {n: x.detach()[:, 0] for n, x in inputs.operands.items()}
    given = [s.detach() for s in inputs.initial or ()]
    outputs, _ = op.step(**token, state=given, engine=engine)
    step = op.declaration.step(op.declaration.default_micro)
    want, _ = oracle.run(step, inputs.operands, {}, inputs.initial)
    torch.testing.assert_close(oracle.joined(outputs, step).double(), want[:, 0], atol=1e-5, rtol=0)


def test_shapes() -> None:
    inputs = make_inputs(all_kinds, Sizes(B=2, T=5, H=2, HV=4, K=3, V=6))
    outputs, state = all_kinds(**inputs.operands, engine="eager")
    assert [tuple(o.shape) for o in outputs] == [
        (2, 5, 4),
        (2, 5, 4, 3),
        (2, 5, 4, 6),
        (2, 5, 4, 6),
    ]
    assert state is None


@pytest.mark.parametrize("n", [1, 3])
def test_a_read_for_each_entry(n: int) -> None:
    inputs = make_inputs(reads, Sizes(micro=n))
    outputs, _ = reads(**inputs.operands, engine="eager")
    assert len(outputs) == n


def test_the_gradient_of_one_output_alone() -> None:
    inputs = make_inputs(two_values, CASES["not packed"])
    outputs, _ = two_values(**inputs.operands, engine="eager")
    p = inputs.operands["p"]
    (dq, dp) = torch.autograd.grad(outputs[1].sum(), [inputs.operands["q"], p])
    assert not dq.any()
    assert dp.any()


def test_one_graph() -> None:
    inputs = make_inputs(two_values, Sizes(T=7))
    whole = torch.compile(
        lambda **x: two_values(**x, engine="eager")[0], fullgraph=True, backend="eager"
    )
    for a, b in zip(
        whole(**inputs.operands), two_values(**inputs.operands, engine="eager")[0], strict=True
    ):
        torch.testing.assert_close(a, b)


@cw.recurrence
def value_and_key(S: State, q: Key, k: Key, v: Value, x: Value, g: Scalar):
    S = exp(g) * S + outer(k, v)
    return S, (q @ S, S @ x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("op", "micro"), [(value_and_key, 1), (reads, 3)])
def test_a_layer_projects_all_of_them(op: cw.Recurrence, micro: int, gated: bool) -> None:
    """Token by token as at once, and the sum of a projection of each."""
    torch.manual_seed(0)
    options = {"value_heads": 2, "gated": gated, "micro_steps": micro, "engine": "eager"}
    layer = RecurrentLayer(op, 16, 1, 5, 3, **options)
    x = torch.randn(2, 7, 16, requires_grad=True)
    y, _ = layer.prefill(x)
    y.square().sum().backward()
    assert x.grad is not None
    assert all(p.grad.abs().sum() > 0 for p in layer.norm.parameters())
    assert layer.output.in_features == sum(layer.widths)
    assert "[rms norm of o_1" in layer.explain()
    state, tokens = layer.initial_state(2), []
    for t in range(7):
        token, state = layer.step(x[:, t].detach(), state)
        tokens.append(token)
    torch.testing.assert_close(torch.stack(tokens, 1), y, atol=1e-5, rtol=1e-4)


def test_a_layer_refuses_a_scalar() -> None:
    with pytest.raises(ValueError, match="returns a Scalar, and a layer norms Keys or Values"):
        RecurrentLayer(all_kinds, 16, 2, 4, 4)


def test_as_many_outputs_for_every_number() -> None:
    @cw.recurrence
    def now_and_then(S: State, q: Key, k: Key, v: Value, *, twice: bool = False):
        S = S + outer(k, v)
        return S, (q @ S, v) if twice else q @ S

    x = make_inputs(two_values, Sizes(T=2)).operands
    with pytest.raises(errors.BadReturn, match="2 outputs for these numbers"):
        now_and_then(x["q"], x["k"], x["v"], twice=True)


def test_the_page() -> None:
    page = two_values.explain()
    assert "o_1" in page
    assert "o_2" in page
    assert "(o_1[B,T,HV,V], o_2[B,T,HV,V])" in str(two_values.__signature__)
