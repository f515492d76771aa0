"""The dtypes of printed kernels: by their names there, and by operand of a call."""

from __future__ import annotations

import torch

from ..codegen.config import Dims, Precision
from ..codegen.interface import Dtype, Signature
from ..codegen.token import token_kernel
from ..dsl.errors import NotLowered
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


def signature_of(
    dims: Dims, dtype: torch.dtype, dtypes: Dtypes, precision: Precision = Precision.IEEE
) -> Signature:
    """What kernels are printed for, from the dtypes of a call and of its operands."""
    named = tuple((name, PRINTED[d]) for name, d in dtypes)
    return Signature(dims, PRINTED[dtype], named, precision)


def printed_token_refusal(call: Call) -> str | None:
    """Why no kernel is printed for tokens like these; None if one is."""
    why = unsupported_dtype(dtypes_of(call))
    if why is not None:
        return why
    try:
        token_kernel(call.step, pooled=call.pool is not None)
    except NotLowered as refused:
        return refused.reason
    return None
