"""The TVM engine computes what was declared: every recurrence, gradient and feature, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise.autotune.cpu_spaces import PLANS
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.tir.config import spread
from chunkwise.dsl.library import all_declarations
from chunkwise.runtime.tvm import engine as tvm_engine

from tests.classes import by_class, costly, lowered
from tests.harness import Gates, Layout, Sizes, engine_results, make_inputs, oracle_results
from tests.tolerances import FLOAT32_HARD, Tolerance, assert_agree

LOWERED = [d.name for d in all_declarations() if lowered(d)]
C = tvm_engine.configuration().chunk
FLOAT32 = torch.float32
# everything at once: ragged and empty sequences, grouped heads, K != V, no whole vector, views
RICH = Sizes(HV=4, K=5, V=3, initial=True, dtype=FLOAT32, layout=Layout.VIEWS)
RICH = RICH.packed(0, C - 1, 1, C, 0, C + 1, 2)


def _check(name: str, sizes: Sizes, limit: Tolerance | torch.dtype = FLOAT32_HARD) -> None:
    op: cw.Recurrence = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    assert_agree(engine_results(op, inputs, "tvm"), oracle_results(op, inputs), limit)


@pytest.mark.parametrize("name", costly(LOWERED))
def test_every_recurrence(name: str) -> None:
    _check(name, RICH)


# K and V of RICH, so that nothing is compiled again
PLAIN = replace(RICH, B=2, T=19, lengths=None, layout=Layout.CONTIGUOUS)
VARIANTS = {
    "no token": replace(PLAIN, T=0),
    "one token": replace(PLAIN, T=1),
    "a chunk less one": replace(PLAIN, T=C - 1),
    "a chunk": replace(PLAIN, T=C),
    "a chunk and one": replace(PLAIN, T=C + 1),
    "no initial state": replace(PLAIN, initial=False),
    "a stride in the last axis": replace(PLAIN, layout=Layout.COPIED),
    "hard gates": replace(PLAIN, T=2 * C + 7, gates=Gates.HARD),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gated_delta_rule", "kda"])
def test_lengths_and_layouts(name: str, variant: str) -> None:
    _check(name, VARIANTS[variant])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Rounded when they are loaded and stored; float32 in between, and gates stay in float32."""
    sizes = Sizes(T=C + 3, HV=4, K=24, V=20, initial=True, dtype=dtype, gate_dtype=FLOAT32)
    _check("gated_delta_rule", sizes, dtype)


@pytest.mark.parametrize("channels", [(100, 20), (16, 64), (1, 1)])
def test_channels(channels: tuple[int, int]) -> None:
    """With and without a rest beside whole vectors and whole register tiles."""
    K, V = channels
    _check("delta_rule", Sizes(B=1, T=C + 2, K=K, V=V, initial=True, dtype=FLOAT32))


# V that has parts; the last chunk is not whole
FEW = Sizes(B=1, T=2 * C + 5, H=1, HV=1, K=8, V=32, initial=True, dtype=FLOAT32)


@pytest.mark.parametrize("name", by_class(LOWERED))
def test_calls_of_few_rows(name: str, set_threads: Callable[[int], None]) -> None:
    """Parts of the value axis on threads of their own, gradients in parallel over chunks."""
    set_threads(8)
    _check(name, FEW)


@pytest.mark.parametrize("plans", range(len(PLANS)))
@pytest.mark.parametrize("name", ["gated_delta_rule", "kda", "mlstm"])
def test_every_plan_that_may_be_tuned(
    name: str, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = PLANS[plans]
    config = replace(tvm_engine.configuration(), forward=forward, backward=backward, v_tile=16)
    monkeypatch.setattr(tvm_engine, "configuration", lambda: config)
    _check(name, replace(FEW, B=2))


def test_gradients_in_scans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans that are split along K, in another number of parts than those along V."""
    backward = Plan(Hoist.NOTHING, outputs_in_scan=True, scans_apart=True)
    config = replace(tvm_engine.configuration(), backward=backward, v_tile=16)
    monkeypatch.setattr(tvm_engine, "configuration", lambda: config)
    _check("linear_attention", replace(FEW, B=2, K=48))


def test_few_rows_are_spread_over_threads() -> None:
    """And those that were tuned for it stay as they are."""
    config = tvm_engine.configuration()
    for rows, tile, fused in ((8, 256, True), (4, 64, True), (2, 32, False), (1, 16, False)):
        made = spread(config, rows, 128, 8)
        assert (made.v_tile, made.backward.outputs_in_scan) == (tile, fused)
        assert spread(made, rows, 128, 8) == made
    assert spread(config, 1, 24, 8).v_tile == 256  # no parts of whole vectors
