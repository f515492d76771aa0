"""Calls as kernels of the token form take them: what micro-steps have, as tensors of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..codegen.token import row_names

if TYPE_CHECKING:
    from .call import Call


def of_tokens(call: Call) -> Call:
    """`call` with the tensors of micro-steps apart, `[B,T,n,...]` as n of `[B,T,...]`."""
    if not any(o.micro for o in call.step.operands):
        return call
    operands: dict[str, Tensor] = {}
    for o in call.step.operands:
        names = row_names(o, call.micro)
        x = call.operands[o.name]
        operands |= dict(zip(names, x.unbind(2), strict=True)) if o.micro else {o.name: x}
    return replace(call, operands=operands)
