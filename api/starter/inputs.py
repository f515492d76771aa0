"""Operands for calls of `my_rule`, by name: for the test and the benchmark.

An operand that you declare in my_rule.py joins here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def operands(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Tensors of B sequences with T tokens and H heads, in the order of the declaration."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(B, T, H, *size, generator=random, dtype=dtype)

    return {
        "q": normalize(normal(K), dim=-1),  # a Key: [B, T, H, K]
        "k": normalize(normal(K), dim=-1),
        "v": normal(V),  # a Value: [B, T, H, V]
        "g": -normal().sigmoid(),  # a Scalar: [B, T, H]; log-decays are at most 0
        "beta": normal().sigmoid(),  # step sizes lie in (0, 1)
    }
