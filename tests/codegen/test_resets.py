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
from chunkwise.dsl import HeadScalar, Key, Scalar, State, Value, exp, outer
from chunkwise.dsl.ir import Kind
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan

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


@cw.recurrence
def rates(S: State, q: Key, k: Key, v: Value, dt: Scalar, A_log: HeadScalar):  # type: ignore[no-untyped-def]
    """A decay whose rate is the exponential of a number per head."""
    return exp(-exp(A_log) * dt) * S + outer(k, v), q @ S


# operands per head that forget at once in every token, and what they are
OF_HEADS = (
    (cw.library.retention, "g", -torch.inf),
    (cw.library.lightning_attention, "slope", torch.inf),
    (cw.library.mamba2, "A_log", 60.0),
    (cw.library.mamba2, "A_log", 86.0),
    (rates, "A_log", 80.0),
    (rates, "A_log", 86.0),
)


@pytest.mark.parametrize("engine", ["eager", "tvm"])
@pytest.mark.parametrize("T", [64, 37])
@pytest.mark.parametrize(
    ("op", "name", "value"), OF_HEADS, ids=[f"{x.__name__}-{v:g}" for x, _, v in OF_HEADS]
)
def test_heads_that_forget_at_once(
    op: cw.Recurrence, name: str, value: float, T: int, engine: str
) -> None:
    """One of two heads; what multiplies its gate's gradient is as large as the rate."""
    inputs = make_inputs(op, replace(DENSE, T=T))
    inputs.operands[name].data[0] = value
    if "dt" in inputs.operands:
        inputs.operands["dt"].data.abs_().add_(0.5)
    got, want = engine_results(op, inputs, engine), oracle_results(op, inputs)
    finite = {n for n, x in want.items() if x.isfinite().all()}  # d exp(x) at infinity is not
    assert finite >= want.keys() - {f"d{name}", "ddt", "ddt_bias"}
    assert_agree({n: got[n] for n in finite}, {n: want[n] for n in finite}, BY_DTYPE[torch.float32])


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
    monkeypatch.setattr(launch_plan, "torch", Poisoned())

    def configured(form: object) -> Config:
        return small(op.declaration.normal_form(op.declaration.default_micro))

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


def _after_a_reset(op: cw.Recurrence, engine: str, past: float) -> list[torch.Tensor]:
    """Output and final state from a reset of the second token on, and gradients from there on."""
    value = values_of(op)[0] if values_of(op)[0] == 0.0 else -torch.inf
    inputs = with_resets(op, replace(DENSE, HV=1), value, (1,))
    for x in op.declaration.operands:
        if x.kind is Kind.VALUE:
            inputs.operands[x.name].data[:, 0] *= past
    assert inputs.initial is not None
    inputs.initial[0].data.mul_(past)
    o, final = op(**inputs.operands, **inputs.options, engine=engine, output_final_state=True)
    v = inputs.operands["v"]
    (dv,) = torch.autograd.grad(o[:, 1:].square().sum() + final.sum(), v)
    return [o[:, 1:].detach(), final.detach(), dv[:, 1:], dv[:, :1]]


@pytest.mark.parametrize("engine", ["eager", "tvm"])
@pytest.mark.parametrize("name", ["simple_gla", "gla", "hgrn2", "scalar_factor"])
def test_what_is_forgotten_is_forgotten_exactly(name: str, engine: str) -> None:
    """Bit for bit the same, whatever was before; and no gradient goes back."""
    op = {x.__name__: x for x in (*LIBRARY, *SPELLINGS)}[name]
    one, other = (_after_a_reset(op, engine, past) for past in (1.0, 1e6))
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)
    assert not one[-1].any()


@pytest.mark.parametrize("engine", ["eager", "tvm"])
def test_a_gate_that_is_no_number_shows(engine: str) -> None:
    """NaN is not taken for a strong decay."""
    inputs = make_inputs(cw.library.simple_gla, replace(DENSE, initial=False))
    inputs.operands["g"].data[:, 40] = torch.nan
    o, _ = cw.library.simple_gla(**inputs.operands, engine=engine)
    assert o[:, 41:].isnan().all()
