"""What a forward keeps for its backward: gradients, packed, in segments, compiled, checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Config, Dims
from chunkwise.codegen.plan import Hoist
from chunkwise.dsl import errors
from chunkwise.dsl.library import by_name
from chunkwise.runtime.call import Call
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.triton import engine as triton_engine
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.harness import Sizes, engine_results, make_inputs
from tests.tolerances import assert_agree

pytestmark = pytest.mark.interpreter
CHUNK = 16


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hoist], list[str]]:
    """Makes forwards of the Triton engine keep tiles; the names of the kernels launched."""

    def of(kinds: Hoist, chunk: int = CHUNK) -> list[str]:
        def config_for(call: Call) -> Config:
            own = triton_engine.configuration(call.form, Dims(call.K, call.V), call.dtype)
            return replace(own, chunk=chunk).saving(kinds)

        monkeypatch.setattr(triton_engine, "_config_for", config_for)
        Records.forget()
        launched: list[str] = []
        launch = triton_engine.LoadedKernel.launch

        def noted(loaded: Any, grid: Any, arguments: Any) -> Any:
            launched.append(loaded.kernel.name)
            return launch(loaded, grid, arguments)

        monkeypatch.setattr(triton_engine.LoadedKernel, "launch", noted)
        return launched

    yield of
    Records.forget()


def operands(name: str, T: int = 40) -> dict[str, Tensor]:
    torch.manual_seed(0)
    B, H, D = 1, 2, 16
    made: dict[str, Tensor] = {}
    for o in by_name(name).normal_form().operands:
        shape = (B, T, H) if o.name in ("g", "beta") and len(o.axes) == 3 else (B, T, H, D)
        x = torch.randn(shape)
        x = -x.abs() / 4 if o.name == "g" else x.sigmoid() if o.name == "beta" else x / 4
        made[o.name] = x.requires_grad_()
    return made


def gradients(name: str, engine: str, call: Callable[..., Any] | None = None, **more: Any) -> Any:
    given = operands(name)
    op = getattr(cw.library, name)

    def run(*xs: Tensor) -> Tensor:
        return op(*xs, engine=engine, **more)[0]

    o = (call(run) if call else run)(*given.values())
    o.square().sum().backward()
    return [o.detach(), *(x.grad for x in given.values())]


def agree(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["delta_rule", "kda"])
@pytest.mark.parametrize("kinds", [Hoist.SOLVES, Hoist.ALL])
def test_gradients(keeping: Callable[..., list[str]], name: str, kinds: Hoist) -> None:
    launched = keeping(kinds)
    agree(gradients(name, "triton"), gradients(name, "eager"))
    prepared = [n for n in launched if n.endswith("prep")]
    alone = name == "delta_rule" and kinds is Hoist.ALL  # the backward has nothing left to prepare
    assert prepared == ["forward_prep"] + ["backward_prep"] * (not alone)


def test_packed(keeping: Callable[..., list[str]]) -> None:
    keeping(Hoist.ALL)
    packed = torch.tensor([0, 7, 7, 24, 40])
    found = gradients("gated_delta_rule", "triton", cu_seqlens=packed)
    agree(found, gradients("gated_delta_rule", "eager", cu_seqlens=packed))


def test_micro_steps(keeping: Callable[..., list[str]]) -> None:
    """A tile has a row for each micro-step of a token."""
    keeping(Hoist.ALL)
    sizes = Sizes(H=1, HV=2, K=20, V=24, initial=True, dtype=torch.float32, micro=2)
    inputs = make_inputs(cw.library.delta_product, sizes.packed(7, 0, 17))
    found = engine_results(cw.library.delta_product, inputs, "triton")
    expected = engine_results(cw.library.delta_product, inputs, "eager")
    assert_agree(found, expected, torch.float32)


def test_segments(keeping: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = keeping(Hoist.ALL)
    monkeypatch.setattr(triton_engine, "segment_of", lambda *_: CHUNK)
    agree(gradients("gated_delta_rule", "triton"), gradients("gated_delta_rule", "eager"))
    assert "backward_states_matrices" in launched


def test_compiled(keeping: Callable[..., list[str]]) -> None:
    keeping(Hoist.ALL)

    def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(run, fullgraph=True, backend="aot_eager")

    found = gradients("delta_rule", "triton", compiled)
    agree(found, gradients("delta_rule", "eager"))


def test_computed_again(keeping: Callable[..., list[str]]) -> None:
    launched = keeping(Hoist.ALL)

    def again(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *xs: checkpoint(run, *xs, use_reentrant=False)

    agree(gradients("delta_rule", "triton", again), gradients("delta_rule", "eager"))
    assert launched.count("forward_prep") == 2


def test_nothing_is_kept_without_gradients(keeping: Callable[..., list[str]]) -> None:
    keeping(Hoist.ALL)
    given = operands("delta_rule")
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        cw.library.delta_rule(*given.values(), engine="triton")
    assert not any("_saving" in e.name for e in profile.events())


def test_another_chunk_later(keeping: Callable[..., list[str]]) -> None:
    """What is kept is an argument of both ops: a configuration found in between changes nothing."""
    keeping(Hoist.ALL)
    given = operands("delta_rule")
    o = cw.library.delta_rule(*given.values(), engine="triton")[0]
    keeping(Hoist.NOTHING, 2 * CHUNK)
    o.square().sum().backward()
    agree([o.detach(), *(x.grad for x in given.values())], gradients("delta_rule", "eager"))


def test_transforms(keeping: Callable[..., list[str]]) -> None:
    keeping(Hoist.ALL)
    given = [x.detach() for x in operands("delta_rule").values()]

    def loss(q: Tensor, engine: str) -> Tensor:
        return cw.library.delta_rule(q, *given[1:], engine=engine)[0].square().sum()

    found = torch.func.grad(loss)(given[0], "triton")
    agree([found], [torch.func.grad(loss)(given[0], "eager")])
    q = given[0].requires_grad_()
    (dq,) = torch.autograd.grad(loss(q, "triton"), q, create_graph=True)
    with pytest.raises(errors.DoubleBackward):
        dq.sum().backward()
