"""The engine that is the meaning: the declared step, token by token, and autograd through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from ..dsl import oracle
from .call import Call
from .engine import Engine
from .engines import EngineName
from .prepared import Request, Run, Values, Way

_R = TypeVar("_R")
_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
    torch._C.DispatchKey.ADInplaceOrView,
)


class _Reference(Engine):
    """The token loop in torch: any legal step, on any device and in any dtype."""

    name = EngineName.REFERENCE
    has_steps = False

    def refusal(self, call: Call) -> str | None:
        return None

    def token_refusal(self, call: Call) -> str | None:
        return "it has no kernels"

    def forward_way(self, call: Call) -> Way:
        return Way.CHUNKS

    def prepare(self, request: Request) -> Run:
        call, count = request.call, len(request.cotangents)

        def forwards(values: Values) -> list[Tensor]:
            o, finals = forward(call.of(values))
            return [o, *finals]

        def backwards(values: Values) -> list[Tensor]:
            do, *dfinals = values[:count]
            return backward(call.of(values[count:]), do, tuple(dfinals))

        return backwards if request.way is Way.BACKWARD else forwards


ENGINE = _Reference()


def forward(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence, one token at a time, in float32 (float64 for float64 values)."""
    o, finals = _run(call, call.operands, call.initial)
    # the oracle hands back the initial state itself where a sequence is empty
    return o.to(call.dtype, copy=True), tuple(f.to(call.state_dtype, copy=True) for f in finals)


def backward(call: Call, do: Tensor | None, dfinals: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Gradients of operands and given first states, by autograd through a second token loop."""
    return _with_autograd(
        lambda: _pulled_back(call, lambda x: x.detach().requires_grad_(), do, dfinals, again=False)
    )


def differentiate(
    call: Call, do: Tensor | None, dfinals: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """What `backward` returns, itself differentiable, in any mode and at any level of torch.func.

    Operands may be computed from one another, hence a view of each: its gradient is its own.
    """
    with enable_inplace_requires_grad(True):  # of views that are ours
        return _pulled_back(call, _own_view, do, dfinals, again=True)


def _own_view(x: Tensor) -> Tensor:
    y = x.view_as(x)
    return y if y.requires_grad else y.requires_grad_()


def _run(
    call: Call, operands: dict[str, Tensor], initial: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return oracle.run(
        call.step, operands, call.params, initial, call.cu_seqlens, dtype=call.state_dtype
    )


def _pulled_back(
    call: Call,
    leaf: Callable[[Tensor], Tensor],
    do: Tensor | None,
    dfinals: tuple[Tensor | None, ...],
    *,
    again: bool,
) -> list[Tensor]:
    with torch.enable_grad():
        operands = {n: leaf(x) for n, x in call.operands.items()}
        initial = tuple(None if s is None else leaf(s) for s in call.initial)
        o, finals = _run(call, operands, initial)
    outputs, cotangents = [], []
    for y, dy in ((o, do), *zip(finals, dfinals, strict=True)):
        if dy is not None and y.requires_grad:
            outputs.append(y)
            cotangents.append(dy.to(y.dtype))
    leaves = [*operands.values(), *(s for s in initial if s is not None)]
    if not outputs:  # T = 0 and nothing asked of the final state
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(
        outputs, leaves, cotangents, create_graph=again, allow_unused=True, materialize_grads=True
    )
    return list(grads)


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
