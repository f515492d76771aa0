"""Numbers that are not computed in 16 bits: norms, and what gates are made of."""

from __future__ import annotations

import torch
from torch import Tensor

L2_EPS = 1e-6  # added to sums of squares


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged in float64: norms and gates are not computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def l2norm(x: Tensor) -> Tensor:
    """`x * rsqrt(sum(x**2) + 1e-6)` over the last axis, in float32; returns x's dtype."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
