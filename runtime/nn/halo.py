"""What a short convolution needs of other ranks, where tokens are split over them: a few before."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing import token_sequences
from ..rank_scan import swap
from ..ranks import group_of, refuse_transforms, told


def with_halo(x: Tensor, count: int, group: object) -> Tensor:
    """`[B, count + T, channels]`: the `count` tokens before this rank's, and those; zeros before 0.

    Each rank sends to the next one and receives from the one before, forward, and the other way for
    gradients: every rank has to reach the backward. Parts may be shorter than `count`.

    Args:
        x: this rank's tokens, `[B, T, channels]`.
        count: how many before.
        group: the ranks, in the order of their tokens.

    Raises:
        NoTransform: torch.func or forward mode looks on.
    """
    refuse_transforms("a short convolution")
    made: Tensor = _Halo.apply(x, count, group_of(group))  # type: ignore[no-untyped-call]
    return made


def positions(cu_seqlens: Tensor, tokens: int, group: object) -> Tensor:
    """The position in its packed sequence of each of this rank's tokens, `[T]`.

    `cu_seqlens` are boundaries in the tokens of all ranks.
    """
    ranks = group_of(group)
    counts = [count for (count,) in told([tokens], ranks)]
    begin = sum(counts[: dist.get_rank(ranks)])
    t = torch.arange(begin, begin + tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return t - cu_seqlens[token_sequences(cu_seqlens, sum(counts))[begin : begin + tokens]]


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.count, ctx.group = count, group
        B, T, channels = x.shape
        made = x.new_zeros(B, count + T, channels)
        made[:, count:] = x
        before = made[:, :count].contiguous()
        if count <= T:
            swap(group, made[:, T:].contiguous(), 1, before)
            made[:, :count] = before
        else:  # what it sends is in part what it receives
            swap(group, None, 1, before)
            made[:, :count] = before
            swap(group, made[:, T:].contiguous(), 1, None)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmade: Tensor) -> tuple[Tensor, None, None]:
        count, group = ctx.count, ctx.group
        dmade = dmade.clone()
        T = dmade.shape[1] - count
        sent = torch.zeros_like(dmade[:, :count], memory_format=torch.contiguous_format)
        if count <= T:
            swap(group, dmade[:, :count].contiguous(), -1, sent)
            dmade[:, T:] += sent
        else:
            swap(group, None, -1, sent)
            dmade[:, T:] += sent
            swap(group, dmade[:, :count].contiguous(), -1, None)
        return dmade[:, count:], None, None
