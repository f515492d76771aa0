"""Chunk tables of packed batches, built on the device: no launch of ours may wait for the host."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_bound(T: int, N: int, C: int) -> int:
    """The most chunks of length `C` that `N` sequences of total length `T` can need.

    A sequence of length l has ceil(l/C) <= floor(l/C) + 1 chunks, hence ceil(T/C) + N in all.
    """
    return -(-T // C) + N


def chunk_table(cu_seqlens: Tensor, T: int, C: int, *, least: int = 0) -> tuple[Tensor, Tensor]:
    """Which chunk of which sequence each program works on.

    Args:
        cu_seqlens: int32 or int64 `[N+1]`, the sequences' boundaries in a packed batch.
        T: total length, `cu_seqlens[-1]`; a host number, so that the bound needs no transfer.
        C: chunk length.
        least: chunks of an empty sequence, 0 or 1.

    Returns:
        `offsets`, int32 `[N+1]`: how many chunks the sequences before n have; and `table`, int32
        `[ceil(T/C)+N, 2]`: rows (sequence, chunk within it), and (-1, -1) beyond the last chunk.
    """
    device = cu_seqlens.device
    N = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    offsets = torch.zeros(N + 1, dtype=torch.int32, device=device)
    counts = torch.div(lengths + (C - 1), C, rounding_mode="floor")
    if least:
        counts.clamp_(min=least)
    offsets[1:] = torch.cumsum(counts, 0).to(torch.int32)
    index = torch.arange(chunk_bound(T, N, C), dtype=torch.int32, device=device)
    # right=True steps over empty sequences: several equal offsets, the last of them owns the chunk
    sequence = torch.searchsorted(offsets, index, right=True, out_int32=True) - 1
    chunk = index - offsets[sequence.clamp(max=N)]
    inside = (index < offsets[-1]).unsqueeze(1)
    table = torch.where(inside, torch.stack((sequence, chunk), dim=1), -1)
    return offsets, table


def token_sequences(cu_seqlens: Tensor, T: int) -> Tensor:
    """The sequence that each token of a packed batch belongs to: int64 `[T]`."""
    index = torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.contiguous(), index, right=True) - 1
