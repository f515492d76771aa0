"""The token form: every recurrence one token at a time, compiled, is the declared step.

Also those that have no chunk form yet, and random ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.print_text import print_body
from chunkwise.codegen.tile import Axis, TileOp, topological
from chunkwise.codegen.token import token_body
from chunkwise.dsl import oracle
from chunkwise.dsl.library import all_declarations
from chunkwise.runtime import launch, triton_engine, tvm_engine
from chunkwise.runtime.call import bind
from hypothesis import HealthCheck, given, note, settings

from tests.harness import Gates, Inputs, Layout, Sizes, make_inputs, oracle_results
from tests.interpreted import Poisoned
from tests.random_rules import Rule, Shape, operands_of, rules, shapes
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, Tolerance, assert_agree

NAMES = [d.name for d in all_declarations()]
ENGINES = [
    pytest.param(tvm_engine, id="tvm"),
    pytest.param(triton_engine, id="triton", marks=pytest.mark.interpreter),
]
# sequences that are empty and of one token, grouped heads, no whole vector or tile, views
RICH = Sizes(HV=4, K=5, V=19, initial=True, dtype=torch.float32, layout=Layout.VIEWS)
RICH = RICH.packed(0, 3, 1, 0, 5)
HARD = Sizes(B=2, T=7, H=1, HV=1, K=16, V=8, dtype=torch.float32, gates=Gates.HARD)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "torch", Poisoned())


def _check(op: cw.Recurrence, inputs: Inputs, engine: Any, limit: Tolerance) -> None:
    call = bind(op.declaration, (), inputs.operands, **_options(inputs))
    with torch.no_grad():
        o, finals = engine.forward_by_token(call)
    want = {n: x for n, x in oracle_results(op, inputs).items() if not n.startswith("d")}
    names = [n for n in want if n != "o"]
    assert len(names) == len(finals)
    assert_agree({"o": o, **dict(zip(names, finals, strict=True))}, want, limit)


def _options(inputs: Inputs) -> dict[str, Any]:
    wanted = ("initial_state", "cu_seqlens")
    return {n: inputs.options[n] for n in wanted if n in inputs.options}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [RICH, HARD], ids=["packed", "hard gates"])
@pytest.mark.parametrize("name", NAMES)
def test_every_recurrence(name: str, sizes: Sizes, engine: Any) -> None:
    op = getattr(cw.library, name)
    _check(op, make_inputs(op, sizes), engine, FLOAT32_HARD)


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision(engine: Any) -> None:
    """float16 in and out, float32 in between."""
    op = cw.library.gated_delta_rule
    sizes = replace(HARD, dtype=torch.float16, gate_dtype=torch.float32, gates=Gates.USUAL)
    _check(op, make_inputs(op, sizes), engine, BY_DTYPE[torch.float16])


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(rules(low_rank=True), shapes(around=3, longest=5))
@torch.no_grad()
def test_random_rules(rule: Rule, shape: Shape) -> None:
    note(rule.source)
    d = rule.declare()
    operands, initial, bounds = operands_of(d, shape, torch.float32)
    call = bind(d, (), operands, initial_state=initial, cu_seqlens=bounds)
    o, finals = tvm_engine.forward_by_token(call)
    want, last = oracle.run(
        call.step,
        {n: x.double() for n, x in call.operands.items()},
        call.params,
        [None if x is None else x.double() for x in call.initial],
        call.cu_seqlens,
    )
    got = {"o": o, **{f"final {n}": x for n, x in enumerate(finals)}}
    assert_agree(got, {"o": want, **{f"final {n}": x for n, x in enumerate(last)}}, FLOAT32_HARD)


@pytest.mark.parametrize("name", NAMES)
def test_no_tile_has_a_time_axis_and_sums_read_the_state_as_it_came(name: str) -> None:
    declaration = getattr(cw.library, name).declaration
    body = token_body(declaration.step(2 if declaration.has_micro else 1))
    tiles = topological(*(t for _, t in body.outputs), *(c.end for c in body.carried))
    assert not any(a in t.axes for t in tiles for a in (Axis.I, Axis.J))
    for t in tiles:
        wide = [a for a in t.args if len(a.axes) == 2]
        if t.op is TileOp.SUM and wide:
            states = [x for x in topological(*wide) if len(x.axes) == 2 and x not in wide]
            assert [x.op for x in states] == [TileOp.CARRY], print_body(body)
