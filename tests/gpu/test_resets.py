"""Decays of exactly 0 on a GPU: every spelling of a gate, one and eight in a chunk, in segments."""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch

from tests.codegen.test_resets import CASES, LIBRARY
from tests.harness import Sizes, engine_results, oracle_results, wobbled
from tests.resets import EIGHT, values_of, with_resets
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, assert_agree

pytestmark = pytest.mark.gpu

TOLERANCE = {**BY_DTYPE, torch.float32: FLOAT32_HARD}
GPU = Sizes(B=1, T=200, H=2, HV=4, K=64, V=64, initial=True, device="cuda")
PACKED = GPU.packed(75, 0, 7, 130)


def _agree(
    op: cw.Recurrence, sizes: Sizes, value: float, rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    gates = torch.float32 if dtype is not torch.float32 else None
    sizes = replace(sizes, dtype=dtype, gate_dtype=gates)
    inputs = with_resets(op, sizes, value, rows)
    near = oracle_results(op, wobbled(inputs)) if dtype is not torch.float32 else None
    got = engine_results(op, inputs, "triton")
    assert_agree(got, oracle_results(op, inputs), TOLERANCE[dtype], near=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "value", "rows"), CASES)
def test_resets(op: cw.Recurrence, value: float, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype is torch.float16 and op.__name__ == "mamba2":
        value = max(value, -1e3)  # a step size beyond, and the gradient of x, are none of float16
    _agree(op, PACKED if rows is EIGHT else GPU, value, rows, dtype)


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("op", LIBRARY, ids=lambda op: op.__name__)
@pytest.mark.usefixtures("in_segments")
def test_resets_in_segments(op: cw.Recurrence, at: int) -> None:
    """A state that is forgotten within a segment passes nothing on, and gets no gradient."""
    rows = (0, 5, 20, 63, 64, 127, 130)
    _agree(op, GPU, values_of(op)[at], rows, torch.float32)
