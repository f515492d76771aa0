"""What every new kind of chunk form is asked: to be the token loop, on each engine and in parts."""

from __future__ import annotations

import pytest
import torch
from chunkwise.codegen.plan import Plan
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.dsl import oracle
from chunkwise.dsl.equations import as_step
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.dsl.verify import verify_form, verify_step
from chunkwise.runtime import eager
from chunkwise.runtime.prepared import Way
from chunkwise.runtime.recurrence import Recurrence

from tests.harness import Sizes, engine_results, make_inputs, oracle_results
from tests.tolerances import BY_DTYPE, FLOAT64_RANDOM, assert_agree

C = 64  # the eager engine's chunk
CASES = {
    "not packed": Sizes(H=1, HV=2, T=C + 3, K=5, V=5, initial=True),
    "packed": Sizes(H=1, HV=2, K=5, V=3, initial=True).packed(0, C - 1, 1, C, 0, C + 1),
    "zero state": Sizes(H=2, HV=2, T=9, K=4, V=7),
}
# of float32; where programs take tiles of V, there are two
_SHORT = Sizes(H=1, HV=2, K=5, V=3, initial=True, dtype=torch.float32).packed(33, 0, 4)
_WIDE = Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float32).packed(33, 0, 4)
COMPILED = {"tvm": _SHORT, "triton": _WIDE}


def check_engine(op: Recurrence, sizes: Sizes, engine: str) -> None:
    """Output, final states and all gradients are the token loop's."""
    inputs = make_inputs(op, sizes)
    limit = FLOAT64_RANDOM if sizes.dtype is torch.float64 else BY_DTYPE[sizes.dtype]
    assert_agree(engine_results(op, inputs, engine), oracle_results(op, inputs), limit)


def check_normal_form(op: Recurrence, sizes: Sizes) -> None:
    """The normal form, and the step that it describes, are what was declared."""
    micro = op.declaration.default_micro
    form = op.declaration.normal_form(micro)
    verify_form(form)
    verify_step(as_step(form))
    inputs = make_inputs(op, sizes)
    given = (inputs.operands, inputs.params, inputs.initial)
    want, states = oracle.run(op.declaration.step(micro), *given)
    for what in (form, as_step(form)):
        got, ends = oracle.run(what, *given)
        for x, y in zip((got, *ends), (want, *states), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def check_one_token(op: Recurrence) -> None:
    """`step` is the token loop of one token."""
    inputs = make_inputs(op, Sizes(T=1, initial=True))
    token = {n: x.detach()[:, 0] for n, x in inputs.operands.items()}
    given = inputs.initial or ()
    o, states = op.step(**token, state=given if len(given) > 1 else given[0])
    step = op.declaration.step(op.declaration.default_micro)
    want, ends = oracle.run(step, inputs.operands, {}, inputs.initial)
    states = states if isinstance(states, tuple) else (states,)
    for x, y in zip((o, *states), (want[:, 0], *ends), strict=True):
        torch.testing.assert_close(x, y)


def eager_under(monkeypatch: pytest.MonkeyPatch, forward: Plan, backward: Plan) -> None:
    """Has the eager engine compute by these plans."""

    def kernels(form: NormalForm, way: Way) -> object:
        if way is Way.BACKWARD:
            return eager._compile(backward_program(form, backward))
        return eager._compile(forward_program(form, forward))

    monkeypatch.setattr(eager, "_kernels", kernels)
