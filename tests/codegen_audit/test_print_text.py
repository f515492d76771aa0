"""The printed mathematics, evaluated, gives the recurrence's results and their gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from chunkwise import library
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import (
    backward_program,
    chunk_adjoint,
    chunk_program,
    forward_program,
)
from chunkwise.codegen.text.mathematics import print_adjoint, print_chunk, print_program
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.dsl import oracle
from chunkwise.dsl.ir import Per
from chunkwise.dsl.library import all_declarations
from torch import Tensor

from tests.classes import costly, lowered
from tests.codegen_audit.mathematics import evaluate
from tests.harness import Inputs, Sizes, make_inputs

# n, K and V differ, so that a wrong index cannot go unseen
_SIZES = Sizes(B=1, T=5, H=1, HV=1, K=3, V=4, initial=True)
# constants are printed with six digits
_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
_NAMES = [d.name for d in all_declarations() if lowered(d) and not d.has_micro]


def _leaves(name: str, inputs: Inputs) -> dict[str, Tensor]:
    op = getattr(library, name)
    leaves = {
        x.name: inputs.operands[x.name][0]
        if x.per is Per.HEAD
        else inputs.operands[x.name][0, :, 0]
        for x in op.declaration.operands
    }
    assert inputs.initial is not None
    for state, start in zip(op.declaration.states, inputs.initial, strict=True):
        leaves[state.name] = start[0, 0]
    leaves |= {"K": torch.tensor(3.0).double(), "V": torch.tensor(4.0).double()}
    params = {p.name: p.default for p in op.declaration.params}
    leaves |= {n: torch.tensor(x, dtype=torch.float64) for n, x in params.items()}
    return {n: x.detach() for n, x in leaves.items()}


@pytest.mark.parametrize("name", costly(_NAMES))
def test_printed_chunk_is_the_recurrence(name: str) -> None:
    """The chunk, evaluated from its text, gives the token loop's output and final states."""
    torch.set_default_dtype(torch.float64)
    try:
        op = getattr(library, name)
        inputs = make_inputs(op, _SIZES)
        defaults = {p.name: p.default for p in op.declaration.params}
        o, finals = oracle.run(op.declaration.step(), inputs.operands, defaults, inputs.initial)
        random = torch.Generator().manual_seed(3)
        weights = [torch.randn(y.shape, generator=random) for y in (o, *finals)]
        grads = torch.autograd.grad((o, *finals), list(inputs.leaves.values()), weights)

        form = op.declaration.normal_form()
        leaves = _leaves(name, inputs)
        got = evaluate(print_chunk(chunk_program(form)), leaves, _SIZES.T)
        _close(got["o"], o[0, :, 0].detach())
        for state, final in zip(form.states, finals, strict=True):
            _close(got[f"{state.name}_next"], final[0, 0].detach())

        leaves["d_o"] = weights[0][0, :, 0]
        for state, weight in zip(form.states, weights[1:], strict=True):
            leaves[f"d_{state.name}"] = weight[0, 0]
        got = evaluate(print_adjoint(chunk_adjoint(form)), leaves, _SIZES.T)
        for x, grad in zip(form.operands, grads, strict=False):
            want = grad[0] if x.per is Per.HEAD else grad[0, :, 0]
            _close(got[f"d_{x.name}"], want, msg=lambda m, n=x.name: f"{n}: {m}")
        for state, grad in zip(form.states, grads[len(form.operands) :], strict=True):
            _close(got[f"d_{state.name}_next"], grad[0, 0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_marks_say_what_may_leave_the_scan() -> None:
    """worked example: T without the state, U in the scan, o after it."""
    page = print_chunk(chunk_program(library.gated_delta_rule.declaration.normal_form()))
    marks = {line.split("[")[0].strip(): line for line in page.splitlines() if " = " in line}
    assert "[n]" in marks["T"]
    assert "[s]" not in marks["T"]
    assert "[s][n]" in marks["U"]
    assert "[s]" in marks["o"]
    assert "[n]" not in marks["o"]
    assert marks["o"].endswith("→ output")
    assert marks["S_next"].endswith("→ next S")


@pytest.mark.parametrize("name", costly(_NAMES))
def test_every_kernel_prints_what_it_stores(name: str) -> None:
    form = getattr(library, name).declaration.normal_form()
    config = default_config(chunk_program(form), Dims(64, 64), wide_dtype=False)
    for program in (forward_program(form, config.forward), backward_program(form, config.backward)):
        page = print_program(program)
        for kernel in program.kernels:
            assert f"{kernel.name}: {kernel.loop.value}" in page
            for stored, _ in kernel.stores:
                assert stored.label in page
