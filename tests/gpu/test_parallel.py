"""Recurrences split over the GPUs of one host by NCCL are those of one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
NAMES = ["gated_delta_rule", "kda", "linear_attention", "mlstm"]
SIZES = {"H": 2, "HV": 4, "K": 64, "V": 64, "initial": True, "device": "cuda"}
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "whole": ([3000, 2600], {"B": 2, "T": 5600}),
    "packed": ([2500, 2300], {"B": 1, "T": 4800, "lengths": (700, 0, 3900, 200)}),
}
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_gpus_are_one(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    parts, sizes = CASES[case]
    given = {**SIZES, **sizes, "dtype": dtype, "gate_dtype": torch.float32}
    found = ranks.run(ranks.errors_of, 2, tmp_path, NAMES, given, "triton", parts, backend="nccl")
    for rank, by_name in enumerate(found):
        for name, differences in by_name.items():
            for result, far in differences.items():
                assert far <= LIMITS[dtype], (rank, name, result, far)
