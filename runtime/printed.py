"""What the engines of printed kernels share: dtypes by printed name, gradients put in shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codegen.triton_types import Dtype

TORCH = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}
PRINTED = {dtype: printed for printed, dtype in TORCH.items()}


def own_gradient(g: Tensor | None, x: Tensor, HV: int, *, per_head: bool) -> Tensor:
    """The gradient of operand `x` in its own shape and dtype, sums taken in a fixed order.

    Args:
        g: what kernels wrote: per token and value head `[B,T,HV,…]`, flat or not; of an operand
            per head, partial sums `[chunks,HV,…]`; None where nothing depends on it.
        x: the operand, `[B,T,H,…]` with HV a multiple of H, or `[HV,…]`.
        HV: value heads.
        per_head: whether `x` is per head.
    """
    if g is None:
        return torch.zeros_like(x)
    if per_head:
        return g.sum(0).to(x.dtype)
    heads = x.shape[2]
    if heads != HV:
        g = g.reshape(*x.shape[:2], heads, HV // heads, *x.shape[3:]).sum(3)
    return g.view(x.shape).to(x.dtype)
