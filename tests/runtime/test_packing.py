"""The chunk table of a packed batch is the loop over sequences and their chunks."""

from __future__ import annotations

import pytest
import torch
from chunkwise.runtime.packing import chunk_bound, chunk_table, token_sequences

LENGTHS = [(5,), (4, 4), (0, 3, 0, 0, 9, 1, 0), (0,), (0, 0, 0), (1,) * 7, (8, 0), (3, 13, 2)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("C", [1, 4, 16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunk_table(lengths: tuple[int, ...], C: int, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    rows = [(n, c) for n, length in enumerate(lengths) for c in range(-(-length // C))]
    offsets, table = chunk_table(cu_seqlens, sum(lengths), C)
    bound = chunk_bound(sum(lengths), len(lengths), C)
    assert len(rows) <= bound == len(table)
    assert table.tolist() == [*map(list, rows), *([[-1, -1]] * (bound - len(rows)))]
    counts = [-(-length // C) for length in lengths]
    assert offsets.tolist() == [sum(counts[:n]) for n in range(len(lengths) + 1)]
    assert offsets.dtype == table.dtype == torch.int32
    _, filled = chunk_table(cu_seqlens, sum(lengths), C, least=1)
    rows = [(n, c) for n, length in enumerate(lengths) for c in range(max(1, -(-length // C)))]
    assert filled.tolist() == [*map(list, rows), *([[-1, -1]] * (bound - len(rows)))]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_token_sequences(lengths: tuple[int, ...]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    want = [n for n, length in enumerate(lengths) for _ in range(length)]
    assert token_sequences(cu_seqlens, sum(lengths)).tolist() == want
