"""Calls as kernels see them, in refined time: a row is one micro-step of a token.

The chunk form of several micro-steps is that of one over n times as many rows (codegen/chunk.py).
Row m of a token has entry m of each tuple, so operands lose their axis of micro-steps here, also
where it is of length 1; operands of tokens are repeated for the rows of each token. The output is
what the last row of each token reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..dsl.ir import Per
from ..dsl.normal_form import Operand
from .call import Call


def rows_per_token(call: Call) -> int:
    """How many micro-steps a token takes."""
    return len(call.form.micro_steps)


def refined(call: Call) -> Call:
    """`call` over rows; itself where no operand is a tuple and a token is a row."""
    n = rows_per_token(call)
    if n == 1 and not any(o.micro for o in call.form.operands):
        return call
    operands = dict(call.operands)
    for o in call.form.operands:
        make = as_rows(o, n)
        if make is not None:
            operands[o.name] = make(operands[o.name])
    cu_seqlens = call.cu_seqlens if n == 1 or call.cu_seqlens is None else call.cu_seqlens * n
    return replace(call, operands=operands, T=call.T * n, cu_seqlens=cu_seqlens)


def as_rows(o: Operand, n: int) -> Callable[[Tensor], Tensor] | None:
    """What makes rows of an operand's tensor, n of each token; None: it has them."""
    if o.micro:
        return lambda x: entries(x, n).flatten(1, 2)
    return None if n == 1 or o.per is Per.HEAD else lambda x: x.repeat_interleave(n, dim=1)


def entries(x: Tensor, n: int) -> Tensor:
    """`x [B,T,m,...]` as `[B,T,n,...]`: no row reads the entries cut off, or the zeros added."""
    padding = (*(0, 0) * (x.ndim - 3), 0, n - x.shape[2])
    return x if x.shape[2] == n else torch.nn.functional.pad(x, padding)


def coarse(call: Call, o: Tensor) -> Tensor:
    """The output of tokens from that of rows: `[B,T*n,...]` to `[B,T,...]`."""
    n = rows_per_token(call)
    return o if n == 1 else o[:, n - 1 :: n].contiguous()


def refined_cotangent(call: Call, do: Tensor) -> Tensor:
    """The gradient of the rows' output: that of a token in its last row, zero in the others."""
    n = rows_per_token(call)
    if n == 1:
        return do
    rows = torch.zeros((call.B, call.T * n, *do.shape[2:]), dtype=do.dtype, device=do.device)
    rows[:, n - 1 :: n] = do
    return rows


def coarse_gradient(o: Operand, T: int, micro: int, n: int) -> Callable[[Tensor], Tensor] | None:
    """What makes an operand's gradient of that of its rows, n of each token; None: it is."""
    if o.micro:
        return lambda g: entries(g.unflatten(1, (T, n)), micro)
    if n > 1 and o.per is Per.TOKEN:
        return lambda g: g.unflatten(1, (T, n)).sum(2)
    return None
