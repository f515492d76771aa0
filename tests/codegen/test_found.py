"""What the net has found: the smallest declarations, each right on every engine since."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.random_calls import Boundaries, Layout, Loss, Plan, Probe
from tests.random_draws import CALIBERS, Draw, Outcome, examine
from tests.random_rules import Rule

pytestmark = pytest.mark.usefixtures("short_chunks")

PLAN = Plan(
    B=2,
    T=19,
    lengths=None,
    H=1,
    group=2,
    K=4,
    V=5,
    micro=2,
    initial=(True,),
    wide_keys=(False, True),
    dtype=torch.float32,
    reset=None,
    resets=1,
    zeros=False,
    layouts=(Layout.PLAIN,),
    boundaries=Boundaries.INT,
    default_dtype=torch.float32,
    loss=Loss.BOTH,
    cotangents=Layout.PLAIN,
    check=True,
    probe=Probe.RUN,
    statics=False,
    seed=0,
)
STRANGE = {"k": "self", "v": "tl", "b": "torch", "g": "x_2"}

RESET = float("-inf")


def _matrix(*lines: str, names: dict[str, str] | None = None) -> Rule:
    return Rule(("S: State",), (*lines, "return S, o"), tuple((names or {}).items()))


def _vector(*lines: str) -> Rule:
    return Rule(("z_: KeyState",), (*lines, "return z_, o"))


# what divides is 0 where a sequence ends within a chunk
NORMS = replace(PLAN, T=37)

FOUND = {
    # the inverse applied to a vector had the gradient of one applied to a tile
    "a KeyState recalls, undecayed": (
        _vector("z_ = z_ + b * outer(k, s - k @ z_)", "o = dot(q, z_) * v"),
        PLAN,
    ),
    "a normaliser recalls under a decay": (
        _vector("z_ = exp(w) * z_", "z_ = z_ + b * outer(k, 1 - k @ z_)", "o = dot(q, z_) * v"),
        PLAN,
    ),
    "a scale divides by a norm": (
        _matrix("S = S + sigmoid(b) / dot(k, k) * outer(k, v - k @ S)", "o = q @ S"),
        NORMS,
    ),
    "an output divides by a norm": (
        _matrix("S = exp(g) * S + outer(k, v)", "o = (q @ S) / dot(q, q)"),
        NORMS,
    ),
    "a gate divides by a norm": (
        _matrix("S = sigmoid(b / dot(k, k)) * S + outer(k * rsqrt(dot(k, k)), v)", "o = q @ S"),
        NORMS,
    ),
    # `c / (h * s)` was printed `c / h * s`
    "a product divides": (
        _matrix("S = S + outer(k, c / (d * (1 + softplus(s))) * v)", "o = k @ S"),
        PLAN,
    ),
    "a square divides": (
        _matrix("S = clamp(sum(k) / dot(k, k) ** 2, 0.0, 1.0) * S + outer(k, v)", "o = k @ S"),
        PLAN,
    ),
    # the gradient of a solve of a vector
    "a KeyState recalls": (
        _vector(
            "z_ = exp(g) * z_",
            "z_ = z_ + sigmoid(b) * outer(l2norm(k), c - l2norm(k) @ z_)",
            "o = dot(q, z_) * v",
        ),
        PLAN,
    ),
    "a gate of -inf, checked": (
        _matrix("S = exp(g) * S + outer(k, v)", "o = k @ S"),
        replace(PLAN, reset=(RESET, 0.0), resets=8),
    ),
    # d exp(-w²) = -2 w times what must be 0
    "a gate that is steep where it is 0": (
        _matrix("S = exp(-(w ** 2)) * S + outer(k, v)", "o = k @ S"),
        replace(PLAN, reset=(-1e3, 0.0)),
    ),
    "strange names": (
        _matrix("S = exp(g) * S + outer(k, b * v)", "o = k @ S", names=STRANGE),
        PLAN,
    ),
    "a decay that is a number": (
        _matrix("S = 0.75 * exp(-scale) * S + tanh(0.3) * outer(k, v)", "o = k @ S"),
        PLAN,
    ),
    # channels beyond the last were summed, of a carry that was taken for zero there
    "neither factor is 0 in the padding": (
        _matrix("S = S + outer(k - 0.1 * sum(k), v)", "o = (dot(z, v) + q) @ S"),
        replace(PLAN, K=3),
    ),
    # dv is what another kernel stores, by another name
    "a value that is written as it is": (
        _matrix(
            "S = exp(g) * S",
            "S = S - 0.5 * outer(l2norm(k), l2norm(k) @ S) + outer(l2norm(k), v)",
            "o = q @ S",
        ),
        PLAN,
    ),
    "a branch that leaves operands unused": (
        _matrix(
            "S = exp(g) * S + outer(k, (c * scale * v * sum(p) if flag else 0.5 * v) + h)",
            "o = k @ S",
        ),
        replace(PLAN, statics=True),
    ),
    "one micro-step": (
        _matrix(
            "S = exp(g) * S",
            "for k_i, v_i in zip(ks, vs):",
            "    S = S + 0.5 * outer(l2norm(k_i), v_i - l2norm(k_i) @ S)",
            "o = k @ S * sum(v)",
        ),
        replace(PLAN, micro=1),
    ),
}


def _agrees(name: str, engine: str, plan: Plan) -> None:
    rule, _ = FOUND[name]
    verdict = examine(Draw(rule, plan), engine)
    assert verdict.outcome is Outcome.AGREED, f"{rule.source}{verdict.reason}\n{verdict.text}"


@pytest.mark.parametrize("dtype", CALIBERS["eager"].dtypes[1:], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_eager(name: str, dtype: torch.dtype) -> None:
    _agrees(name, "eager", replace(FOUND[name][1], dtype=dtype))


@pytest.mark.parametrize("name", FOUND)
def test_tvm(name: str) -> None:
    _agrees(name, "tvm", FOUND[name][1])


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", FOUND)
def test_triton(name: str) -> None:
    _agrees(name, "triton", FOUND[name][1])
