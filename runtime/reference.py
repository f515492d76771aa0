"""The engine that is the meaning: the declared step, token by token, and autograd through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from ..dsl import oracle
from ..dsl.ir import Per
from .call import Call, Places, Pool, places_of
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

        if request.way is Way.POOL:
            places = request.places or places_of(call)
            return lambda values: [pooled(_at_places(call, values, places), time=places.time)]
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


def pooled(call: Call, *, time: bool = True) -> Tensor:
    """The output of a few tokens, whose states are read from the call's pool and left there.

    It waits for what the indices hold. `time`: whether the output has an axis of tokens.
    """
    pool = call.pool
    assert pool is not None
    indices = pool.indices.reshape(call.B, pool.width).long()
    after = torch.zeros_like(indices[:, 0]) if pool.accepted is None else pool.accepted.long() - 1
    known = (after >= 0) & (after < pool.width)
    slot = indices.gather(1, after.clamp(0, pool.width - 1)[:, None])[:, 0]
    known &= (slot >= 0) & (slot < pool.slots)
    states = tuple(_found(x, slot, known).to(call.state_dtype) for x in pool.states)
    outputs, per_token = [], [x.name for x in call.step.operands if x.per is Per.TOKEN]
    for t in range(call.T):
        operands = {n: x[:, t : t + 1] if n in per_token else x for n, x in call.operands.items()}
        o, states = forward(replace(call, T=1, operands=operands, initial=states, pool=None))
        slot = indices[:, t] if pool.width > 1 else indices[:, 0]
        kept = (slot >= 0) & (slot < pool.slots)
        for x, state in zip(pool.states, states, strict=True):
            x[slot[kept]] = state[kept].to(x.dtype)
        rounded = (s.to(x.dtype) for x, s in zip(pool.states, states, strict=True))
        states = tuple(s.to(call.state_dtype) for s in rounded)
        outputs.append(o)
    return torch.cat(outputs, 1) if time else outputs[0][:, 0]


def _found(pool: Tensor, slot: Tensor, known: Tensor) -> Tensor:
    """The states in those slots, zero where a sequence has none."""
    found = pool.new_zeros(len(slot), *pool.shape[1:])
    found[known] = pool[slot[known]]
    return found


def _at_places(call: Call, values: Values, places: Places) -> Call:
    """The call of values that stand in those places."""
    operands = {n: values[at] for n, at in places.operands.items()}
    if not places.time:
        tokens = {x.name for x in call.step.operands if x.per is Per.TOKEN}
        operands = {n: x.unsqueeze(1) if n in tokens else x for n, x in operands.items()}
    assert places.slots is not None
    states = tuple(values[at] for at in places.states.values())
    pool = Pool(states, values[places.slots], values[places.slots + 1])
    params = {n: values[at] for n, at in places.params.items()}
    return replace(call, operands=operands, pool=pool, params=params)


def _own_view(x: Tensor) -> Tensor:
    y = x.view_as(x)
    return y if y.requires_grad else y.requires_grad_()


def _run(
    call: Call, operands: dict[str, Tensor], initial: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sizes = {"B": call.B, "T": call.T, "n": call.micro, "HV": call.HV, "K": call.K, "V": call.V}
    packed, dtype = call.cu_seqlens, call.state_dtype
    return oracle.run(call.step, operands, call.params, initial, packed, dtype, sizes)


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
