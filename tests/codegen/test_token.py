"""The token form: every recurrence one token at a time, compiled, is the declared step.

Also those that have no chunk form yet, and random ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.text.mathematics import print_chunk
from chunkwise.codegen.tile import Axis, TileOp, topological
from chunkwise.codegen.token import token_program
from chunkwise.dsl.library import all_declarations
from chunkwise.runtime.call import bind
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan
from chunkwise.runtime.tvm import engine as tvm_engine

from tests import harness
from tests.classes import costly
from tests.harness import Gates, Inputs, Sizes, make_inputs, oracle_results
from tests.interpreted import Poisoned
from tests.net import numbered
from tests.random_calls import Layout, is_sound, make
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, Tolerance, assert_agree

NAMES = [d.name for d in all_declarations()]
ENGINES = [
    pytest.param(tvm_engine, id="tvm"),
    pytest.param(triton_engine, id="triton", marks=pytest.mark.interpreter),
]
# sequences that are empty and of one token, grouped heads, no whole vector or tile, views
RICH = Sizes(HV=4, K=5, V=19, initial=True, dtype=torch.float32, layout=harness.Layout.VIEWS)
RICH = RICH.packed(0, 3, 1, 0, 5)
HARD = Sizes(B=2, T=7, H=1, HV=1, K=16, V=8, dtype=torch.float32, gates=Gates.HARD)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_plan, "torch", Poisoned())


def _check(op: cw.Recurrence, inputs: Inputs, engine: Any, limit: Tolerance) -> None:
    given = {**inputs.operands, **inputs.params}
    call = bind(op.declaration, (), given, **_options(inputs))
    with torch.no_grad():
        o, finals = engine.ENGINE.forward_by_token(call)
    want = {n: x for n, x in oracle_results(op, inputs).items() if not n.startswith("d")}
    names = [n for n in want if n != "o"]
    assert len(names) == len(finals)
    assert_agree({"o": o, **dict(zip(names, finals, strict=True))}, want, limit)


def _options(inputs: Inputs) -> dict[str, Any]:
    wanted = ("initial_state", "cu_seqlens")
    return {n: inputs.options[n] for n in wanted if n in inputs.options}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [RICH, HARD], ids=["packed", "hard gates"])
@pytest.mark.parametrize("name", costly(NAMES))
def test_every_recurrence(name: str, sizes: Sizes, engine: Any) -> None:
    op = getattr(cw.library, name)
    _check(op, make_inputs(op, sizes), engine, FLOAT32_HARD)


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision(engine: Any) -> None:
    """float16 in and out, float32 in between."""
    op = cw.library.gated_delta_rule
    sizes = replace(HARD, dtype=torch.float16, gate_dtype=torch.float32, gates=Gates.USUAL)
    _check(op, make_inputs(op, sizes), engine, BY_DTYPE[torch.float16])


def test_random_calls() -> None:
    """Of rules of any class, packed or not."""
    seen = 0
    for index in range(30):
        drawn, _ = numbered("tvm", 1, index)
        packing = drawn.plan.lengths and (0, 3, 1)
        plan = replace(drawn.plan, T=3, lengths=packing, reset=None, layouts=(Layout.PLAIN,) * 5)
        try:
            d = drawn.rule.declare()
        except cw.errors.ChunkwiseError:
            continue
        micro = plan.micro if d.has_micro else 1
        inputs = make(d, d.normal_form(micro), drawn.rule.params, plan).inputs
        op = cw.Recurrence(d)
        if is_sound(oracle_results(op, inputs)):
            _check(op, inputs, tvm_engine, FLOAT32_HARD)
            seen += 1
    assert seen >= 20


@pytest.mark.parametrize("name", costly(NAMES))
def test_no_tile_has_a_time_axis_and_sums_read_the_state_as_it_came(name: str) -> None:
    declaration = getattr(cw.library, name).declaration
    body = token_program(declaration.step(declaration.default_micro))
    tiles = topological(*(t for _, t in body.outputs), *(c.end for c in body.carried))
    assert not any(a in t.axes for t in tiles for a in (Axis.I, Axis.J))
    for t in tiles:
        wide = [a for a in t.args if len(a.axes) == 2]
        if t.op is TileOp.SUM and wide:
            states = [x for y in wide for x in y.args if len(x.axes) == 2]
            assert [x.op for x in states] == [TileOp.CARRY], print_chunk(body)
