"""Pools of states, for serving: what is asked of one before a step reads and writes it in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..dsl import errors
from .call import Call, Pool, whole
from .shapes import pattern
from .sizes import FLOATS

MOST_TOKENS = 8  # of a step: more of them are faster in chunks


def with_pool(call: Call, pool: Pool) -> Call:
    """`call`, whose states are in a pool; only shapes, strides, dtypes and devices are looked at.

    Raises:
        BadShape, BadDtype, BadDevice, BadLayout, BadBatch: the tensor at fault, as their names say.
    """
    slots = pool.states[0].shape[0] if pool.states[0].ndim else 0
    for state, x in zip(call.declaration.states, pool.states, strict=True):
        name = f"state ({state.name})"
        _check_place(name, x, call.device)
        shape = [slots, *call.state_shape(state)[1:]]
        if list(x.shape) != shape:
            expected = f"a pool {pattern(('slots', *state.axes[1:]))} = {shape}"
            raise errors.BadShape(name, x.shape, expected)
        if x.dtype not in FLOATS or (x.dtype is torch.float64) != (call.dtype is torch.float64):
            expected = "float32, bfloat16 or float16 (float64 where the operands are)"
            raise errors.BadDtype(name, str(x.dtype), expected)
        if _overlaps(x):
            raise errors.BadLayout(
                name,
                f"a pool of strides {tuple(x.stride())}, whose slots share memory",
                help="a step writes it: pass memory of its own for each slot",
            )
    indices, accepted = pool.indices, pool.accepted
    check_integers("state_indices", indices, call.device)
    if indices.ndim not in (1, 2) or indices.shape[0] != call.B:
        raise errors.BadShape("state_indices", indices.shape, f"[B] or [B,W] with B = {call.B}")
    if indices.ndim == 2 and indices.shape[1] != 1 and indices.shape[1] < call.T:
        expected = f"[B,W] with a slot for each of the {call.T} tokens, or one for all"
        raise errors.BadShape("state_indices", indices.shape, expected)
    if accepted is not None:
        check_integers("num_accepted", accepted, call.device)
        if list(accepted.shape) != [call.B]:
            raise errors.BadShape("num_accepted", accepted.shape, f"[B] = [{call.B}]")
    return replace(call, pool=pool)


def _check_place(name: str, x: Tensor, device: torch.device) -> None:
    whole(name, x)
    if x.layout is not torch.strided:
        raise errors.BadLayout(name, f"a tensor of layout {x.layout}")
    if x.device != device:
        raise errors.BadDevice(name, str(x.device), str(device))


def check_integers(name: str, x: object, device: torch.device) -> None:
    """Refuse indices or counts that are no int32 or int64 tensor on `device`."""
    if not isinstance(x, Tensor):
        raise errors.NotATensor(name, type(x).__name__, "an int32 or int64 tensor [B]")
    _check_place(name, x, device)
    if x.dtype not in (torch.int32, torch.int64):
        raise errors.BadDtype(name, str(x.dtype), "int32 or int64")


def _overlaps(x: Tensor) -> bool:
    """Whether two entries may lie in one place, as far as strides say."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
