"""Signs and angles of decays: factors that may be negative, pairs of states that turn.

Every rule is the token loop on every engine; special cases are the rules that they should be.
"""

from __future__ import annotations

import math
from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise import (
    HeadKey,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    exp,
    outer,
    rotate,
    sigmoid,
    tanh,
    within,
)
from chunkwise.codegen import tile
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.prove import prove
from chunkwise.codegen.tile import TileOp
from chunkwise.dsl import oracle
from torch import Tensor

from tests.codegen.forms import CASES, COMPILED, check_engine, check_normal_form, check_one_token
from tests.harness import Sizes, engine_results, make_inputs, oracle_results
from tests.tolerances import FLOAT64_RANDOM, assert_agree


@cw.recurrence
def flips(S: State, q: Key, k: Key, v: Value, x: Key, g: Scalar, b: Scalar):
    S = -exp(g) * tanh(x) * S
    S = S + 0.5 * sigmoid(b) * outer(k, v - k @ S)
    return S, q @ S


@cw.recurrence
def always_negative(S: State, q: Key, k: Key, v: Value, g: Scalar):
    o = q @ S
    S = -exp(g) * S + outer(k, v)
    return S, q @ S - 0.5 * o


@cw.recurrence
def of_numbers(S: State, q: Key, k: Key, v: Value, *, scale: float = 0.7):
    S = -0.75 * S + outer(k, v)
    S = tanh(-scale) * (S - 0.5 * outer(k, k @ S))
    return S, q @ S


@cw.recurrence
def turning(R: State, J: State, q: Key, p: Key, k: Key, v: Value, g: Scalar, a: Scalar):
    R, J = rotate(exp(g) * R, exp(g) * J, a)
    R = R + outer(k, v)
    return (R, J), q @ R - p @ J


@cw.recurrence
def channels(R: State, J: State, q: Key, p: Key, k: Key, c: Key, v: Value, g: Key, a: Key):
    R, J = rotate(exp(g) * R, exp(g) * J, a)
    u = 0.4 * (v - k @ R - c @ J)
    R, J = R + outer(k, u), J + outer(c, u)
    return (R, J), q @ R - p @ J


@cw.recurrence
def lagged(R: State, J: State, X: State, Y: State, q: Key, k: Key, c: Key, v: Value, g: Scalar,
           b: Scalar, a: HeadKey):  # fmt: skip
    b = tanh(b)  # of either sign: not a turn, for the lags mix by it
    R, J = rotate(exp(g) * R + b * X, exp(g) * J + b * Y, 0.5 * a)
    return (R + outer(k, v), J + outer(c, v), outer(k, v), outer(c, v)), q @ R + q @ J


@cw.recurrence
def on_values(R: State, J: State, q: Key, k: Key, v: Value, x: Value, a: Value):
    R, J = rotate(tanh(x) * R, tanh(x) * J, a)
    R = R + outer(0.3 * k - 0.3 * (J @ v), v)
    return (R, J), q @ R + q @ J


@cw.recurrence
def columns(R: State, J: State, k: Key, v: Value, x: Value, g: Key, a: Key):
    R, J = rotate(exp(g) * R, exp(g) * J, -a)
    R = R + outer(k, v)
    return (R, J), R @ x - J @ v


@cw.recurrence
def key_states(y: KeyState, z: KeyState, q: Key, k: Key, v: Value, a: Key):
    y, z = rotate(y, z, a)
    y = y + 0.2 * (1 - dot(k, y)) * k
    return (y, z), dot(q, y) * v + dot(q, z)


@cw.recurrence
def angles_of_reads(A: State, R: State, J: State, q: Key, k: Key, v: Value, w: Value):
    A = 0.9 * A + outer(k, v)
    R, J = rotate(R, J, A @ w)
    R = R + outer(k, tanh(q @ A))
    return (A, R, J), q @ R + k @ J


@cw.recurrence
def steps(R: State, J: State, T: State, q: Key, k: Key, p: Key, v: Value, a: Key, x: Scalar):
    R, J = rotate(R, J, a)
    R, J = R + 0.3 * outer(k, v - k @ R), J + 0.3 * outer(p, v)
    R = R + 0.3 * outer(p, v - k @ R - p @ J)
    T = tanh(x) * T + 0.3 * outer(p, v)
    return (R, J, T), q @ R + q @ T


RULES = {
    op.declaration.name: op
    for op in (
        *(
            flips,
            always_negative,
            of_numbers,
            turning,
            channels,
            lagged,
            on_values,
            columns,
            key_states,
        ),
        *(angles_of_reads, steps),
    )
}
_FEW = ("flips",)  # the others take minutes, together
_SOME = [n if n in _FEW else pytest.param(n, marks=pytest.mark.long) for n in RULES]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], CASES[case], "eager")


@pytest.mark.parametrize("name", _SOME)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], COMPILED["tvm"], "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", _SOME)
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], COMPILED["triton"], "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True))


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("lagged", "steps", "channels")])
def test_proofs(name: str) -> None:
    assert len(prove(RULES[name].declaration).claims) >= 5


@pytest.mark.parametrize("name", [n for n in RULES if n != "lagged"])
def test_one_token(name: str) -> None:
    check_one_token(RULES[name])


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("lagged", "steps")])
def test_turns_leave_no_products_of_two_tiles_but_of_recalls(name: str) -> None:
    """What mixes by signs and angles alone is solved for by nothing: keys turn."""
    body = chunk_program(RULES[name].declaration.normal_form())
    below = tile.topological(*(c.end for c in body.carried))
    solves = sum(t.op is TileOp.INVERSE for t in below)
    recalls = {"flips": 1, "key_states": 1, "on_values": 1, "channels": 1, "of_numbers": 1}
    assert solves <= recalls.get(name, 0)


# ---- special cases -------------------------------------------------------------------------------


SIZES = Sizes(H=1, HV=2, T=68, K=5, V=3, initial=True)


def called(op: cw.Recurrence, **given: Tensor) -> dict[str, Tensor]:
    """What the eager engine gives, of the operands of `turning` but for some."""
    inputs = make_inputs(turning, SIZES)
    for name, x in given.items():
        like = inputs.operands[name if name in inputs.operands else "g"]
        inputs.operands[name] = x.expand_as(like).clone().requires_grad_()
    names = [o.name for o in op.declaration.operands]
    inputs.operands = {n: inputs.operands[n] for n in names}
    return engine_results(op, inputs, "eager")


@cw.recurrence
def still(R: State, J: State, q: Key, p: Key, k: Key, v: Value, g: Scalar):
    R, J = exp(g) * R + outer(k, v), exp(g) * J
    return (R, J), q @ R - p @ J


def test_a_factor_of_0_beside_a_negative_one() -> None:
    """The sign is that of the factor which has one."""

    @cw.recurrence
    def products(S: State, q: Key, k: Key, v: Value, f: Key, x: Key, g: Scalar):
        S = -exp(g) * within(f, 0, 1) * within(x, -1, 1) * S
        return S + outer(k, v), q @ S

    inputs = make_inputs(products, SIZES)
    f, x = inputs.operands["f"].detach(), inputs.operands["x"].detach()
    f[:, 3::7], x[:, 3::5] = 0.0, -0.5
    inputs.operands |= {"f": f.requires_grad_(), "x": x.requires_grad_()}
    got, want = engine_results(products, inputs, "eager"), oracle_results(products, inputs)
    assert want["df"][:, 3::35].abs().max() > 0.1
    assert_agree(got, want, FLOAT64_RANDOM)


@pytest.mark.parametrize("per", [Scalar, Key])
def test_zero_is_a_reset_with_the_gradient_of_the_product(per: type) -> None:
    """Factors that are exactly 0, of either sign beside them."""

    def step(S, q, k, v, f):  # type: ignore[no-untyped-def]
        S = within(f, -1, 1) * S + outer(k, v)
        return S, q @ S

    step.__annotations__ = {"S": State, "q": Key, "k": Key, "v": Value, "f": per}
    op = cw.recurrence(step)
    for sizes in (SIZES, SIZES.packed(31, 0, 37)):
        inputs = make_inputs(op, sizes)
        f = inputs.operands["f"].detach()
        f[:, 3::7] = 0.0
        f[:, 10] = -0.0
        inputs.operands["f"] = f.requires_grad_()
        got, want = engine_results(op, inputs, "eager"), oracle_results(op, inputs)
        assert want["df"][:, 3::7].abs().max() > 0.1
        assert_agree(got, want, FLOAT64_RANDOM)


def test_a_turn_by_0_is_none() -> None:
    turned, plain = called(turning, a=torch.zeros(1, dtype=torch.float64)), called(still)
    for name, x in plain.items():
        torch.testing.assert_close(turned[name], x, rtol=1e-12, atol=1e-12)


def test_a_turn_and_back_is_none() -> None:
    a = torch.linspace(-5, 5, 68, dtype=torch.float64)[None, :, None]
    a[:, 1::2] = -a[:, ::2]
    written = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(34)[None, :, None, None]
    k = make_inputs(turning, SIZES).operands["k"] * written  # where nothing is turned
    turned, plain = called(turning, a=a, k=k), called(still, k=k)
    turned["o"], plain["o"] = turned["o"][:, 1::2], plain["o"][:, 1::2]
    for name in ("o", "final 0", "final 1"):
        torch.testing.assert_close(turned[name], plain[name], rtol=1e-12, atol=1e-12)


def test_half_a_turn_is_a_sign() -> None:
    @cw.recurrence
    def signs(R: State, J: State, q: Key, p: Key, k: Key, v: Value, g: Scalar, f: Scalar):
        f = within(f, -1, 1)
        R, J = exp(g) * f * R + outer(k, v), exp(g) * f * J
        return (R, J), q @ R - p @ J

    negative = (torch.arange(68)[None, :, None] % 3 == 1).double()
    turned, signed = called(turning, a=math.pi * negative), called(signs, f=1.0 - 2.0 * negative)
    for name in set(turned) - {"da"}:
        torch.testing.assert_close(turned[name], signed[name], rtol=1e-9, atol=1e-9)


def test_large_angles_are_right() -> None:
    """The sum of angles of a chunk, thousands of turns."""
    inputs = make_inputs(channels, SIZES)
    inputs.operands["a"] = (100 * inputs.operands["a"].detach()).requires_grad_()
    got, want = engine_results(channels, inputs, "eager"), oracle_results(channels, inputs)
    assert_agree(got, want, FLOAT64_RANDOM)


@pytest.mark.parametrize("name", ["turning", "channels", "columns"])
@pytest.mark.parametrize("strong", [False, True], ids=["lasting", "forgotten"])
def test_float32_keeps_angles_and_their_gradients(name: str, strong: bool) -> None:
    """Angles of 10,000 radians, summed over a chunk; gradients beside which a row's own write is
    8000 times as large."""
    inputs = make_inputs(RULES[name], replace(SIZES, dtype=torch.float32))
    inputs.operands["a"] = (1e4 * inputs.operands["a"].detach()).requires_grad_()
    if strong:
        inputs.operands["g"] = torch.full_like(inputs.operands["g"], -9.0).requires_grad_()
    got, want = engine_results(RULES[name], inputs, "eager"), oracle_results(RULES[name], inputs)
    assert_agree(got, want, torch.float32)
    assert not strong or want["da"].abs().max() < 1e-2


def test_states_that_turn_are_explained() -> None:
    text = channels.explain()
    assert "R: decay per key channel with an angle per key channel" in text
    assert "takes the angle of the factor out of the state, into keys" in text
    assert "decay per key channel of either sign" in flips.explain()
    assert "factor  -exp(g)*tanh(x) · S" in flips.explain()


def test_what_is_no_angle_is_refused() -> None:
    with pytest.raises(cw.errors.NoChunkForm, match="turn two states by `rotate"):

        @cw.recurrence
        def shear(R: State, J: State, q: Key, k: Key, v: Value, a: Key):
            R, J = cw.cos(a) * R + cw.sin(a) * J + outer(k, v), cw.sin(a) * R + cw.cos(a) * J
            return (R, J), q @ R

    with pytest.raises(cw.errors.UnboundedDecay, match="-1 in place of 0 for either sign"):

        @cw.recurrence
        def unbounded(R: State, J: State, q: Key, k: Key, v: Value, a: Key, f: Key):
            R, J = rotate(f * R, f * J, a)
            return (R + outer(k, v), J), q @ R


def test_signs_beside_gates_of_the_other_axis_are_refused() -> None:
    with pytest.raises(cw.errors.NoChunkForm, match="have signs, turn or mix along one axis"):

        @cw.recurrence
        def signs(S: State, q: Key, k: Key, v: Value, x: Key, h: Value):
            S = tanh(x) * S * exp(h) + outer(k, v)
            return S, q @ S

    with pytest.raises(cw.errors.NoChunkForm, match="have signs, turn or mix along one axis"):

        @cw.recurrence
        def angles(R: State, J: State, q: Key, k: Key, v: Value, a: Key, h: Value):
            R, J = rotate(R * exp(h), J * exp(h), a)
            return (R + outer(k, v), J), q @ R + k @ J

    with pytest.raises(cw.errors.NoChunkForm, match="on the rows of the state and on its columns"):

        @cw.recurrence
        def recalls(S: State, q: Key, k: Key, v: Value, x: Key, h: Value):
            S = tanh(x) * S * exp(h)
            S = S + 0.5 * outer(k, v - k @ S)
            return S, q @ S


def test_cosine_and_sine() -> None:
    @cw.recurrence
    def waves(S: State, q: Key, k: Key, v: Value, x: Value):
        S = S + outer(cw.sin(k), cw.cos(3 * v))
        return S, cw.sin(q @ S) + cw.cos(x)

    check_engine(waves, SIZES, "eager")
    pytest.importorskip("tvm")
    inputs = make_inputs(waves, replace(SIZES, dtype=torch.float32))
    inputs.operands["x"] = (300 * inputs.operands["x"].detach()).requires_grad_()
    want = oracle.run(waves.declaration.step(), inputs.operands, {}, inputs.initial)[0]
    got, _ = waves(**inputs.operands, initial_state=inputs.initial[0], engine="tvm")
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2e-5)
