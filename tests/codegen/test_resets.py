"""A decay of exactly 0, or as good as 0, forgets what came before and nothing else.

Prefix sums of logarithms lose the digits of every gate after such a one, and a factor's gradient
divides by the factor: outputs, states and all gradients are compared, in every spelling of a gate.
"""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Config
from chunkwise.runtime import launch, triton_engine

from tests.harness import Inputs, Sizes, engine_results, make_inputs, oracle_results
from tests.interpreted import Poisoned, served_under, small
from tests.resets import EIGHT, ONE, SPELLINGS, values_of, with_resets
from tests.tolerances import BY_DTYPE, assert_agree

LIBRARY = [
    getattr(cw.library, n)
    for n in (
        "simple_gla",
        "gla",
        "gated_delta_rule",
        "kda",
        "mamba2",
        "hgrn2",
        "comba",  # recalls before the decay
        "rwkv6",  # reads before the decay of a vector
        "mlstm",  # a normaliser under the same gate
        "gated_delta_product",
    )
]
CASES = [
    pytest.param(op, value, rows, id=f"{op.__name__}-{value:g}-x{len(rows)}")
    for op in (*LIBRARY, *SPELLINGS)
    for value in values_of(op)
    for rows in (ONE, EIGHT)
]
DENSE = Sizes(B=1, T=75, H=1, HV=2, K=6, V=5, initial=True, dtype=torch.float32)
PACKED = replace(DENSE, H=2, initial=True).packed(75, 0, 7, 66)


def _agree(op: cw.Recurrence, engine: str, inputs: Inputs, dtype: torch.dtype) -> None:
    want = oracle_results(op, inputs)
    assert all(x.isfinite().all() for x in want.values())
    assert_agree(engine_results(op, inputs, engine), want, BY_DTYPE[dtype])


@pytest.mark.parametrize("engine", ["eager", "tvm"])
@pytest.mark.parametrize(("op", "value", "rows"), CASES)
def test_resets(op: cw.Recurrence, value: float, rows: tuple[int, ...], engine: str) -> None:
    sizes = DENSE if rows is ONE else PACKED
    _agree(op, engine, with_resets(op, sizes, value, rows), torch.float32)


@pytest.mark.parametrize(("op", "value", "rows"), CASES)
def test_resets_in_float64(op: cw.Recurrence, value: float, rows: tuple[int, ...]) -> None:
    sizes = replace(PACKED, dtype=torch.float64)
    _agree(op, "eager", with_resets(op, sizes, value, rows), torch.float64)


INTERPRETED = [
    (op, values_of(op)[at])
    for op, at in [(x, -1) for x in LIBRARY if x.__name__ not in ("hgrn2", "mlstm")]
    + [(cw.library.hgrn2, 0), (cw.library.hgrn2, 2), *((x, 0) for x in SPELLINGS)]
]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("op", "value"), INTERPRETED, ids=[f"{op.__name__}-{value:g}" for op, value in INTERPRETED]
)
def test_resets_in_kernels(
    op: cw.Recurrence, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "torch", Poisoned())

    def configured(form: object) -> Config:
        return small(op.declaration.normal_form(2 if op.declaration.has_micro else 1))

    monkeypatch.setattr(triton_engine, "_compiled_for", served_under(configured))
    rows = (1, 2, 3, 9, 15, 16, 18)  # chunks of 16 tokens
    sizes = replace(DENSE, HV=1, initial=True).packed(21, 3)
    _agree(op, "triton", with_resets(op, sizes, value, rows), torch.float32)


@pytest.mark.parametrize("engine", ["eager", "tvm"])
@pytest.mark.parametrize("name", ["simple_gla", "kda"])
def test_a_gate_can_part_documents(name: str, engine: str) -> None:
    """One row with a reset where each document begins is the packed batch of the documents."""
    op = getattr(cw.library, name)
    packed = make_inputs(op, replace(DENSE, initial=False).packed(20, 30, 1, 40))
    in_a_row = packed.copied("cpu", torch.float32)
    in_a_row.cu_seqlens = None
    in_a_row.operands["g"].data[:, [20, 50, 51]] = -torch.inf
    results = []
    for inputs in (packed, in_a_row):
        o, _ = op(**inputs.operands, **inputs.options, engine=engine)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(0))
        grads = torch.autograd.grad(o, list(inputs.operands.values()), weights)
        results.append({"o": o.detach(), **dict(zip(inputs.operands, grads, strict=True))})
    assert_agree(results[1], results[0], torch.float32)


@pytest.mark.parametrize("engine", ["eager", "tvm"])
def test_a_gate_that_is_no_number_shows(engine: str) -> None:
    """NaN is not taken for a strong decay."""
    inputs = make_inputs(cw.library.simple_gla, replace(DENSE, initial=False))
    inputs.operands["g"].data[:, 40] = torch.nan
    o, _ = cw.library.simple_gla(**inputs.operands, engine=engine)
    assert o[:, 41:].isnan().all()
