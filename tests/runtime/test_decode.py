"""Decoding token by token is the call on the whole sequence."""

from __future__ import annotations

import weakref
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.dsl.ir import Per
from torch.utils._python_dispatch import TorchDispatchMode


def _token(op: cw.Recurrence, inputs: Any, t: int, *, keep_time: bool) -> dict[str, torch.Tensor]:
    """The operands of one token."""
    per_token = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    return {
        n: (x[:, t : t + 1] if keep_time else x[:, t]) if n in per_token else x
        for n, x in inputs.operands.items()
    }


@pytest.mark.parametrize("keep_time", [False, True], ids=["no T axis", "T = 1"])
@pytest.mark.parametrize(
    "rule",
    # a Key gate; a head operand and a read before; two states; micro-steps; run-time float
    ["kda", "rwkv6", "momentum_delta", "gated_delta_product", "linear_attention_normalised"],
)
def test_step_by_step(kit: Any, rule: str, keep_time: bool) -> None:
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(T=5, HV=4, K=3, V=4, initial=True))
    want, final = op(
        **inputs.operands, **inputs.options, engine="reference", output_final_state=True
    )
    state, outputs = inputs.options["initial_state"], []
    for t in range(5):
        o, state = op.step(**_token(op, inputs, t, keep_time=keep_time), state=state)
        outputs.append(o if not keep_time else o.squeeze(1))
        assert o.shape == ((2, 1, 4, 4) if keep_time else (2, 4, 4))
    torch.testing.assert_close(torch.stack(outputs, 1), want, rtol=1e-12, atol=1e-12)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (state, final)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


KERNELS = [
    pytest.param("tvm", "cpu", id="tvm"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("keep_time", [False, True], ids=["no T axis", "T = 1"])
@pytest.mark.parametrize(("engine", "device"), KERNELS)
@pytest.mark.parametrize(
    "rule",
    # states that kernels have no chunk form for; micro-steps; a head operand; two states
    ["gated_delta_rule", "oja", "momentum_delta", "gated_delta_product", "rwkv6", "mlstm"],
)
@torch.no_grad()
def test_kernels_step_by_step(
    kit: Any, rule: str, engine: str, device: str, keep_time: bool
) -> None:
    """K and V of whole vectors, and not: states are then taken where they lie, or copied."""
    op = getattr(cw.library, rule)
    for K, V in ((16, 8), (5, 3)):
        sizes = kit.Sizes(T=4, HV=4, K=K, V=V, initial=True, dtype=torch.float32, device=device)
        inputs = kit.make_inputs(op, sizes)
        want, final = op(
            **inputs.operands, **inputs.options, engine="reference", output_final_state=True
        )
        state, outputs = inputs.options["initial_state"], []
        for t in range(4):
            token = _token(op, inputs, t, keep_time=keep_time)
            o, state = op.step(**token, state=state, engine=engine)
            outputs.append(o if not keep_time else o.squeeze(1))
        torch.testing.assert_close(torch.stack(outputs, 1), want, rtol=1e-4, atol=1e-5)
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (state, final)), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_kernel_serves_layouts_as_they_come(kit: Any) -> None:
    """Strides, batches, states in half precision, none at all: each is a layout of its own."""
    op = cw.library.gated_delta_rule
    for B in (1, 3):
        x = kit.make_inputs(op, kit.Sizes(B=B, T=1, K=8, V=16, dtype=torch.float32)).operands
        token = {n: t[:, 0] for n, t in x.items()}
        strided = {**token, "k": token["k"].mT.contiguous().mT}
        none, _ = op.step(**token, engine="reference")
        for given in (token, strided):
            o, state = op.step(**given)
            torch.testing.assert_close(o, none, rtol=1e-5, atol=1e-6)
        half = state.half()
        want, _ = op.step(**token, state=half.float(), engine="reference")
        for given_state in (half, half.float()):
            o, _ = op.step(**token, state=given_state)
            torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-6)
        positional, _ = op.step(*token.values(), state=half)
        torch.testing.assert_close(positional, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["linear_attention_normalised", "momentum_delta"])
def test_no_state_is_a_state_of_zeros(kit: Any, rule: str) -> None:
    """Of several states too, given as None or not at all."""
    op = getattr(cw.library, rule)
    token = _token(op, kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)), 0, keep_time=False)
    want, states = op.step(**token, engine="reference")
    zeros = tuple(torch.zeros_like(x) for x in states)
    for given in (None, (None, None), zeros):
        got, _ = op.step(**token, state=given, engine="tvm")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_layouts_are_kept_and_tensors_are_not(kit: Any) -> None:
    op = cw.library.delta_rule
    sizes = kit.Sizes(T=1, K=11, V=13, dtype=torch.float32)
    token = _token(op, kit.make_inputs(op, sizes), 0, keep_time=False)
    _, state = op.step(**token)
    _, state = op.step(**token, state=state)
    kept = [weakref.ref(x) for x in (state, token["v"])]
    op.step(**token, state=state)
    del state, token
    assert [x() for x in kept] == [None, None]


# torch.func's own first import
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_see_torch(kit: Any) -> None:
    """torch.func and forward-mode gradients go through the step in torch."""
    op = cw.library.delta_rule
    token = _token(op, kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)), 0, keep_time=False)
    token = {n: x.detach() for n, x in token.items()}

    def output(v: torch.Tensor) -> torch.Tensor:
        return op.step(**{**token, "v": v})[0]

    with torch.no_grad():
        plain, slope = output(token["v"]), torch.ones_like(token["v"])
        _, tangent = torch.func.jvp(output, (token["v"],), (slope,))
        rise = output(token["v"] + slope) - plain  # the step is linear in v
        torch.testing.assert_close(tangent, rise, rtol=1e-4, atol=1e-5)
        many = torch.func.vmap(output)(token["v"].expand(3, *token["v"].shape))
        torch.testing.assert_close(many[2], plain, rtol=1e-5, atol=1e-6)


class _Seen(TorchDispatchMode):
    """Notes the ops that torch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_torch_sees_steps_of_a_known_layout_that_it_asks_for(kit: Any) -> None:
    """Torch's comparison of layouts knows of modes, transforms and recorded gradients."""
    op = cw.library.delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(T=1, HV=2, K=16, V=16, initial=True)).operands
    token = [x[:, 0].detach() for x in inputs.values()]
    state = torch.zeros(2, 2, 16, 16)
    name = op._ops.step.name()

    def step(x: list[torch.Tensor]) -> torch.Tensor:
        return op.step(*x, state=state)[0]

    want, recorded = step(token), [x.clone().requires_grad_() for x in token]
    with torch.no_grad():
        step(recorded)
    assert step(recorded).requires_grad
    with torch.no_grad():
        assert not step(recorded).requires_grad
    step(token)
    with _Seen() as seen:
        step(token)
    assert name in seen.names
    step(token)
    vmapped = torch.func.vmap(lambda scale: step(token) * scale)(torch.ones(3))
    torch.testing.assert_close(vmapped, want.expand(3, *want.shape))


def test_the_engine_of_calls_does_not_bind_steps(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)).operands
    token = {n: t[:, 0] for n, t in x.items()}
    monkeypatch.setenv("CHUNKWISE_ENGINE", "tvm")
    o, _ = op.step(**token)
    assert o.requires_grad


@torch.no_grad()
def test_a_state_that_becomes_anothers_old_value(kit: Any) -> None:
    """No kernel: each would overwrite what the other is to have."""

    @cw.recurrence(engine="reference")
    def delayed(
        S: cw.State, P: cw.State, q: cw.Key, k: cw.Key, v: cw.Value
    ) -> tuple[tuple[cw.State, cw.State], cw.Value]:
        return (S + cw.outer(k, v), S), q @ P

    q, k, v = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    states = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    _, new = delayed.step(q, k, v, state=states)
    torch.testing.assert_close(new[1], states[0])
    with pytest.raises(cw.errors.EngineUnavailable, match="becomes the old value"):
        delayed.step(q, k, v, state=states, engine="tvm")


def test_a_named_engine_without_a_kernel_for_the_step_says_so(kit: Any) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)).operands
    token = {n: t[:, 0] for n, t in x.items()}
    with pytest.raises(cw.errors.EngineUnavailable, match="no gradient of a single step"):
        op.step(**token, engine="tvm")
    double = {n: t.detach().double() for n, t in token.items()}
    with pytest.raises(cw.errors.EngineUnavailable, match="float64"):
        op.step(**double, engine="tvm")


def test_the_environment_names_the_engine(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)).operands
    token = {n: t[:, 0].detach() for n, t in x.items()}
    op.step(**token)
    monkeypatch.setenv("CHUNKWISE_ENGINE", "no such engine")
    with pytest.raises(cw.errors.EngineUnavailable, match="no such engine"):
        op.step(**token)


@torch.no_grad()
def test_a_step_can_be_compiled_by_torch(kit: Any) -> None:
    op = cw.library.delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)).operands
    token = {n: t[:, 0] for n, t in x.items()}
    compiled = torch.compile(lambda **t: op.step(**t)[0], backend="eager")
    torch.testing.assert_close(compiled(**token), op.step(**token)[0], rtol=1e-5, atol=1e-6)


def test_the_state_is_float32_whatever_the_token(kit: Any) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.bfloat16)).operands
    o, state = op.step(**{n: t[:, 0] for n, t in x.items()})
    assert o.dtype is torch.bfloat16
    assert state.dtype is torch.float32
    o, state = op.step(**{n: t[:, 0] for n, t in x.items()}, state=state.bfloat16())
    assert state.dtype is torch.float32


def test_gradients_flow_through_steps(kit: Any) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(T=3, initial=True))
    state, total = inputs.initial[0], 0.0
    for t in range(3):
        o, state = op.step(**{n: x[:, t] for n, x in inputs.operands.items()}, state=state)
        total = total + o.square().sum()
    leaves = list(inputs.leaves.values())
    got = torch.autograd.grad(total, leaves)
    o, _ = op(**inputs.operands, **inputs.options, engine="reference")
    for a, b in zip(got, torch.autograd.grad(o.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_mistakes(kit: Any) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=9)).operands
    with pytest.raises(cw.errors.BadShape, match="1 to 8 tokens"):
        op.step(**x)
    token = {n: t[:, 0] for n, t in x.items()}
    with pytest.raises(cw.errors.MissingOperand, match="beta"):
        op.step(*list(token.values())[:4])
    with pytest.raises(cw.errors.BadShape, match="'v'"):
        op.step(**{**token, "v": token["v"][..., 0]})
    with pytest.raises(cw.errors.BadShape, match=r"initial_state \(S\)"):
        op.step(**token, state=torch.zeros(1, 2, 8, 8))
