"""The polynomials of codegen/cost.py agree with torch's counts and with numbers by hand."""

from __future__ import annotations

import pytest
import torch
from chunkwise import library
from chunkwise.codegen import cost
from chunkwise.codegen.config import Dims
from chunkwise.codegen.eager import library as eager_library
from chunkwise.codegen.eager.kernel import print_eager
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.programs import (
    backward_program,
    chunk_adjoint,
    chunk_program,
    forward_program,
)
from chunkwise.codegen.tile import Axis
from chunkwise.dsl.normal_form import NormalForm
from torch.utils.flop_counter import FlopCounterMode

_DIMS = Dims(32, 48)  # the sizes differ, so that a confusion of two shows
_CHUNK = 16


def _form(name: str) -> NormalForm:
    form = getattr(library, name).declaration.normal_form()
    assert isinstance(form, NormalForm)
    return form


# without a solve or a vector gate every product is one that torch counts
@pytest.mark.parametrize(
    "name", ["linear_attention", "linear_attention_normalised", "retention", "mamba2"]
)
@pytest.mark.parametrize("plan", [Plan(Hoist.NOTHING), Plan(Hoist.ALL)], ids=lambda p: p.label)
def test_products_are_what_torch_counts(name: str, plan: Plan) -> None:
    form = _form(name)
    sizes = {Axis.I: _CHUNK, Axis.J: _CHUNK, Axis.K: _DIMS.K, Axis.V: _DIMS.V}
    for program in (forward_program(form, plan), backward_program(form, plan)):
        for kernel in program.kernels:
            printed = print_eager(kernel)
            names: dict[str, object] = {"torch": torch, "F": torch.nn.functional}
            names |= {n: f for n, f in vars(eager_library).items() if not n.startswith("_")}
            exec(printed.source, names)
            run = names[kernel.name]
            assert callable(run)
            arguments = [torch.ones(1, *(sizes[a] for a in t.axes)) for _, t in printed.arguments]
            at = torch.arange(_CHUNK)
            with FlopCounterMode(display=False) as counter:
                run(*arguments, at < _CHUNK, at, _DIMS.K, _DIMS.V, torch.float32)
            spent = cost.kernel_cost(kernel, Dtype.BFLOAT16).products
            counted = counter.get_total_flops() / _CHUNK
            assert cost.evaluate(spent, _CHUNK, _DIMS) == counted, kernel.name


@pytest.mark.parametrize(
    ("name", "dtype", "forward"),
    [
        ("gated_delta_rule", Dtype.BFLOAT16, 1032),  # q, k, v, o of 256 bytes; g and beta of 4
        ("gated_delta_rule", Dtype.FLOAT32, 2056),
        ("linear_attention", Dtype.BFLOAT16, 1024),
        ("gla", Dtype.BFLOAT16, 1280),  # a gate as wide as a key
    ],
)
def test_compulsory_bytes(name: str, dtype: Dtype, forward: int) -> None:
    floor = cost.compulsory_bytes(chunk_program(_form(name)), dtype)
    assert cost.evaluate(floor, 64, Dims(128, 128)) == forward


def test_no_plan_moves_less_than_the_floor() -> None:
    """The one-pass plan of additive attention moves exactly the compulsory bytes."""
    dims = Dims(128, 128)
    form = _form("linear_attention")
    one_pass = forward_program(form, Plan(Hoist.NOTHING, outputs_in_scan=True))
    floor = cost.compulsory_bytes(chunk_program(form), Dtype.BFLOAT16)
    assert cost.program_cost(one_pass, Dtype.BFLOAT16).moved == floor
    for name in ("gated_delta_rule", "kda"):
        form = _form(name)
        program = backward_program(form, Plan(Hoist.ALL))
        floor = cost.compulsory_bytes(chunk_adjoint(form), Dtype.BFLOAT16)
        moved = cost.program_cost(program, Dtype.BFLOAT16).moved
        assert cost.evaluate(moved, 64, dims) > cost.evaluate(floor, 64, dims)


def test_a_vector_gate_and_a_solve_by_hand() -> None:
    """C = 64, K = V = 128: six halvings; an inverse of three blockwise and two whole doublings."""
    plan = Plan(Hoist.ALL, outputs_in_scan=True)
    prep = forward_program(_form("kda"), plan).kernels[0]
    spent = cost.evaluate(cost.kernel_cost(prep, Dtype.BFLOAT16).products, 64, Dims(128, 128))
    scores = 2 * (6 * 2 * 64 * 128)  # of q and of k, a whole C x C x K product per halving
    inverse = (3 * 2 * 4 * 2 * 16**3 + 2 * 2 * 2 * 64**3) // 64
    assert spent == scores + inverse


def test_polynomials_read_well() -> None:
    C, K, V = cost.C, cost.K, cost.V
    assert cost.readable(4 * C**2 - 2 * K * V / C) == "4·C² − 2·K·V/C"
