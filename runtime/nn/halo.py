"""What layers need of other ranks, where tokens are split over them: tokens before their own.

A short convolution and attention in a window need a few (their halo), other attention all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...dsl import errors
from ..call import boundaries
from ..packing import token_sequences
from ..rank_scan import swap
from ..ranks import compared, group_of, refuse_transforms
from ..shapes import Form, check_packing
from ..sizes import check_boundaries, refusal


def counted(x: Tensor, title: str, cu_seqlens: Tensor | None, group: object) -> tuple[int, ...]:
    """How many tokens each rank has.

    Args:
        x: this rank's tokens, `[B, T, channels]`; B and channels are those of every rank.
        title: what calls.
        cu_seqlens: boundaries of packed sequences in the tokens of all ranks.
        group: the ranks, in the order of their tokens.

    Raises:
        NoTransform: torch.func or forward mode looks on.
        BadShape: x has other axes.
        BadBatch, BadCuSeqlens: the boundaries do not pack the tokens of all ranks.
        RankMismatch: on every rank, if those of another rank are of another kind, or refused.
    """
    ranks, text, tokens, sizes = group_of(group), title, 0, dict[str, int]()
    refused: Exception | None = None
    try:
        refuse_transforms(title)
        if x.ndim != 3:
            raise errors.BadShape("x", x.shape, "[B,T,channels]")
        bounds = boundaries(cu_seqlens)
        if bounds is not None:
            check_packing(Form.of(bounds), x.shape[0], "x", x.device, refusal)
        text, tokens = f"{title} of {str(x.dtype)[6:]}", x.shape[1]
        sizes = {"B": x.shape[0], "channels": x.shape[2]}
    except Exception as why:  # `compared` tells the other ranks, and raises it here
        refused = why
    counts = compared(ranks, text, tokens, sizes, cu_seqlens, refused)
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, sum(counts))
    return tuple(counts)


def before(counts: tuple[int, ...], group: object) -> int:
    """How many tokens lie on the ranks before this one."""
    return sum(counts[: dist.get_rank(group_of(group))])


def with_halo(x: Tensor, count: int, group: object) -> Tensor:
    """`[B, count + T, channels]`: the `count` tokens before this rank's, and those; zeros before 0.

    Each rank sends to the next one and receives from the one before, forward, and the other way for
    gradients: every rank has to reach the backward. Parts may be shorter than `count`.

    Args:
        x: this rank's tokens, `[B, T, channels]`.
        count: how many before.
        group: the ranks, in the order of their tokens.
    """
    if not count:
        return x
    made: Tensor = _Halo.apply(x, count, group_of(group))  # type: ignore[no-untyped-call]
    return made


def with_all_before(x: Tensor, counts: tuple[int, ...], group: object) -> Tensor:
    """`[B, tokens, channels]`: all tokens of the ranks before this one, and this rank's.

    Every rank has to reach the backward.

    Args:
        x: this rank's tokens, `[B, T, channels]`.
        counts: how many each rank has.
        group: the ranks, in the order of their tokens.
    """
    made: Tensor = _Before.apply(x, counts, group_of(group))  # type: ignore[no-untyped-call]
    return made


def sequences(cu_seqlens: Tensor, counts: tuple[int, ...], group: object) -> tuple[Tensor, Tensor]:
    """The packed sequence of all tokens up to this rank's last, and their positions there."""
    ranks = group_of(group)
    end = sum(counts[: dist.get_rank(ranks) + 1])
    t = torch.arange(end, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = token_sequences(cu_seqlens, sum(counts))[:end]
    return sequence, t - cu_seqlens[sequence]


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        rank, T = dist.get_rank(group), x.shape[1]
        mine = F.pad(x, (0, 0, 0, max(counts) - T)).contiguous()
        every = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(every, mine, group)
        return torch.cat([every[n][:, : counts[n]] for n in range(rank + 1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmade: Tensor) -> tuple[Tensor, None, None]:
        counts, group = ctx.counts, ctx.group
        rank, (B, _, channels) = dist.get_rank(group), dmade.shape
        every = dmade.new_zeros(len(counts), B, max(counts), channels)
        for n, part in enumerate(dmade.split(counts[: rank + 1], 1)):
            every[n, :, : counts[n]] = part
        mine = torch.empty_like(every[0])
        dist.reduce_scatter(mine, [*every], group=group)
        return mine[:, : counts[rank]], None, None


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
