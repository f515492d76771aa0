"""Gradients in scans of their own, and scans in one launch: forms that have them, and results."""

from __future__ import annotations

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, State, Value, exp, outer, recurrence, within
from chunkwise.codegen.config import Config, Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.plan import Hoist, Loop, Plan, backward_plans
from chunkwise.codegen.programs import backward_program, chunk_program
from chunkwise.codegen.scans import has_gradient_scans
from chunkwise.codegen.tile import Axis
from chunkwise.codegen.triton.emit import emit
from chunkwise.codegen.triton.fit import untuned_config
from chunkwise.codegen.triton.offline import signature_for
from chunkwise.codegen.triton.resources import Target
from chunkwise.dsl.library import by_name
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan

from tests.codegen.forms import eager_under
from tests.harness import Layout, Sizes, engine_results, make_inputs, oracle_results
from tests.interpreted import CHUNK, TILES, Poisoned, served_under
from tests.tolerances import BY_DTYPE, assert_agree

SCANS = Plan(Hoist.NOTHING, outputs_in_scan=True, scans_apart=True)


@recurrence
def faded(S: State, q: Key, k: Key, v: Value, *, gamma: float = 0.9):
    """Its decay is a number of the call, which has no gradient."""
    S = within(gamma, 0, 1) * S + outer(exp(0.1 * k), v)
    return S, q @ S


@recurrence
def columns(S: State, q: Value, k: Key, v: Value):
    """Reads over the other axis: held transposed."""
    S = S + outer(k, v)
    return S, S @ q


OPS = {"linear_attention": cw.library.linear_attention, "faded": faded, "columns": columns}
SIZES = {
    "packed": Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float32).packed(
        0, CHUNK - 1, 2 * CHUNK + 1
    ),
    "views": Sizes(
        B=1, T=2 * CHUNK, H=1, HV=1, K=17, V=4, dtype=torch.float32, layout=Layout.VIEWS
    ),
}


def _form(name: str) -> NormalForm:
    return (OPS[name].declaration if name in OPS else by_name(name)).normal_form()


@pytest.mark.parametrize("name", OPS)
def test_no_state_is_stored(name: str) -> None:
    kernels = backward_program(_form(name), SCANS).kernels
    stored = [t for k in kernels for _, t in k.stores]
    assert len(stored) == 3
    assert not any({Axis.K, Axis.V} <= set(t.axes) for t in stored)
    assert [k.loop for k in kernels] == [Loop.FORWARD, Loop.REVERSE, Loop.REVERSE]
    assert [k.last for k in kernels] == [False, False, True]


# a gate with a gradient, a recall, a state whose gradient needs the other's value
@pytest.mark.parametrize("name", ["simple_gla", "gla", "delta_rule", "linear_attention_normalised"])
def test_gradients_that_read_two_states_have_none(name: str) -> None:
    body = chunk_program(_form(name))
    assert not has_gradient_scans(body)
    assert not any(p.scans_apart for p in backward_plans(body))


@pytest.mark.parametrize("hoist", [Hoist.NOTHING, Hoist.ALL])
@pytest.mark.parametrize("name", OPS)
def test_the_eager_engine_under_the_plan(
    name: str, hoist: Hoist, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(hoist, outputs_in_scan=True, scans_apart=True)
    eager_under(monkeypatch, Plan(Hoist.ALL), plan)
    op = OPS[name]
    sizes = Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float64).packed(0, 63, 130)
    inputs = make_inputs(op, sizes)
    expected = oracle_results(op, inputs)
    assert_agree(engine_results(op, inputs, "eager"), expected, BY_DTYPE[torch.float64])


def test_scans_alike_are_one_launch_where_states_are_small() -> None:
    for name, calls in {"linear_attention": 3, "gated_delta_rule": 2}.items():
        form, dims = _form(name), Dims(64, 64)
        config = untuned_config(form, dims, Dtype.BFLOAT16, Target.SM90.shared_limit)
        signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
        emitted = emit(form, signature, config)
        (scans,) = (k for k in emitted.backward if k.calls)
        assert len(scans.calls) == calls
        assert scans.v_programs == sum(64 // config.of(n).v_tile for n in scans.calls)
        segments = emit(form, signature, config, segments=True)
        assert not any(k.calls for k in segments.backward)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("name", "segment"),
    [
        *((name, 0) for name in (*OPS, "gated_delta_rule")),
        ("linear_attention", CHUNK),
    ],
)
def test_kernels_are_the_token_loop(
    name: str, segment: int, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Plan(Hoist.NOTHING, outputs_in_scan=name != "columns")
    backward = Plan(Hoist.ALL, together=True)
    if name in OPS:
        backward = Plan(Hoist.NOTHING, outputs_in_scan=True, scans_apart=True, together=True)
    config = Config(CHUNK, forward, backward, TILES)
    monkeypatch.setattr(launch_plan, "torch", Poisoned())
    monkeypatch.setattr(triton_engine, "_compiled_for", served_under(lambda form: config, segment))
    op = OPS.get(name) or getattr(cw.library, name)
    inputs = make_inputs(op, SIZES[sizes])
    expected = oracle_results(op, inputs)
    assert_agree(engine_results(op, inputs, "triton"), expected, BY_DTYPE[torch.float32])
