"""Calls as kernels take them: micro-steps as rows of their own, or as tensors of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..codegen.token import row_names
from ..dsl.ir import Per
from ..dsl.normal_form import Operand, has_entries_apart
from .rows import Rows

if TYPE_CHECKING:
    from .call import Call


def rows_of(call: Call, operand: Operand) -> Rows:
    """How kernels of chunks take an operand of `call`, or an entry of it that is apart."""
    micro = call.micro if operand.micro and not has_entries_apart(call.form) else None
    return Rows(len(call.form.micro_steps), micro, operand.per is Per.HEAD)


def expanded(call: Call) -> Call:
    """`call` over rows; itself where no operand is a tuple and a token is a row."""
    if has_entries_apart(call.form):
        return by_entry(call)
    n = len(call.form.micro_steps)
    if n == 1 and not any(o.micro for o in call.form.operands):
        return call
    operands = dict(call.operands)
    for o in call.form.operands:
        make = rows_of(call, o).make
        if make is not None:
            operands[o.name] = make(operands[o.name])
    cu_seqlens = call.cu_seqlens if n == 1 or call.cu_seqlens is None else call.cu_seqlens * n
    return replace(call, operands=operands, T=call.T * n, cu_seqlens=cu_seqlens)


def by_entry(call: Call) -> Call:
    """`call` with the entries of tuples apart: `[B,T,n,...]` as n tensors `[B,T,...]`."""
    if not any(o.micro for o in call.step.operands):
        return call
    operands: dict[str, Tensor] = {}
    for o in call.step.operands:
        names = row_names(o, call.micro)
        x = call.operands[o.name]
        operands |= dict(zip(names, x.unbind(2), strict=True)) if o.micro else {o.name: x}
    return replace(call, operands=operands)
