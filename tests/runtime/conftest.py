"""What the runtime's tests share: the engines, inputs for any recurrence, and the comparison."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import chunkwise as cw
import pytest
import torch
from torch import Tensor

from tests import tolerances
from tests.harness import Inputs, Sizes, engine_results, make_inputs, oracle_results
from tests.tolerances import Tolerance


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine on a device, in the widest dtype that it computes in, and how exact that is."""

    name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10


_INTERPRETED = Engine("triton", "cpu", torch.float32, 1e-5)
_TRITON = Engine("triton", "cuda", torch.float32, 1e-4)  # tf32x3 products

# the one place where an engine joins the tests of this folder
ENGINES = (
    pytest.param(Engine("reference"), id="reference"),
    pytest.param(Engine("eager"), id="eager"),
    pytest.param(Engine("tvm", "cpu", torch.float32, 1e-5), id="tvm"),
    pytest.param(_INTERPRETED, id="triton-interpreted", marks=pytest.mark.interpreter),
    pytest.param(Engine("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(Engine("eager", "cuda"), id="eager-cuda", marks=pytest.mark.gpu),
    pytest.param(_TRITON, id="triton-cuda", marks=pytest.mark.gpu),
)


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """One tolerance for outputs, states and gradients alike."""
    tolerances.assert_agree(got, want, Tolerance(tolerance, tolerance, tolerance))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the interpreter what it runs elsewhere; other engines run it here."""
    out = [
        x
        for x in items
        if x.get_closest_marker("interpreted_elsewhere") and "triton-interpreted" in x.name
    ]
    config.hook.pytest_deselected(items=out)
    items[:] = [x for x in items if x not in out]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine in turn; `kit` then makes inputs for its device and dtype."""
    return str(request.param.name)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNKWISE_CHECK", "CHUNKWISE_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes seconds for a chunk of 64; codegen/test_interpreter.py has those."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from chunkwise.runtime.triton import engine as triton_engine

        from tests.interpreted import served_under, small

        monkeypatch.setattr(triton_engine, "_compiled_for", served_under(small))


@dataclass(frozen=True, slots=True)
class Kit:
    """What tests take from here (a test module cannot import another one by name)."""

    engine: Engine
    Sizes: Callable[..., Sizes]
    make_inputs: Callable[..., Inputs] = make_inputs
    oracle_results: Callable[[cw.Recurrence, Inputs], dict[str, Tensor]] = oracle_results
    engine_results: Callable[[cw.Recurrence, Inputs, str], dict[str, Tensor]] = engine_results
    assert_agree: Callable[[dict[str, Tensor], dict[str, Tensor], float], None] = assert_agree

    @property
    def tolerance(self) -> float:
        return self.engine.tolerance


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Kit:
    spec = getattr(request.node, "callspec", None)
    engine = None if spec is None else spec.params.get("engine")
    if not isinstance(engine, Engine):  # a test that names its engine itself
        engine = Engine("reference")
    return Kit(engine, partial(Sizes, dtype=engine.dtype, device=engine.device))
