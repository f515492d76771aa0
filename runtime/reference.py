"""The engine that is the meaning: the declared step, token by token, and autograd through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..dsl import oracle

if TYPE_CHECKING:
    from .call import Call

_R = TypeVar("_R")
_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
    torch._C.DispatchKey.ADInplaceOrView,
)


def supports(call: Call) -> str | None:
    """Any legal step, on any device and in any dtype."""
    return None


def forward(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence, one token at a time, in float32 (float64 for float64 values)."""
    o, finals = _run(call, call.operands, call.initial)
    # the oracle hands back the initial state itself where a sequence is empty
    return o.to(call.dtype, copy=True), tuple(f.to(call.state_dtype, copy=True) for f in finals)


def backward(
    call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    """Gradients by autograd through a second run of the token loop."""
    return _with_autograd(lambda: _differentiate(call, do, dfinals))


def _run(
    call: Call, operands: dict[str, Tensor], initial: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return oracle.run(
        call.step, operands, call.params, initial, call.cu_seqlens, dtype=call.state_dtype
    )


def _differentiate(
    call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
    operands = {n: x.detach().requires_grad_() for n, x in call.operands.items()}
    initial = tuple(None if s is None else s.detach().requires_grad_() for s in call.initial)
    with torch.enable_grad():
        o, finals = _run(call, operands, initial)
    outputs, cotangents = [], []
    for y, dy in ((o, do), *zip(finals, dfinals, strict=True)):
        if dy is not None and y.requires_grad:
            outputs.append(y)
            cotangents.append(dy.to(y.dtype))
    leaves = [*operands.values(), *(s for s in initial if s is not None)]
    if outputs:
        grads = torch.autograd.grad(
            outputs, leaves, cotangents, allow_unused=True, materialize_grads=True
        )
    else:  # T = 0 and nothing asked of the final state
        grads = tuple(torch.zeros_like(x) for x in leaves)
    remaining = iter(grads)
    of_operands = {n: next(remaining) for n in operands}
    of_initial = tuple(None if s is None else next(remaining) for s in initial)
    return of_operands, of_initial


def _with_autograd(work: Callable[[], _R]) -> _R:
    """`work()` with autograd recording, which torch switches off inside an op.

    In this thread: the backward of a CUDA op runs in the device's only autograd thread, which may
    enter autograd again but would wait for ever for another thread that does.
    """
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        return work()
