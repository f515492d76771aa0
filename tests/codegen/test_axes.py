"""Either axis of a state may decay, be recalled and be read: one form, with its axes exchanged.

Recurrences of the literature that need this are compared with loops that know nothing of states.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, KeyState, Scalar, State, Value, dot, exp, outer, sigmoid, within
from chunkwise.codegen.programs import chunk_adjoint, chunk_program
from chunkwise.codegen.prove import prove
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.errors import ChunkwiseError
from chunkwise.runtime.recurrence import Recurrence
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from tests.harness import Sizes, engine_results, make_inputs, oracle_results
from tests.interpreted import Poisoned, served_under, small
from tests.mirror import mirror
from tests.random_rules import Pick, rule
from tests.tolerances import FLOAT32_HARD, FLOAT64_RANDOM, assert_agree

B, T, H, HV, K, V = 2, 70, 1, 2, 5, 3  # the eager engine's chunks have 64 tokens
LENGTHS = (0, 9, 64, 65, 2)


@cw.recurrence
def mirrored_kda(S: State, q: Value, k: Value, v: Key, g: Value, beta: Scalar):
    S = S * exp(g)
    S = S + beta * outer(v - S @ k, k)
    return S, S @ q


hgrn, rwkv4 = cw.library.hgrn, cw.library.rwkv4


@cw.recurrence
def slots(S: State, s: Key, g: Key, k: Value, q: Value):
    S = exp(g) * S + outer(s, k)
    return S, S @ q


@cw.recurrence
def either(S: State, x: Value, k: Key, p: Key, v: Value, f: Key, beta: Scalar):
    before = S @ x
    S = within(f, 0.0, 1.0) * S
    S = S + beta * outer(k, v - k @ S)
    return S, sigmoid(p) * (S @ x) + before


@cw.recurrence
def scalars(S: State, z: KeyState, q: Key, k: Key, v: Value, g: Scalar):
    S = exp(g) * S + outer(k, v)
    z = exp(g) * z + k
    return (S, z), dot(q, z)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_delta_rule_on_the_other_axis_has_the_same_chunk() -> None:
    theirs, ours = cw.library.kda.declaration.normal_form(), mirrored_kda.declaration.normal_form()
    assert (theirs.transposed, ours.transposed) == (False, True)
    assert chunk_program(ours).outputs == chunk_program(theirs).outputs
    assert chunk_program(ours).carried == chunk_program(theirs).carried
    assert chunk_adjoint(ours).outputs == chunk_adjoint(theirs).outputs


@pytest.mark.parametrize("packed", [False, True])
def test_the_delta_rule_on_the_other_axis_has_the_same_numbers(packed: bool) -> None:
    tokens = sum(LENGTHS) if packed else T
    batch = 1 if packed else B
    cu = torch.tensor([0, *LENGTHS]).cumsum(0) if packed else None
    q, k = randn(batch, tokens, HV, K), normalize(randn(batch, tokens, HV, K, seed=1), dim=-1)
    v, beta = randn(batch, tokens, HV, V, seed=2), randn(batch, tokens, HV, seed=3).sigmoid()
    g = -randn(batch, tokens, HV, K, seed=4).abs()
    S = randn(len(LENGTHS) if packed else B, HV, K, V, seed=5)
    given = [x.requires_grad_() for x in (q, k, v, g, beta, S)]
    results = []
    for op in (cw.library.kda, mirrored_kda):
        exchanged = op is mirrored_kda
        *operands, start = given
        o, end = op(
            *operands,
            initial_state=start.mT if exchanged else start,
            output_final_state=True,
            cu_seqlens=cu,
            engine="eager",
        )
        end = end.mT if exchanged else end
        gradients = torch.autograd.grad(o.sin().sum() + end.cos().sum(), given)
        results.append((o, end, *gradients))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


def _random_source(seed: int) -> str:
    numbers = random.Random(seed)
    pick: Pick = lambda options: options[numbers.randrange(len(options))]  # noqa: E731
    drawn = rule(pick)
    return "" if any("KeyState" in s for s in drawn.states) else drawn.source


def _declared(source: str) -> cw.Recurrence:
    names: dict[str, object] = {n: getattr(cw.dsl, n) for n in cw.dsl.__all__}
    exec(source, names)
    function = names["rule"]
    assert callable(function)
    return Recurrence(Declaration(function))


@pytest.mark.parametrize("first", [0, 60])
def test_exchanged_axes(first: int) -> None:
    """Random recurrences and what they are with Keys and Values exchanged; twice is itself."""
    compared = 0
    for source in filter(None, map(_random_source, range(first, first + 60))):
        other = mirror(source)
        assert mirror(other) == ast.unparse(ast.parse(source)) + "\n"
        try:
            ours, theirs = map(_declared, (source, other))
            inputs = make_inputs(ours, Sizes(T=19, K=3, V=4, initial=True))
            assert inputs.initial is not None
            turned = replace(inputs, initial=tuple(x.mT for x in inputs.initial if x is not None))
            (o, ends), (p, turned_ends) = (
                op(**x.operands, **x.options, output_final_state=True, engine="eager")
                for op, x in ((ours, inputs), (theirs, turned))
            )
        except ChunkwiseError:
            continue
        compared += 1
        torch.testing.assert_close(o, p, rtol=1e-9, atol=1e-9, equal_nan=True)
        both = (e if isinstance(e, tuple) else (e,) for e in (ends, turned_ends))
        for x, y in zip(*both, strict=True):
            torch.testing.assert_close(x, y.mT, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert compared > 20


OPS = {op.declaration.name: op for op in (mirrored_kda, hgrn, slots, either, scalars)}
# two tiles of V, or of K; sequences end within chunks, at their ends, and before they begin
RICH = Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float32).packed(0, 15, 17)
TALL = Sizes(B=2, T=33, H=2, HV=2, K=19, V=4, initial=True, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [RICH, TALL], ids=["packed", "dense"])
@pytest.mark.parametrize("name", OPS)
def test_eager(name: str, sizes: Sizes) -> None:
    inputs = make_inputs(OPS[name], replace(sizes, dtype=torch.float64))
    assert_agree(
        engine_results(OPS[name], inputs, "eager"),
        oracle_results(OPS[name], inputs),
        FLOAT64_RANDOM,
    )


@pytest.mark.parametrize("sizes", [RICH, TALL], ids=["packed", "dense"])
@pytest.mark.parametrize("name", OPS)
def test_tvm(name: str, sizes: Sizes) -> None:
    pytest.importorskip("tvm")
    inputs = make_inputs(OPS[name], sizes)
    assert_agree(
        engine_results(OPS[name], inputs, "tvm"), oracle_results(OPS[name], inputs), FLOAT32_HARD
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [RICH, TALL], ids=["packed", "dense"])
@pytest.mark.parametrize("name", OPS)
def test_triton(name: str, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_plan, "torch", Poisoned())
    monkeypatch.setattr(triton_engine, "_compiled_for", served_under(small))
    inputs = make_inputs(OPS[name], sizes)
    assert_agree(
        engine_results(OPS[name], inputs, "triton"), oracle_results(OPS[name], inputs), FLOAT32_HARD
    )


# ---- recurrences of the literature, by loops over their own quantities ---------------------------


def _by_hgrn(one: Tensor, z: Tensor, h: Tensor, engine: str) -> tuple[Tensor, object]:
    return hgrn(one, z.sigmoid() * h, logsigmoid(-z), engine=engine)


def _minimal_gru(one: Tensor, z: Tensor, h: Tensor) -> Tensor:
    """minGRU (Feng et al. 2024), h_t = (1 - z) h_t-1 + z h~."""
    state, outputs = torch.zeros_like(h[:, 0]), []
    for t in range(h.shape[1]):
        gate = z[:, t].sigmoid()
        state = (1 - gate) * state + gate * h[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1)


def _rwkv4(one: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """wkv of RWKV-4 (Peng et al. 2023), as the sums that define it."""
    outputs = []
    for t in range(k.shape[1]):
        weights = [k[:, i] - (t - 1 - i) * w.exp() for i in range(t)]
        weights = torch.stack([*weights, u + k[:, t]], 1).exp()
        outputs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    return torch.stack(outputs, 1)


def _slots(s: Tensor, g: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """The scores of gated slot attention (Zhang et al. 2024): queries with keys kept in slots."""
    keys = torch.zeros(*s.shape[:1], *s.shape[2:], k.shape[-1], dtype=s.dtype)
    outputs = []
    for t in range(s.shape[1]):
        keys = g[:, t].exp()[..., None] * keys + s[:, t][..., None] * k[:, t][..., None, :]
        outputs.append((keys * q[:, t][..., None, :]).sum(-1))
    return torch.stack(outputs, 1)


def _gated_oja(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Oja's rule (Irie et al. 2022) with a gate per column, W kept as it is written: [V, K]."""
    W = torch.zeros(*k.shape[:1], *v.shape[2:], k.shape[-1], dtype=k.dtype)
    outputs = []
    for t in range(k.shape[1]):
        W = g[:, t].exp()[..., None] * W
        error = k[:, t] - (W * v[:, t][..., None]).sum(-2)
        W = W + beta[:, t][..., None, None] * v[:, t][..., None] * error[..., None, :]
        outputs.append((W * q[:, t][..., None, :]).sum(-1))
    return torch.stack(outputs, 1)


def _of_channels(*seeds: int) -> list[Tensor]:
    return [randn(B, T, HV, V, seed=seed) for seed in seeds]


ONE = torch.ones(B, T, HV, 1, dtype=torch.float64)
LITERATURE: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], list[Tensor]]] = {
    "minGRU": (_by_hgrn, _minimal_gru, [ONE, *_of_channels(0, 1)]),
    "RWKV-4": (
        rwkv4,
        _rwkv4,
        [ONE, *_of_channels(1, 2), randn(HV, V), randn(HV, V, seed=3)],
    ),
    "slots": (
        slots,
        _slots,
        [randn(B, T, HV, K), -randn(B, T, HV, K, seed=1).abs(), *_of_channels(2, 3)],
    ),
    "gated Oja": (
        cw.library.oja,
        _gated_oja,
        [
            randn(B, T, HV, K),
            randn(B, T, HV, K, seed=1),
            normalize(randn(B, T, HV, V, seed=2), dim=-1),
            -randn(B, T, HV, V, seed=3).abs(),
            randn(B, T, HV, seed=4).sigmoid(),
        ],
    ),
}


@pytest.mark.parametrize("name", LITERATURE)
def test_the_literature(name: str) -> None:
    op, loop, operands = LITERATURE[name]
    leaves = [x.clone().requires_grad_() for x in operands]
    want = loop(*leaves)
    got, _ = op(*leaves, engine="eager")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    used = leaves[1:] if operands[0] is ONE else leaves
    weights = randn(*want.shape, seed=9)
    theirs, ours = (torch.autograd.grad((x * weights).sum(), used) for x in (want, got))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "op", [mirrored_kda, rwkv4, slots, either], ids=lambda op: op.declaration.name
)
def test_proofs(op: cw.Recurrence) -> None:
    assert prove(op.declaration, chunk=2).left_out == ()
