"""The Triton kernels on a GPU: dtypes, every plan, hard gates, large shapes; twice, bit for bit.

Run by `make test-gpu`; kernels compile for minutes, so give pytest as many workers as cores (-n).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.autotune import inputs as certificate_inputs
from chunkwise.autotune.inputs import Family
from chunkwise.codegen.config import Config, Dims
from chunkwise.codegen.plan import Plan
from chunkwise.codegen.programs import transition_of
from chunkwise.codegen.triton.fit import H100_SHARED, fit
from chunkwise.dsl import oracle
from chunkwise.dsl.library import all_declarations, by_name
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.call import Call
from chunkwise.runtime.triton import engine as triton_engine

from benchmarks import verify
from benchmarks.registry import CASES, SHAPES, cu_seqlens, draw
from tests.classes import CLASSES, lowered, plan_pairs
from tests.harness import Gates, Sizes, engine_results, make_inputs, oracle_results, wobbled
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, Tolerance, assert_agree

pytestmark = pytest.mark.gpu

NAMES = [d.name for d in all_declarations() if lowered(d)]


def _form(name: str) -> NormalForm:
    return by_name(name).normal_form(by_name(name).default_micro)


TOLERANCE = {**BY_DTYPE, torch.float32: FLOAT32_HARD}
GPU = Sizes(B=1, T=200, H=2, HV=4, K=128, V=128, initial=True, device="cuda")

CASES_BY_NAME = {
    # the tiles that tensor cores take, several chunks and an unfinished one
    "bfloat16": replace(GPU, dtype=torch.bfloat16, gate_dtype=torch.float32),
    "float16, K < V": replace(GPU, dtype=torch.float16, gate_dtype=torch.float32, K=64),
    # padded tiles; sequences that end at every position of a chunk
    "float32, packed, K = 100": replace(GPU, dtype=torch.float32, H=1, HV=2, K=100, V=100).packed(
        0, 63, 1, 65, 64, 7
    ),
    "bfloat16, K = V = 256": replace(GPU, dtype=torch.bfloat16, HV=2, K=256, V=256),
}


def _twice(name: str, sizes: Sizes, tolerance: Tolerance) -> None:
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    got = engine_results(op, inputs, "triton")
    want = oracle_results(op, inputs)
    near = oracle_results(op, wobbled(inputs)) if sizes.dtype.itemsize == 2 else want
    assert_agree(got, want, tolerance, near=near)
    again = engine_results(op, inputs, "triton")
    assert all(torch.equal(again[n], x) for n, x in got.items()), "two runs differ"


@pytest.mark.parametrize("case", CASES_BY_NAME)
@pytest.mark.parametrize("name", NAMES)
def test_library(name: str, case: str) -> None:
    sizes = CASES_BY_NAME[case]
    _twice(name, sizes, TOLERANCE[sizes.dtype])


@pytest.mark.parametrize("family", [Family.ORDINARY, Family.RAGGED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [d.name for d in all_declarations()])
@torch.no_grad()
def test_token_by_token(name: str, dtype: torch.dtype, family: Family) -> None:
    """The one kernel of the token form, also of what has no chunk form yet."""
    d = by_name(name)
    micro, dims = d.default_micro, Dims(100, 100)
    form = d.normal_form(micro)
    device = torch.device("cuda")
    call = certificate_inputs.draw(d, form, family, dims, dtype, device, tokens=200, micro=micro)
    o, finals = triton_engine.ENGINE.forward_by_token(call)
    again, _ = triton_engine.ENGINE.forward_by_token(call)
    assert torch.equal(o, again), "two runs differ"
    exact = {n: x.cpu().double() for n, x in call.operands.items()}
    initial = [None if x is None else x.cpu().double() for x in call.initial]
    bounds = None if call.cu_seqlens is None else call.cu_seqlens.cpu()
    want, last = oracle.run(call.step, exact, call.params, initial, bounds)
    got = {"o": o.cpu(), **{f"final {n}": x.cpu() for n, x in enumerate(finals)}}
    assert_agree(
        got, {"o": want, **{f"final {n}": x for n, x in enumerate(last)}}, TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_hard_gates(name: str, dtype: torch.dtype) -> None:
    """Gates to -20 per token mixed with gates near 0, steps to 2, keys that repeat."""
    op = getattr(cw.library, name)
    sizes = replace(GPU, dtype=dtype, gate_dtype=torch.float32, gates=Gates.HARD)
    inputs = make_inputs(op, sizes)
    got = engine_results(op, inputs, "triton")
    assert all(x.isfinite().all() for x in got.values())
    if dtype is torch.float32:
        assert_agree(got, oracle_results(op, inputs), FLOAT32_HARD)


PLANNED = [(name, n, plans) for name in CLASSES for n, plans in plan_pairs(name)]


@pytest.mark.parametrize(
    ("name", "plans"),
    [(name, plans) for name, _, plans in PLANNED],
    ids=[f"{name}-{n}" for name, n, _ in PLANNED],
)
def test_every_plan(name: str, plans: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = plans

    def compiled_for(call: Call) -> Any:
        dims = Dims(call.K, call.V)
        usual = triton_engine.configuration(call.form, dims, call.dtype)
        config = Config(usual.chunk, forward, backward, usual.default, usual.kernels)
        fitted = fit(call.form, config, dims, call.dtype.itemsize, H100_SHARED)
        dtypes = tuple((n, x.dtype) for n, x in call.operands.items())
        return triton_engine.compile_with(call.form, dims, call.dtype, dtypes, fitted)

    monkeypatch.setattr(triton_engine, "_compiled_for", compiled_for)
    _twice(name, CASES_BY_NAME["float16, K < V"], BY_DTYPE[torch.float16])


@pytest.mark.parametrize("case", CASES_BY_NAME)
@pytest.mark.parametrize("name", [n for n in NAMES if transition_of(_form(n), Dims(128, 128))])
@pytest.mark.usefixtures("in_segments")
def test_segments(name: str, case: str) -> None:
    """Scans of segments of one chunk (two, of short chunks), where a sequence has four."""
    sizes = CASES_BY_NAME[case]
    _twice(name, sizes, TOLERANCE[sizes.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["delta_rule", "kda", "simple_gla"])
@pytest.mark.usefixtures("in_segments")
def test_a_state_that_nothing_forgets_passes_many_segments(name: str, dtype: torch.dtype) -> None:
    """64 of them; what each loses of the state that arrives, the next would lose again."""
    sizes = replace(GPU, T=4096, H=1, HV=1, K=64, V=64, dtype=dtype, gate_dtype=torch.float32)
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    for gate in {"beta", "g"}.intersection(inputs.operands):
        inputs.operands[gate].data.mul_(1e-3 if gate == "beta" else 1e-5)
    want = oracle_results(op, inputs)
    near = oracle_results(op, wobbled(inputs))
    assert_agree(engine_results(op, inputs, "triton"), want, TOLERANCE[dtype], near=near)


LARGE = (
    *("linear_attention", "retention", "simple_gla", "delta_rule", "gated_delta_rule"),
    *("gla", "kda", "dplr"),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["B", "C", "F", "D", "P6"])
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes(name: str, shape: str, dtype: torch.dtype) -> None:
    """A fixed sample of (batch, head) pairs against the token loop (mathematics, numerics 8).

    One or two workers at a time: more token loops do not fit a GPU beside one another.
    """
    case, at, device = CASES[name], SHAPES[shape], torch.device("cuda")
    op = cw.Recurrence(by_name(name))
    operands = draw(case, at, dtype, device, seed=0)
    packed = cu_seqlens(at, device)
    do = torch.randn_like(operands["v"])
    pairs = verify.sample(case, at)
    expected = verify.oracle(op, case, operands, do, packed, pairs)
    values = tuple(operands.values())
    side = verify.Side(lambda: op(*values, cu_seqlens=packed)[0], operands, operands)
    errors = verify.compare(side, case, do, expected, pairs)
    assert all(e.ok for e in errors), "; ".join(map(str, errors))
