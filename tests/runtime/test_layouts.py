"""How tensors lie in memory changes no number: operands, boundaries, states and cotangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chunkwise as cw
import pytest
import torch
from torch import Tensor


def _column(x: Tensor) -> Tensor:
    """The same numbers, every third of a larger tensor that holds others."""
    wide = torch.full((*x.shape, 3), 77, dtype=x.dtype, device=x.device)
    wide[..., 1] = x
    return wide[..., 1]


def _odd(x: Tensor) -> Tensor:
    """The same numbers, one element behind where an allocation begins."""
    flat = torch.full((x.numel() + 1,), 77, dtype=x.dtype, device=x.device)
    return flat[1:].view(x.shape).copy_(x)


def _turned(x: Tensor) -> Tensor:
    """The same numbers, the last axis first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _negated(x: Tensor) -> Tensor:
    """The same numbers, each negated when it is read."""
    return torch._neg_view(-x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": _column,
    "odd": _odd,
    "turned": _turned,
    "negated": _negated,
}


def _outcome(
    op: cw.Recurrence, x: dict[str, Tensor], state: Tensor, cu: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Output, final state, and gradients of their (weighted) sum."""
    leaves = {n: t.detach().requires_grad_() for n, t in {**x, "state": state}.items()}
    *operands, start = leaves.values()
    o, end = op(*operands, initial_state=start, cu_seqlens=cu, output_final_state=True, **options)
    # expanded cotangents: of a sum, they have strides of 0
    grads = torch.autograd.grad(o.sum() + 0.5 * end.sum(), list(leaves.values()))
    named = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"o": o.detach(), "end": end.detach(), **named}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["gated_delta_rule", "gated_delta_product", "kda", "retention"])
def test_of_every_tensor(kit: Any, engine: str, rule: str, layout: str) -> None:
    op = getattr(cw.library, rule)
    lay = LAYOUTS[layout]
    sizes = kit.Sizes(K=5, V=6, initial=True, dtype=torch.float32)
    for at in (kit.Sizes(**{**_fields(sizes), "T": 9}), sizes.packed(4, 0, 5)):
        inputs = kit.make_inputs(op, at)
        x = {n: t.detach() for n, t in inputs.operands.items()}
        (state,), cu = inputs.initial, inputs.cu_seqlens
        want = _outcome(op, x, state.detach(), cu, engine="reference")
        laid = {n: lay(t) for n, t in x.items()}
        bounds = None if cu is None else (cu if layout == "negated" else lay(cu))
        got = _outcome(op, laid, lay(state.detach()), bounds, engine=engine)
        kit.assert_agree(got, want, max(kit.tolerance, 1e-5))


def _fields(sizes: Any) -> dict[str, Any]:
    return {n: getattr(sizes, n) for n in type(sizes).__slots__}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_in_a_column(kit: Any, engine: str, dtype: torch.dtype) -> None:
    """As `cu_seqlens` of a data loader's table: [N+1, 2][:, 0]."""
    op = cw.library.simple_gla
    inputs = kit.make_inputs(op, kit.Sizes(K=4, V=4, dtype=torch.float32).packed(3, 0, 6))
    cu = inputs.cu_seqlens.to(dtype)
    want, _ = op(**inputs.operands, cu_seqlens=cu, engine="reference")
    got, _ = op(**inputs.operands, cu_seqlens=_column(cu), engine=engine)
    kit.assert_agree({"o": got.detach()}, {"o": want.detach()}, max(kit.tolerance, 1e-5))


def test_expanded_operands_and_states(kit: Any, engine: str) -> None:
    """Strides of 0, in every axis that may have one."""
    op = cw.library.gated_delta_rule
    sizes = kit.Sizes(B=2, T=9, H=2, HV=2, K=5, V=6, initial=True, dtype=torch.float32)
    inputs = kit.make_inputs(op, sizes)
    for axis in range(3):
        x = {n: t.detach().narrow(axis, 0, 1).expand_as(t) for n, t in inputs.operands.items()}
        start = inputs.initial[0].detach()
        start = start.narrow(axis, 0, 1).expand_as(start)
        want = _outcome(op, x, start, None, engine="reference")
        got = _outcome(op, x, start, None, engine=engine)
        kit.assert_agree(got, want, max(kit.tolerance, 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_of_steps(kit: Any, engine: str, layout: str) -> None:
    op, lay = cw.library.gated_delta_rule, LAYOUTS[layout]
    inputs = kit.make_inputs(op, kit.Sizes(T=1, K=8, V=16, initial=True, dtype=torch.float32))
    x = {n: t.detach()[:, 0] for n, t in inputs.operands.items()}
    state = inputs.initial[0].detach()
    want = op.step(**x, state=state, engine="reference")
    laid = {n: lay(t) for n, t in x.items()}
    for given, start in ((laid, state), (x, lay(state)), (laid, lay(state)), (x, state)):
        # kernels take no tensor that is negated when it is read: torch does
        lazy = start.is_neg() or (given is laid and layout == "negated")
        got = op.step(**given, state=start, engine=None if lazy or engine == "eager" else engine)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kernels_of_steps_say_what_they_do_not_take(kit: Any) -> None:
    op = cw.library.simple_gla
    x = kit.make_inputs(op, kit.Sizes(T=1, dtype=torch.float32)).operands
    negated = {**x, "v": torch._neg_view(x["v"])}
    with pytest.raises(
        cw.errors.EngineUnavailable, match=r"negated when it is read.*\n.*resolve_neg"
    ):
        op.step(**negated, engine="tvm")


@torch.no_grad()
def test_zeros_without_memory(kit: Any, engine: str) -> None:
    """torch's own stand-ins for zero tangents: no address to hand out."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(T=1, K=8, V=16, initial=True, dtype=torch.float32))
    x = {n: t.detach()[:, 0] for n, t in inputs.operands.items()}
    zero = torch._efficientzerotensor(x["v"].shape, device=kit.engine.device)
    state = inputs.initial[0].detach()
    want = op.step(**{**x, "v": torch.zeros_like(x["v"])}, state=state, engine="reference")
    got = op.step(**{**x, "v": zero}, state=state)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("K", "V"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "rwkv6", "linear_attention_normalised"])
def test_no_channels(kit: Any, engine: str, rule: str, K: int, V: int) -> None:
    """Reads over no Key are zero; without Values a KeyState is still summed."""
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(T=5, K=K, V=V, initial=True, dtype=torch.float32))
    want = kit.engine_results(op, inputs, "reference")
    got = kit.engine_results(op, inputs, engine)
    assert want.keys() == got.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape
        torch.testing.assert_close(x, want[name])
    x = {n: t.detach()[:, :1] if t.ndim > 2 else t.detach() for n, t in inputs.operands.items()}
    o, _ = op.step(**x, state=inputs.options["initial_state"])
    assert o.shape == (2, 1, 2, V)
