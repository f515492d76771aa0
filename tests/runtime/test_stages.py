"""A recurrence in stages is the recurrence; what is one call at best stays one."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, Scalar, State, Value, exp, outer, recurrence
from chunkwise.dsl import library
from chunkwise.dsl.stages import stages_of
from chunkwise.runtime.call import describe
from chunkwise.runtime.inputs import draw, draw_states, ranges, usual_params
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_STAGED = [
    d.name for d in library.all_declarations() if not d.has_micro and stages_of(d.normal_form())
]
_SOON = ("gsa", "mamba3", "mamba3_trapezoid", "preconditioned_delta")


def _call(op: cw.Recurrence, packed: Tensor | None) -> tuple[Any, list[Tensor]]:
    form, random = op.declaration.normal_form(), torch.Generator().manual_seed(0)
    found = ranges(form, usual_params(form))
    sizes = {"B": 1 if packed is not None else 2, "T": 11, "H": 1, "HV": 2, "K": 3, "V": 5}
    sizes["N"] = sizes["B"] if packed is None else len(packed) - 1
    operands = {n: x.requires_grad_() for n, x in draw(form, found, sizes, random).items()}
    states = [x.requires_grad_() for x in draw_states(form, found, sizes, random)]
    initial = tuple(states) if packed is None else (None,) * len(states)
    call = describe(op.declaration, operands, usual_params(form), initial, packed)
    return call, [*operands.values(), *([] if packed is not None else states)]


def _agrees(op: cw.Recurrence, packed: Tensor | None) -> None:
    assert op._stages is not None
    call, leaves = _call(op, packed)
    finals = packed is None
    expected, last = op(
        **call.operands,
        **call.params,
        initial_state=call.initial if finals else None,
        output_final_state=finals,
        cu_seqlens=packed,
        engine="reference",
    )
    o, made = op._stages(call, finals=finals, engine="eager", check=None)
    every, wanted = [o, *(made or ())], [expected, *(last or ())]
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in wanted]
    for x, y in zip(every, wanted, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-6, atol=1e-6)
    gradients = (
        torch.autograd.grad(
            out, leaves, [c.to(x.dtype) for x, c in zip(out, cotangents, strict=True)]
        )
        for out in (every, wanted)
    )
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n if n in _SOON else pytest.param(n, marks=pytest.mark.long) for n in _STAGED]
)
def test_library(name: str) -> None:
    op = getattr(cw.library, name)
    _agrees(op, None)
    _agrees(op, torch.tensor([0, 4, 4, 5, 11]))


def test_which_are_staged() -> None:
    assert {"gsa", "abc", "mamba3", "mamba3_trapezoid"} <= {*_STAGED}
    assert not {"gated_delta_rule", "momentum_delta", "titans", "ttt", "mlstm"} & {*_STAGED}


def test_what_any_call_takes_and_refuses() -> None:
    """Sizes that are symbols; boundaries that are no tensor, as any other recurrence does."""
    op = cw.library.gsa
    call, _ = _call(op, None)
    operands = [x.detach().float() for x in call.operands.values()]
    graph = make_fx(lambda *x: op(*x, engine="eager")[0], tracing_mode="symbolic")(*operands)
    longer = [torch.cat((x, x), 1) for x in operands]
    torch.testing.assert_close(graph(*longer), op(*longer, engine="eager")[0])
    with pytest.raises(cw.errors.BadCuSeqlens, match="cu_seqlens is a list"):
        op(*operands, cu_seqlens=[0, 11])


def test_autocast_changes_no_dtype_between_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    op, softmax = cw.library.gsa, torch.softmax

    def of_cuda(x: Tensor, dim: int) -> Tensor:
        """That of autocast on a GPU, which CPUs do not have."""
        return softmax(x.float() if torch.is_autocast_enabled("cpu") else x, dim)

    assert op._stages is not None
    monkeypatch.setattr(torch, "softmax", of_cuda)
    call, _ = _call(op, None)
    narrow = {n: x.detach().bfloat16() for n, x in call.operands.items()}
    call = describe(op.declaration, narrow, call.params, (None, None), None)
    want, _ = op._stages(call, finals=False, engine="eager", check=None)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = op._stages(call, finals=False, engine="eager", check=None)
    assert torch.equal(got, want)


def test_outputs_have_the_dtype_of_the_call() -> None:
    """That of the first Value operand of the whole step, gated slot attention's q."""
    op = cw.library.gsa
    call, _ = _call(op, None)
    for narrow in ("q", "v"):
        mixed = {n: x.detach().float() for n, x in call.operands.items()}
        mixed[narrow] = mixed[narrow].bfloat16()
        own = describe(op.declaration, mixed, call.params, (None, None), None)
        assert op._stages is not None
        o, _ = op._stages(own, finals=False, engine="eager", check=None)
        assert o.dtype == op(**mixed, engine="eager")[0].dtype


def test_a_lag_that_is_read_stays() -> None:
    @recurrence
    def seen(
        S: State, lag: State, q: Key, k: Key, v: Value, g: Scalar, c: Scalar
    ) -> tuple[tuple[State, State], Value]:
        S = exp(g) * (S + c * lag) + outer(k, v)
        return (S, outer(k, v)), q @ S + k @ lag

    assert seen._stages is None


def test_a_lag_of_one_s_own() -> None:
    @recurrence
    def lagged(
        S: State, lag: State, q: Key, k: Key, v: Value, g: Scalar, c: Scalar
    ) -> tuple[tuple[State, State], Value]:
        S = exp(g) * (S + c * lag) + outer(q, v)
        return (S, outer(k, v)), q @ S

    _agrees(lagged, None)
    _agrees(lagged, torch.tensor([0, 1, 11]))


def test_reads_that_feed_one_another_s_states_are_one_call() -> None:
    @recurrence
    def fed(S: State, q: Key, k: Key, v: Value, one: Value) -> tuple[State, Value]:
        S = S + outer(k, v)
        return S, (q * (S @ one)) @ S

    assert fed._stages is None
