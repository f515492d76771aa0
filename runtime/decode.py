"""One token at a time, for decoding: by a compiled kernel, or in torch where gradients are wanted.

A decoder repeats the layout of the token before, so what a layout takes is worked out once; a call
then makes room for its results and goes to the kernel.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..dsl import errors, oracle
from ..dsl.ir import Per
from .call import PLAIN, Call, arrange, describe, initial_states
from .engines import ENGINE_VARIABLE, EngineName, choose, stepper
from .tokens import Serve, Token

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration
    from .recurrence import Recurrence

States = Tensor | tuple[Tensor, ...]
Given = Tensor | Sequence[Tensor | None] | None

_Key = list[object]
_SERVING: dict[tuple[object, ...], Serve | None] = {}  # by key; None: the step in torch
_LATEST: dict[Declaration, tuple[_Key, Serve | None]] = {}  # compared sooner than hashed
_MOST = 4096  # keys that are kept


def step(
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    state: Given,
    engine: EngineName | str | None,
    usual: EngineName | str | None = None,
) -> tuple[Tensor, States]:
    """`(o, new state)` of one token; the state is computed and returned as a call would.

    The operands come without T (`[B,H,K]`), or all of them with T = 1. `engine` must serve;
    `usual`, that of calls, need not.

    Raises: what a call raises, in terms of T = 1. EngineUnavailable: the named engine has no
    kernel for this step, or gradients are wanted of it.
    """
    values = [*args, *named.values()]
    if state is None:
        values += [None] * len(declaration.states)
    elif isinstance(state, (list, tuple)):
        values += state
    else:
        values.append(state)
    usual = usual or os.environ.get(ENGINE_VARIABLE)
    key = _key(values)
    if key is None:
        return _in_torch(_bound(declaration, args, named, state), engine)
    key += (engine, usual, len(args), *named)
    latest = _LATEST.get(declaration)
    if latest is None or latest[0] != key:
        known = (declaration, *key)
        if known not in _SERVING:
            if len(_SERVING) >= _MOST:
                _SERVING.clear()
            _SERVING[known] = _serve(declaration, args, named, state, engine, usual)
        latest = _LATEST[declaration] = (key, _SERVING[known])
    serve = latest[1]
    if serve is None:
        return _in_torch(_bound(declaration, args, named, state), None)
    return serve(values)


def _key(values: Sequence[object]) -> _Key | None:
    """What decides how values are served; None where torch must see what happens to them."""
    gradients = torch.is_grad_enabled()
    found: _Key = []
    for x in values:
        if isinstance(x, Tensor):
            if (gradients and x.requires_grad) or not _as_they_lie(x):
                return None
            found += (x.shape, x.stride(), x.dtype, x.device)
        elif x is None or isinstance(x, (int, float, numbers.Real)):
            found.append(x)
        elif isinstance(x, np.ndarray) and x.ndim == 0:
            found.append(x.item())
        else:
            return None
    return None if _watched() else found


def _as_they_lie(x: Tensor) -> bool:
    """Whether the numbers of `x` are those in its memory, at its strides."""
    return (
        type(x) in PLAIN
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and not x.is_nested
    )


def _watched() -> bool:
    """Whether somebody looks at what torch computes: a transform, a mode."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A checked call of one token, and whether its tensors came with a time axis."""

    call: Call
    has_time: bool


def _bound(
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    state: Given,
) -> _Bound:
    operands, params, static = arrange(declaration, args, named)
    operands, has_time = _with_time(declaration, operands)
    initial = initial_states(declaration, state)
    call = describe(declaration, operands, params, initial, None, static)
    if call.T != 1:
        _refuse_several(declaration, operands)
    return _Bound(call, has_time)


def _with_time(
    declaration: Declaration, operands: dict[str, Tensor]
) -> tuple[dict[str, Tensor], bool]:
    """The operands with a time axis, and whether they came with one."""
    axes = {
        x.name: 3 + bool(x.kind.value) + x.micro for x in declaration.operands if x.per is Per.TOKEN
    }
    if all(operands[n].ndim == ndim for n, ndim in axes.items()):
        return operands, True
    return {n: x.unsqueeze(1) if n in axes else x for n, x in operands.items()}, False


def _refuse_several(declaration: Declaration, operands: dict[str, Tensor]) -> NoReturn:
    first = next(x.name for x in declaration.operands if x.per is Per.TOKEN)
    raise errors.BadShape(
        first,
        operands[first].shape,
        "one token: T = 1, or no T axis",
        help="call the recurrence itself for several tokens (output_final_state=True)",
    )


def traced_step(
    rule: Recurrence,
    args: Sequence[object],
    named: Mapping[str, object],
    state: Given,
    engine: EngineName | str | None,
) -> tuple[Tensor, States]:
    """What `step` returns, under torch.compile: a call of one token, so that it is one node."""
    declaration = rule.declaration
    operands, params, static = arrange(declaration, args, named)
    operands, has_time = _with_time(declaration, operands)
    if any(operands[x.name].shape[1] != 1 for x in declaration.operands if x.per is Per.TOKEN):
        _refuse_several(declaration, operands)
    arguments: dict[str, Any] = {**operands, **params, **dict(static)}
    o, new = rule(
        **arguments,
        initial_state=state,
        output_final_state=True,
        engine=engine or EngineName.REFERENCE,
    )
    assert new is not None
    return (o if has_time else o[:, 0]), new


def _in_torch(bound: _Bound, engine: EngineName | str | None) -> tuple[Tensor, States]:
    """The declared step as torch operations, which can be differentiated and traced."""
    call = bound.call
    if engine is not None and stepper(choose(call.device.type, engine)) is not None:
        raise errors.EngineUnavailable(
            choose(call.device.type, engine).value,
            "its kernels take tensors as they lie in memory: they have no gradient of a single "
            "step, torch.func does not see them, and nothing is negated when it is read",
            help="call step under torch.no_grad() (with x.resolve_neg() where x.is_neg()), or name "
            "no engine: torch then does it",
        )
    o, new = oracle.run(call.step, call.operands, call.params, call.initial, dtype=call.state_dtype)
    o = o.to(call.dtype)
    return (o if bound.has_time else o[:, 0]), (new[0] if len(new) == 1 else new)


def _serve(
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    state: Given,
    engine: EngineName | str | None,
    usual: EngineName | str | None,
) -> Serve | None:
    """What serves values of this layout; None: the step in torch."""
    bound = _bound(declaration, args, named, state)
    call = bound.call
    double = call.state_dtype is torch.float64
    chosen = choose(call.device.type, engine or usual, double=double)
    prepare = stepper(chosen)
    if prepare is None or 0 in (call.B, call.HV, call.K, call.V):
        return None
    names = [*(x.name for x, _ in zip(declaration.operands, args, strict=False)), *named]
    made = prepare(
        Token(
            _without_contents(call),
            places={name: names.index(name) for name in call.operands},
            first_state=len(names),
            has_time=bound.has_time,
        )
    )
    if isinstance(made, str):
        if engine is not None:
            raise errors.EngineUnavailable(chosen.value, made)
        return None
    return made


def _without_contents(call: Call) -> Call:
    """The call for its layout alone: what is kept must not keep tensors."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return replace(
        call,
        operands={n: like(x) for n, x in call.operands.items()},
        initial=tuple(None if x is None else like(x) for x in call.initial),
    )
