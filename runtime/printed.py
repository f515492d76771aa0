"""The dtypes of printed kernels: by their names there, and by operand of a call."""

from __future__ import annotations

import torch

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


def unsupported_dtype(dtypes: Dtypes) -> str | None:
    """The refusal of the first operand whose dtype no kernel takes; None if kernels take all."""
    for name, dtype in dtypes:
        if dtype not in PRINTED:
            return f"{name} is {dtype}; kernels take float32, bfloat16 and float16"
    return None
