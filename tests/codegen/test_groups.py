"""Groups of states that mix or recall one another, several recalls, unlike micro-steps.

Every rule is the token loop on every engine; special cases are the rules that they should be.
"""

from __future__ import annotations

import math

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, KeyState, Scalar, State, Value, cli, dot, exp, outer, sigmoid, tanh
from chunkwise.codegen import tile
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import chunk_adjoint, chunk_program, transition_of
from chunkwise.codegen.prove import prove
from chunkwise.codegen.tile import TileOp
from torch import Tensor

from tests.codegen.forms import (
    CASES,
    COMPILED,
    C,
    check_engine,
    check_normal_form,
    check_one_token,
)
from tests.harness import Inputs, Sizes, make_inputs


@cw.recurrence
def turning(A: State, B: State, q: Key, k: Key, v: Value, c: Scalar, s: Scalar):
    c, s = 0.7 * tanh(c), 0.7 * tanh(s)  # of either sign
    A, B = c * A - s * B + outer(k, v), s * A + c * B
    return (A, B), q @ A + 0.5 * (q @ B)


@cw.recurrence
def trapezoid(S: State, lag: State, q: Key, k: Key, v: Value, g: Scalar, b: Scalar, c: Scalar):
    S = exp(g) * S + b * lag + c * outer(k, v)
    return (S, outer(k, v)), q @ S  # nothing of the old lag is left


@cw.recurrence
def mini_batches(S: State, M: State, q: Key, k: Key, v: Value, g: Scalar, first: Scalar, b: Scalar):
    first = sigmoid(first)
    M = first * S + (1 - first) * M
    S = exp(g) * S + 0.3 * tanh(b) * outer(k, v - k @ M)
    return (S, M), q @ S


@cw.recurrence
def three_states(
    A: State, B: State, C: State, q: Key, k: Key, p: Key, v: Value, g: Scalar, s: Scalar, b: Scalar
):
    s, b = 0.4 * tanh(s), 0.3 * sigmoid(b)
    A, B, C = (
        exp(g) * A - s * C + b * outer(k, v - k @ B),
        0.6 * B + s * A + outer(p, v),
        0.5 * exp(g) * C + s * B - b * outer(k, p @ A),
    )
    return (A, B, C), q @ A + q @ B + q @ C


@cw.recurrence
def two_recalls(S: State, q: Key, k: Key, p: Key, v: Value, b: Scalar, g: Key):
    old, b = S, 0.4 * sigmoid(b)
    S = exp(g) * S
    S = S + b * outer(k, v - k @ S) - b * outer(p, p @ old)
    return S, q @ S


@cw.recurrence
def recalls_across(A: State, B: State, q: Key, k: Key, p: Key, v: Value, b: Scalar, g: Key):
    b = 0.4 * sigmoid(b)
    A, B = exp(g) * A + b * outer(k, v - k @ B), 0.9 * B + b * outer(p, v - p @ A)
    return (A, B), q @ B + q @ A


@cw.recurrence
def unlike_steps(S: State, q: Key, k: Key, p: Key, v: Value, b: Scalar, g: Scalar, w: Key):
    b = 0.4 * sigmoid(b)
    old = S
    S = exp(g) * S + b * outer(k, v - k @ old)  # recalls the undecayed state
    S = S + outer(p, 0.3 * v - 0.3 * (p @ S)) + 0.2 * outer(k, v)
    S = exp(w) * S
    S = S - b * outer(p, k @ S)  # and the decayed one
    return S, q @ S


@cw.recurrence
def key_states(y: KeyState, z: KeyState, q: Key, k: Key, p: Key, v: Value, b: Scalar, g: Scalar):
    b = 0.4 * sigmoid(b)
    y, z = (
        exp(g) * y + b * (1 - dot(k, y)) * k - b * z,
        0.5 * z - b * dot(k, z) * p + k + b * y,
    )
    return (y, z), dot(q, y) * v + dot(q, z)


@cw.recurrence
def transposed(A: State, B: State, q: Key, k: Key, v: Value, u: Value, g: Scalar, s: Scalar):
    s = 0.4 * tanh(s)
    A, B = exp(g) * A + outer(0.3 * k - 0.3 * (A @ u), v) + s * B, 0.5 * B - s * A + outer(k, u)
    return (A, B), q @ A + q @ B


@cw.recurrence
def fed(A: State, B: State, W: State, q: Key, k: Key, v: Value, g: Scalar, s: Scalar):
    s = 0.4 * tanh(s)
    A, B = exp(g) * A - s * B + outer(k, v), s * A + 0.6 * B
    W = exp(g) * W + outer(k, tanh(q @ A) - 0.3 * (k @ W))
    return (A, B, W), q @ W + q @ B


RULES = {
    op.declaration.name: op
    for op in (
        *(cw.library.momentum_delta, turning, trapezoid, mini_batches, three_states),
        *(two_recalls, recalls_across, unlike_steps, key_states, transposed, fed),
    )
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], CASES[case], "eager")


@pytest.mark.parametrize("name", RULES)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], COMPILED["tvm"], "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", RULES)
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], COMPILED["triton"], "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True))


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("three_states", "unlike_steps")])
def test_proofs(name: str) -> None:
    assert len(prove(RULES[name].declaration).claims) >= 5


@pytest.mark.parametrize("op", [turning, trapezoid, cw.library.momentum_delta])
def test_segments_are_for_states_that_pass_alone(op: cw.Recurrence) -> None:
    assert transition_of(op.declaration.normal_form(), Dims(8, 8)) is None


@pytest.mark.parametrize("name", RULES)
def test_one_token(name: str) -> None:
    check_one_token(RULES[name])


def test_recalls_that_writes_share_are_solved_once() -> None:
    """Momentum writes to both states what one recall corrects."""
    for part in (
        chunk_program(cw.library.momentum_delta.declaration.normal_form()),
        chunk_adjoint(cw.library.momentum_delta.declaration.normal_form()),
    ):
        roots = [*(t for _, t in part.outputs), *(c.end for c in part.carried)]
        assert sum(t.op is TileOp.INVERSE for t in tile.topological(*roots)) == 1


def test_what_only_follows_costs_no_product_of_two_tiles() -> None:
    @cw.recurrence
    def follows(A: State, B: State, q: Key, k: Key, p: Key, v: Value):
        A, B = A + outer(k, v - k @ A), B + outer(p, v - p @ A - p @ B)
        return (A, B), q @ B

    body = chunk_program(follows.declaration.normal_form())
    below = tile.topological(*(c.end for c in body.carried))
    assert not any(t.op is TileOp.PRODUCT for t in below)
    assert sum(t.op is TileOp.INVERSE for t in below) == 2


# ---- special cases -------------------------------------------------------------------------------


def results(op: cw.Recurrence, x: dict[str, Tensor], initial: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and gradients of `x` and `initial`."""
    given = initial if len(initial) > 1 else initial[0]
    o, _ = op(**x, initial_state=given, engine="eager")
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    return [o, *torch.autograd.grad((o * weights).sum(), [*x.values(), *initial])]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gated() -> Inputs:
    return make_inputs(cw.library.gated_delta_rule, Sizes(T=C + 9, K=5, V=4, initial=True))


def test_momentum_without_momentum_is_the_gated_delta_rule() -> None:
    inputs = gated()
    q, k, v, g, beta = (leaf(x) for x in inputs.operands.values())
    (S,) = (leaf(x) for x in inputs.initial or ())
    x = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    want = results(cw.library.gated_delta_rule, x, (S,))
    ones, none = torch.ones_like(g), torch.full_like(g, -math.inf)
    o, _ = cw.library.momentum_delta(
        *(q, k, v, torch.exp(g)[..., None] * k, g, none, ones, beta),
        initial_state=(S, torch.zeros_like(S)),
        engine="eager",
    )
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    got = [o, *torch.autograd.grad((o * weights).sum(), [q, k, v, g, beta, S])]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@cw.recurrence
def both(A: State, B: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar, s: Scalar):
    A, B = (
        exp(g) * A + beta * outer(k, v - k @ (exp(g) * A)) + s * B,
        exp(g) * B + outer(k, v) - s * A,
    )
    return (A, B), q @ A + q @ B


def test_two_states_without_coupling_are_two_ops() -> None:
    inputs = gated()
    q, k, v, g, beta = (leaf(x) for x in inputs.operands.values())
    (S,) = (leaf(x) for x in inputs.initial or ())
    x = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    first = results(cw.library.gated_delta_rule, x, (S,))
    second = results(cw.library.simple_gla, {"q": q, "k": k, "v": v, "g": g}, (S,))
    got, _ = both(**x, s=torch.zeros_like(g), initial_state=(S, S), engine="eager")
    torch.testing.assert_close(got, first[0] + second[0])
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    ours = torch.autograd.grad((got * weights).sum(), [q, k, v, g, S])
    theirs = [first[n] + second[m] for n, m in ((1, 1), (2, 2), (3, 3), (4, 4), (6, 5))]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_turn_and_back_is_none() -> None:
    """States of which one is the other turned by a right angle: after four tokens as they were."""
    q, k = (torch.randn(1, 4, 1, 3, dtype=torch.float64) for _ in range(2))
    A, B = (torch.randn(1, 1, 3, 2, dtype=torch.float64) for _ in range(2))

    @cw.recurrence
    def right_angle(A: State, B: State, q: Key, k: Key, v: Value):
        A, B = 0 * A - B + outer(k, v), A + 0 * B
        return (A, B), q @ A

    v = torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    _, ends = right_angle(q, k, v, initial_state=(A, B), engine="eager", output_final_state=True)
    torch.testing.assert_close(ends, (A, B))


# ---- what is printed, and what is refused --------------------------------------------------------


def test_equations_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["emit", "momentum_delta", "--stage", "chunk"]) == 0
    assert "Σ_l" in capsys.readouterr().out


def test_gates_of_channels_do_not_mix() -> None:
    with pytest.raises(cw.errors.NoChunkForm, match="states that mix carry a gate per channel"):

        @cw.recurrence
        def channels(A: State, B: State, q: Key, k: Key, v: Value, g: Key, s: Scalar):
            A, B = exp(g) * A + s * B, B + outer(k, v)
            return (A, B), q @ A
