"""Calls with several micro-steps, as calls in refined time: a row is one micro-step of a token.

The chunk form of such a step is that of one micro-step over n times as many rows
(codegen/chunk.py). Operands of tokens are repeated for the rows of each token, those of micro-steps
are rows already; the output is what the last row of each token reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..dsl.ir import Per
from .call import Call


def rows_per_token(call: Call) -> int:
    """How many micro-steps a token takes."""
    return len(call.form.micro_steps)


def refined(call: Call) -> Call:
    """`call` over rows; itself where a token is a row."""
    n = rows_per_token(call)
    if n == 1:
        return call
    operands = {}
    for o in call.form.operands:
        x = call.operands[o.name]
        if o.per is Per.TOKEN:
            x = x.flatten(1, 2) if o.micro else x.repeat_interleave(n, dim=1)
        operands[o.name] = x
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens * n
    return replace(call, operands=operands, T=call.T * n, cu_seqlens=cu_seqlens)


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


def coarse_gradients(call: Call, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the call's operands from those of its rows."""
    n = rows_per_token(call)
    if n == 1:
        return gradients
    result = {}
    for o in call.form.operands:
        g = gradients[o.name]
        if o.per is Per.TOKEN:
            g = g.unflatten(1, (call.T, n))
            g = g if o.micro else g.sum(2)
        result[o.name] = g
    return result
