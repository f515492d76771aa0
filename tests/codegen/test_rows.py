"""Reads between micro-steps, tuples whose entries meet in one row: tokens with several rows.

Every rule is the token loop on every engine; special cases are the rules that they should be.
"""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, KeyState, Scalar, State, Value, dot, exp, outer, sigmoid, tanh
from chunkwise.codegen import tile
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.prove import prove
from chunkwise.codegen.tile import TileOp
from chunkwise.dsl.normal_form import has_entries_apart
from chunkwise.runtime.call import bind
from chunkwise.runtime.micro_steps import by_entry
from torch import Tensor

from tests.codegen.forms import (
    CASES,
    COMPILED,
    check_engine,
    check_normal_form,
    check_one_token,
)
from tests.harness import Sizes, make_inputs


@cw.recurrence
def between(S: State, q: Key, k: Key, p: Key, v: Value, u: Value, b: Scalar, g: Scalar):
    """What a token recalls before its second write, as its output."""
    b = 0.4 * sigmoid(b)
    before = q @ S
    S = exp(g) * S + b * outer(k, v - k @ S)
    half = q @ S
    S = S + 0.3 * outer(p, u - p @ S)
    return S, before + half + q @ S


@cw.recurrence
def gated_between(S: State, z: KeyState, q: Key, k: Key, p: Key, v: Value, b: Scalar, g: Key):
    b = 0.4 * sigmoid(b)
    S = exp(g) * S + b * outer(k, v - k @ S)
    half = p @ S
    S = exp(0.5 * g) * S
    S = S - b * outer(p, k @ S)
    z = 0.9 * z + k
    return (S, z), (half + q @ S) / (1 + dot(q, z) ** 2)


@cw.recurrence
def window(S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], b: Scalar, g: Scalar):
    """The Omega rule: a gradient step on a window of tokens."""
    old, S = S, exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S - 0.4 * sigmoid(b) * outer(k_i, k_i @ old - v_i)
    return S, q @ S


@cw.recurrence
def mimo(
    S: State, q: tuple[Key, ...], k: tuple[Key, ...], v: tuple[Value, ...], w: tuple[Value, ...],
    g: Scalar,
):  # fmt: skip
    """Mamba-3's MIMO: n writes and n reads a token."""
    S = exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S + outer(k_i, v_i)
    o = w[0] * (q[0] @ S)
    for q_i, w_i in zip(q[1:], w[1:], strict=True):
        o = o + w_i * (q_i @ S)
    return S, o


@cw.recurrence
def products(
    S: State, q: tuple[Key, ...], k: tuple[Key, ...], v: tuple[Value, ...],
    b: tuple[Scalar, ...], g: Key,
):  # fmt: skip
    """Delta products, every one of which is read."""
    S, o = exp(g) * S, None
    for q_i, k_i, v_i, b_i in zip(q, k, v, b, strict=True):
        S = S + 0.4 * sigmoid(b_i) * outer(k_i, v_i - k_i @ S)
        o = q_i @ S if o is None else o + tanh(q_i @ S)
    return S, o


@cw.recurrence
def first_key(S: State, q: Key, ks: tuple[Key, ...], v: Value, c: tuple[Scalar, ...]):
    for k_i, c_i in zip(ks, c, strict=True):
        S = S + outer(k_i, dot(ks[0], k_i) * v + c_i)
    return S, q @ S


@cw.recurrence
def columns(S: State, x: Value, k: tuple[Value, ...], v: tuple[Key, ...], g: Value, b: Scalar):
    """A window along the other axis."""
    old, S = S, S * exp(g)
    for k_i, v_i in zip(k, v, strict=True):
        S = S + 0.3 * sigmoid(b) * outer(v_i - old @ k_i, k_i)
    return S, S @ x


@cw.recurrence
def feeds(A: State, S: State, q: Key, k: Key, v: Value, b: Scalar, g: Scalar):
    """A second memory of what the first recalls between its writes."""
    b = 0.4 * sigmoid(b)
    A = exp(g) * A + b * outer(k, v - k @ A)
    recalled = q @ A
    A = A - b * outer(q, q @ A)
    S = exp(g) * S + outer(k, tanh(recalled) - 0.3 * (k @ S))
    S = S + b * outer(q, v - q @ S)
    return (A, S), q @ S + k @ A


RULES = {
    op.declaration.name: op
    for op in (between, gated_between, window, mimo, products, first_key, columns, feeds)
}
MICRO = {"mimo": 3}
COSTLY = ("products", "gated_between", "feeds")  # minutes in the interpreter


def of_rule(name: str, sizes: Sizes) -> Sizes:
    return replace(sizes, micro=MICRO.get(name, 2))


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
@pytest.mark.parametrize("name", [n for n in RULES if n not in COSTLY])
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], of_rule(name, COMPILED["triton"]), "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True, micro=2))


@pytest.mark.parametrize("name", RULES)
def test_proofs(name: str) -> None:
    assert len(prove(RULES[name].declaration, 2).claims) >= 5


@pytest.mark.parametrize("name", RULES)
def test_one_token(name: str) -> None:
    check_one_token(RULES[name])


# ---- special cases -------------------------------------------------------------------------------


def results(op: cw.Recurrence, x: dict[str, Tensor]) -> list[Tensor]:
    """The output and gradients of `x`, those of one entry alone without its axis."""
    o, _ = op(**x, engine="eager")
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    grads = torch.autograd.grad((o * weights).sum(), list(x.values()))
    return [
        o,
        *(g.squeeze(2) if y.ndim == 5 else g for y, g in zip(x.values(), grads, strict=True)),
    ]


def entry(x: Tensor) -> Tensor:
    """A tuple of one."""
    return x.detach().unsqueeze(2).requires_grad_()


def test_one_write_and_one_read_are_an_ordinary_step() -> None:
    x = make_inputs(cw.library.simple_gla, CASES["not packed"]).operands
    ones = torch.ones_like(x["v"]).unsqueeze(2).requires_grad_()
    several = {n: entry(x[n]) for n in ("q", "k", "v")}
    got = results(mimo, {**several, "w": ones, "g": x["g"]})
    want = results(cw.library.simple_gla, x)
    for a, b in zip((*got[:4], got[5]), want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_of_one_is_a_delta_rule() -> None:
    @cw.recurrence
    def delta(S: State, q: Key, k: Key, v: Value, b: Scalar, g: Scalar):
        S = exp(g) * S + 0.4 * sigmoid(b) * outer(k, v - k @ S)
        return S, q @ S

    x = make_inputs(delta, CASES["not packed"]).operands
    got = results(window, {**x, "k": entry(x["k"]), "v": entry(x["v"])})
    for a, b in zip(got, results(delta, x), strict=True):
        torch.testing.assert_close(a, b)


def test_entries_are_views() -> None:
    """What is apart is not copied: kernels take each entry where the tuple has it."""
    x = make_inputs(mimo, Sizes(micro=3))
    call = bind(mimo.declaration, (), x.operands)
    made = by_entry(call).operands["k_at1"]
    assert made.untyped_storage().data_ptr() == x.operands["k"].untyped_storage().data_ptr()


def test_entries_of_their_own_micro_steps_are_rows() -> None:
    """A product of n delta rules is n rows of time, with one solve."""
    form = cw.library.delta_product.declaration.normal_form(3)
    assert len(form.micro_steps) == 3
    assert not has_entries_apart(form)
    roots = [c.end for c in chunk_program(form).carried]
    assert sum(t.op is TileOp.INVERSE for t in tile.topological(*roots)) == 1
