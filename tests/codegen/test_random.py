"""Random recurrences of the lowered classes: every engine computes what was declared.

`pytest --hypothesis-profile=audit` draws thousands of new ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chunkwise.dsl import oracle
from chunkwise.runtime import eager_engine, triton_engine, tvm_engine
from chunkwise.runtime.call import Call, bind
from hypothesis import HealthCheck, assume, given, note, settings
from torch import Tensor

from tests.interpreted import served_under, small
from tests.random_rules import Rule, Shape, operands_of, rules, shapes
from tests.tolerances import FLOAT32_HARD, FLOAT64_RANDOM, Tolerance, assert_agree

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def _examples(usual: int) -> settings:
    """As many as the profile draws more than Hypothesis does by itself."""
    factor = max(1, settings().max_examples // 100)
    return settings(max_examples=usual * factor, suppress_health_check=SLOW)


def _check(rule: Rule, shape: Shape, engine: Any, dtype: torch.dtype, limit: Tolerance) -> None:
    """Outputs, final states and every gradient against the token loop in float64."""
    note(rule.source)
    # one channel normalised is its sign: of its gradient, 0, float32 has what rounding leaves
    assume(dtype is torch.float64 or shape.K > 1 or "l2norm" not in rule.source)
    d = rule.declare()
    operands, initial, bounds = operands_of(d, shape, dtype)
    call = bind(d, (), operands, initial_state=initial, cu_seqlens=bounds)
    o, finals = engine.forward(call)
    random = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=random, dtype=torch.float64) for y in (o, *finals)]
    gradients, starts = engine.backward(
        call, weights[0].to(o), tuple(w.to(y) for w, y in zip(weights[1:], finals, strict=True))
    )
    got = {"o": o, **_numbered("final", finals)}
    got |= {f"d{n}": g for n, g in gradients.items()}
    got |= _numbered("dinitial", starts)
    want = _by_the_oracle(call, [w.to(dtype).double() for w in weights])
    assert_agree(_detached(got), want, limit)


def _by_the_oracle(call: Call, weights: list[Tensor]) -> dict[str, Tensor]:
    operands = {n: x.detach().double().requires_grad_() for n, x in call.operands.items()}
    initial = [None if x is None else x.detach().double().requires_grad_() for x in call.initial]
    o, finals = oracle.run(call.step, operands, call.params, initial, call.cu_seqlens)
    leaves = {f"d{n}": x for n, x in operands.items()} | _numbered("dinitial", initial)
    outputs = [(y, w) for y, w in zip((o, *finals), weights, strict=True) if y.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if outputs:
        ys, ws = zip(*outputs, strict=True)
        found = torch.autograd.grad(ys, list(leaves.values()), ws, allow_unused=True)
    grads = {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return _detached({"o": o, **_numbered("final", finals), **grads})


def _numbered(name: str, tensors: Any) -> dict[str, Tensor]:
    return {f"{name} {n}": x for n, x in enumerate(tensors) if x is not None}


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.detach() for n, x in tensors.items()}


eagerly = _examples(120)


@eagerly
@given(rules(low_rank=False), shapes(around=32, longest=66))
def test_additive_rules(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, eager_engine, torch.float64, FLOAT64_RANDOM)


@eagerly
@given(rules(low_rank=True, vector=False), shapes(around=32, longest=66))
def test_corrections_with_a_scalar_decay(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, eager_engine, torch.float64, FLOAT64_RANDOM)


@eagerly
@given(rules(low_rank=True, vector=True), shapes(around=32, longest=66))
def test_corrections_with_a_vector_decay(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, eager_engine, torch.float64, FLOAT64_RANDOM)


compiled = _examples(10)  # each is compiled: seconds


@compiled
@given(rules(low_rank=False), shapes(around=32, longest=66))
def test_compiled_additive_rules(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, tvm_engine, torch.float32, FLOAT32_HARD)


@compiled
@given(rules(low_rank=True), shapes(around=32, longest=66))
def test_compiled_corrections(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, tvm_engine, torch.float32, FLOAT32_HARD)


@pytest.fixture(scope="module", params=[0, 16], ids=["", "in segments"])
def small_chunks(request: pytest.FixtureRequest) -> Any:
    """The Triton engine on chunks of 16; on segments of one chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_engine, "_compiled_for", served_under(small, request.param))
        yield


interpreted = _examples(8)  # twice


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_chunks")
@interpreted
@given(rules(low_rank=False), shapes(around=16, longest=35))
def test_kernels_of_additive_rules(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, triton_engine, torch.float32, FLOAT32_HARD)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_chunks")
@interpreted
@given(rules(low_rank=True), shapes(around=16, longest=35))
def test_kernels_of_corrections(rule: Rule, shape: Shape) -> None:
    _check(rule, shape, triton_engine, torch.float32, FLOAT32_HARD)
