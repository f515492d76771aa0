"""Random legal steps: whatever is declared, the normal form computes the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from chunkwise.dsl import (
    Declaration,
    HeadScalar,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    exp,
    oracle,
    outer,
    sigmoid,
    softplus,
    tanh,
)
from chunkwise.dsl.ir import Kind, Per
from chunkwise.dsl.traced import Traced
from chunkwise.dsl.verify import verify_form, verify_step
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(frozen=True)
class Do:
    """One statement: what, with which of the keys and values, reading which earlier state."""

    what: str
    key: int
    other: int
    value: int
    read: int


WHATS = ["scalar", "vector", "constant", "write", "delta", "low rank", "scaled write", "difference"]
statements = st.builds(
    Do,
    st.sampled_from(WHATS),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(0, 4),
)
programs = st.lists(statements, min_size=1, max_size=5)


def apply(do: Do, seen: list[Traced], x: dict[str, list[Traced]], transposed: bool) -> Traced:
    """The state after one statement. `seen`: all states so far, the current one last."""
    S = seen[-1]
    X = seen[max(0, len(seen) - 1 - do.read)]
    k, b, v = x["k"][do.key], x["k"][do.other], x["v"][do.value]
    beta, g, w = x["s"][0], x["s"][1], x["w"][0]
    if do.what == "scalar":
        return exp(-softplus(g)) * S
    if do.what == "vector":
        return S * sigmoid(w)
    if do.what == "constant":
        return 0.75 * S
    if do.what == "write":
        return S + outer(k, v)
    if do.what == "scaled write":
        return S - outer(k * beta, v) / 3.0
    if do.what == "difference":
        return S + (outer(k, v) - outer(b, tanh(beta) * v)) * 0.5
    if do.what == "delta":
        if transposed:
            return S + outer(k - X @ v, beta * v)
        return S + beta * outer(k, v - k @ X)
    if transposed:
        return S + outer(X @ x["v"][1 - do.value], v)
    return S - outer(k, 0.3 * (b @ X))


def declared(
    program: list[Do], reads: list[tuple[int, int]], transposed: bool
) -> Callable[..., object]:
    def body(S: Traced, x: dict[str, list[Traced]]) -> tuple[Traced, Traced]:
        seen = [S]
        for do in program:
            seen.append(apply(do, seen, x, transposed))
        # every operand is used, so that none is refused as unused
        scalars = dot(x["k"][0], x["k"][1]) * dot(x["v"][0], x["v"][1]) * x["s"][0] * x["s"][1]
        o = x["v"][0] * scalars * dot(x["k"][2], x["k"][2]) * dot(x["w"][0], x["w"][0])
        S = seen[-1] + outer(x["k"][0], x["v"][0])
        # between two corrections of the keys, a read along the keys has no form: it is refused
        moments = [seen[0], S] if transposed else [*seen, S]
        for at, key in reads:
            state = moments[min(at, len(moments) - 1)]
            o = o + tanh(x["k"][key] @ (state + outer(x["k"][0], x["v"][1])))
        return S, o

    def rows(
        S: State, a: Key, b: Key, c: Key, u: Value, v: Value, w: Key, s: Scalar, t: HeadScalar
    ) -> object:
        return body(S, {"k": [a, b, c], "v": [u, v], "w": [w], "s": [s, t]})

    def columns(
        S: State, a: Key, b: Key, c: Key, u: Value, v: Value, w: Value, s: Scalar, t: HeadScalar
    ) -> object:
        return body(S, {"k": [a, b, c], "v": [u, v], "w": [w], "s": [s, t]})

    return columns if transposed else rows


def agree(d: Declaration) -> None:
    """Step and normal form, in float64: outputs and final states after three tokens."""
    step, form = d.step(), d.normal_form()
    verify_step(step)
    verify_form(form)
    generator = torch.Generator().manual_seed(0)
    shapes = {Kind.KEY: [3], Kind.VALUE: [2], Kind.SCALAR: []}

    def draw(*shape: int) -> torch.Tensor:
        return 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)

    operands = {
        o.name: draw(*([1, 3] if o.per is Per.TOKEN else []), 2, *shapes[o.kind])
        for o in d.operands
    }
    initial = [draw(1, 2, 3, *([2] if s.kind is Kind.STATE else [])) for s in d.states]
    o, finals = oracle.run(step, operands, {}, initial)
    again, finals_again = oracle.run(form, operands, {}, initial)
    torch.testing.assert_close(again, o, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(finals_again, finals, rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(programs, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=2))
def test_rows(program: list[Do], reads: list[tuple[int, int]]) -> None:
    agree(Declaration(declared(program, reads, transposed=False)))


@settings(max_examples=100, deadline=None)
@given(programs, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=2))
def test_columns(program: list[Do], reads: list[tuple[int, int]]) -> None:
    agree(Declaration(declared(program, reads, transposed=True)))


coupling = st.tuples(*[st.booleans()] * 4)


@settings(max_examples=60, deadline=None)
@given(programs, coupling)
def test_coupled_states(program: list[Do], flags: tuple[bool, bool, bool, bool]) -> None:
    """Two states that mix through scalars, recall each other, and a normaliser beside them."""
    mix_first, mix_last, recall, late = flags

    def step(
        S: State,
        M: State,
        z: KeyState,
        a: Key,
        b: Key,
        c: Key,
        u: Value,
        v: Value,
        s: Scalar,
        t: HeadScalar,
    ) -> object:
        x = {"k": [a, b, c], "v": [u, v], "w": [t], "s": [s, t]}
        M_old = M
        M = exp(-softplus(s)) * M + outer(c, v - (a @ S if recall else b @ M))
        seen = [S + 0.2 * M_old if mix_first else S]
        for do in program:
            seen.append(apply(do, seen, x, transposed=False))
        S = seen[-1] + (sigmoid(t) * M if mix_last else outer(a, u))
        if late:
            S = S + outer(b, u - b @ S)
        z = sigmoid(s) * z + t * c
        o = a @ S + b @ M + dot(a, b) * dot(u, v) * dot(c, z) * u
        return (S, M, z), o

    agree(Declaration(step))
