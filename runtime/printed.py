"""What the engines of printed kernels share: dtypes by printed name, gradients put in shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codegen.interface import Dtype
from .call import Call

TORCH = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
PRINTED = {dtype: printed for printed, dtype in TORCH.items()}


Dtypes = tuple[tuple[str, torch.dtype], ...]


def dtypes_of(call: Call) -> Dtypes:
    """The dtype of every operand, by name."""
    return tuple((name, x.dtype) for name, x in call.operands.items())


def unprinted(dtypes: Dtypes) -> str | None:
    """Which operand no kernel is printed for, and what they take; None if all are fine."""
    for name, dtype in dtypes:
        if dtype not in PRINTED:
            return f"{name} is {dtype}; kernels take float32, bfloat16 and float16"
    return None


def own_gradient(
    g: Tensor, shape: torch.Size, dtype: torch.dtype, HV: int, *, per_head: bool
) -> Tensor:
    """The gradient of an operand in its own shape and dtype, sums taken in a fixed order.

    Args:
        g: what kernels wrote: per token and value head `[B,T,HV,…]`, flat or not; of an operand
            per head, partial sums `[chunks,HV,…]`.
        shape: the operand's, `[B,T,H,…]` with HV a multiple of H, or `[HV,…]`.
        HV: value heads.
        per_head: whether the operand is per head.
    """
    if per_head:
        return g.sum(0).to(dtype)
    heads = shape[2]
    if heads != HV:
        g = g.reshape(*shape[:2], heads, HV // heads, *shape[3:]).sum(3)
    return g.view(shape).to(dtype)
