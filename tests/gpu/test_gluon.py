"""Scans in Gluon on a Hopper GPU: against the token loop, and what serves calls they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Config, Dims, KernelConfig
from chunkwise.codegen.gluon.emit import in_gluon
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.tile import TileOp
from chunkwise.runtime.call import Call
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton.launch_plan import LaunchPlan
from torch import Tensor

from benchmarks import verify
from benchmarks.registry import CASES, SHAPES, Shape, draw
from tests.harness import Layout, Sizes, engine_results, make_inputs, oracle_results, wobbled
from tests.tolerances import BY_DTYPE, assert_agree

VECTOR_GATED = ["gla", "kda"]
NAMES = ["linear_attention", "simple_gla", "retention", "delta_rule", "gated_delta_rule"]
NAMES += VECTOR_GATED
SCANS = {"forward_scan", "backward_states", "backward_reverse"}
OF_LINEAR = {"forward_scan"}
OF_LINEAR |= {f"backward_{n}" for n in ("forward_rows", "reverse_rows", "reverse_columns")}
TILES = [(64, 2), (128, 2), (64, 1), (64, 3)]  # values of a state, and stages
CHUNKS = {
    "backward_gradients": KernelConfig(64, 8, 3),
    **dict.fromkeys(("forward_prep", "backward_prep"), KernelConfig(64, 4, 1)),
}
CHUNKS_OF_VECTOR_GATES = dict.fromkeys(
    (*CHUNKS, "backward_sums", "backward_values"), KernelConfig(64, 8, 3)
)
SIZES = Sizes(B=2, T=256, H=1, HV=2, K=128, V=128, initial=True, device="cuda")
SIZES = replace(SIZES, dtype=torch.bfloat16, gate_dtype=torch.float32)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the kernels are Hopper's",
    ),
]


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Has calls take scans in Gluon with these tiles and stages; what was launched so."""
    v_tile, stages, *rest = getattr(request, "param", (64, 2))
    chunk = rest[0] if rest else 64
    found: list[str] = []

    def config_for(call: Call) -> Config:
        dims = Dims(call.K, call.V)
        default = triton_engine.configuration(call.form, dims, call.dtype)
        own = KernelConfig(v_tile, v_tile // 16, stages)
        default = replace(default, chunk=chunk)
        chunks = CHUNKS if (v_tile, stages, chunk) == (64, 3, 64) else {}
        if call.form.name in VECTOR_GATED and chunk == 64:
            chunks = CHUNKS_OF_VECTOR_GATES  # Triton's decays are slow in chunks of 64
        return in_gluon(call.form, default, own, chunks=chunks)

    run = LaunchPlan.run

    def noted(plan: LaunchPlan, tensors: list[Any]) -> None:
        pointers = [x.data_ptr() for x in tensors if isinstance(x, Tensor)]
        if not any(p % 16 for p in pointers):
            found.extend(x.loaded.kernel.name for x in plan.launches if x.blocks)
        run(plan, tensors)

    monkeypatch.setattr(triton_engine, "_config_for", config_for)
    monkeypatch.setattr(LaunchPlan, "run", noted)
    Records.forget()
    yield found
    Records.forget()


def _check(name: str, sizes: Sizes) -> None:
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    got = engine_results(op, inputs, "triton")
    near = oracle_results(op, wobbled(inputs))
    assert_agree(got, oracle_results(op, inputs), BY_DTYPE[torch.bfloat16], near=near)
    for _ in range(3):
        again = engine_results(op, inputs, "triton")
        assert all(torch.equal(again[n], x) for n, x in got.items()), "two runs differ"


@pytest.mark.parametrize("K", [64, 128], ids="K{}".format)
@pytest.mark.parametrize("served", TILES, indirect=True, ids=(f"BV{v}s{s}" for v, s in TILES))
@pytest.mark.parametrize("name", NAMES)
def test_agreement(name: str, K: int, served: list[str]) -> None:
    """Given and last states, groups of heads, output and all gradients; four times, bit for bit."""
    _check(name, replace(SIZES, K=K))
    wanted = OF_LINEAR if name == "linear_attention" else SCANS
    narrow = {n for n in wanted if n.endswith("_rows")} if K == 64 else set()  # of 128: Triton's
    assert wanted - narrow <= {*served} - {*CHUNKS_OF_VECTOR_GATES} <= wanted


@pytest.mark.parametrize("served", [(64, 3)], indirect=True)
@pytest.mark.parametrize("K", [64, 128], ids="K{}".format)
@pytest.mark.parametrize("name", NAMES[1:])
def test_kernels_parallel_over_chunks(name: str, K: int, served: list[str]) -> None:
    """More chunks than multiprocessors, so that programs take several; heads that are shared."""
    low = name in VECTOR_GATED  # other kernels than scans load no float32 tiles of gates
    sizes = replace(SIZES, gate_dtype=torch.bfloat16) if low else SIZES
    _check(name, replace(sizes, B=2, T=320, H=16 if K == 64 else 8, HV=16, K=K))
    form = getattr(cw.library, name).declaration.normal_form()
    config = triton_engine.configuration(form, Dims(K, 128), torch.bfloat16)
    programs = forward_program(form, config.forward), backward_program(form, config.backward)
    kernels = [k for p in programs for k in p.kernels]
    with_products = {k.name for k in kernels if any(t.op is TileOp.DOT for t in k.order)}
    assert {*served} >= {*CHUNKS} & with_products


@pytest.mark.parametrize("served", [(64, 3, 32), (128, 2, 32)], indirect=True)
@pytest.mark.parametrize("name", VECTOR_GATED)
def test_scans_of_chunks_of_32(name: str, served: list[str]) -> None:
    _check(name, replace(SIZES, T=224))
    assert {*served} == SCANS


@pytest.mark.parametrize("served", [(64, 2)], indirect=True)
@pytest.mark.parametrize("gates", ["strong", "floor", "resets"])
@pytest.mark.parametrize("name", VECTOR_GATED)
def test_vector_gates_of_any_strength(name: str, gates: str, served: list[str]) -> None:
    """Decays of a block beyond what can be split, everywhere or in some rows."""
    case, at, device = CASES[name], Shape("", 2, 448, 20, 128), torch.device("cuda")
    operands = draw(case, at, torch.bfloat16, device, seed=0)
    x = torch.randn_like(operands["g"])
    g = {"strong": -5 * torch.sigmoid(x), "floor": -5 + 0 * x}.get(gates)
    g = torch.where(x > 2.2, -1e6, -0.01 * x.abs()) if g is None else g
    operands["g"] = g.detach().requires_grad_()
    _compare(name, at, operands)
    assert "backward_gradients" in served


@pytest.mark.parametrize("served", [(64, 3)], indirect=True)
@pytest.mark.parametrize("case", ["tail", "packed", "views", "copies"])
def test_tails_and_other_layouts(case: str, served: list[str]) -> None:
    """Views whose tokens lie apart are Triton's."""
    sizes = {
        "tail": replace(SIZES, T=200),
        "packed": SIZES.packed(100, 0, 156, 64, 3),
        "views": replace(SIZES, layout=Layout.VIEWS),
        "copies": replace(SIZES, layout=Layout.COPIED),
    }[case]
    _check("gated_delta_rule", sizes)
    assert not served if case == "views" else {*served} >= SCANS


@pytest.mark.parametrize("shape", ["F", "A"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_preferred(name: str, shape: str) -> None:
    case, at, device = CASES[name], SHAPES[shape], torch.device("cuda")
    _compare(name, at, draw(case, at, torch.bfloat16, device, seed=0))


def _compare(name: str, at: Shape, operands: dict[str, Tensor]) -> None:
    """Against the token loop in float64, and in a second run bit for bit."""
    case, op = CASES[name], getattr(cw.library, name)
    do = torch.randn_like(operands["v"])
    pairs = verify.sample(case, at)
    expected = verify.oracle(op, case, operands, do, None, pairs)
    side = verify.Side(lambda: op(*operands.values())[0], operands, operands)
    errors = verify.compare(side, case, do, expected, pairs)
    assert all(e.ok for e in errors), "; ".join(map(str, errors))
