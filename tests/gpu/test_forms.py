"""The later chunk forms on a GPU: groups, cascades, reads over either axis, the literature's."""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch

from tests.codegen import (
    test_axes,
    test_cascades,
    test_columns,
    test_groups,
    test_literature,
    test_outputs,
    test_rows,
)
from tests.harness import Sizes, engine_results, make_inputs, oracle_results, wobbled
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, ROUNDINGS, assert_agree

pytestmark = pytest.mark.gpu

OPS = {
    **test_axes.OPS,
    **test_groups.RULES,
    **test_cascades.RULES,
    **test_rows.RULES,
    **test_outputs.RULES,
    **test_columns.RULES,
    **{n: op for n, (op, _, _) in test_literature.PAPERS.items()},
}
SIZES = {n: sizes for n, (_, _, sizes) in test_literature.PAPERS.items()}
SIZES["second_order"] = {"K": 64, "V": 64}  # its key comes as a Key and as a Value

_GPU = Sizes(B=1, T=150, H=2, HV=2, K=64, V=64, initial=True, device="cuda")
CASES = {
    "bfloat16": (
        replace(_GPU, dtype=torch.bfloat16, gate_dtype=torch.float32),
        BY_DTYPE[torch.bfloat16],
    ),
    "float32, packed": (
        replace(_GPU, dtype=torch.float32, HV=4, K=40, V=72).packed(0, 63, 1, 65, 64, 7),
        FLOAT32_HARD,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPS)
def test_form(name: str, case: str) -> None:
    """Outputs, final states and gradients are the token loop's; two runs agree bit for bit."""
    op: cw.Recurrence = OPS[name]
    sizes, limit = CASES[case]
    inputs = make_inputs(op, replace(sizes, **SIZES.get(name, {})))
    got = engine_results(op, inputs, "triton")
    want = oracle_results(op, inputs)
    near = oracle_results(op, wobbled(inputs))
    roundings = ROUNDINGS * len(op.declaration.states)  # a quotient of two reads carries both's
    assert_agree(got, want, limit, near=near, roundings=roundings)
    again = engine_results(op, inputs, "triton")
    assert all(torch.equal(again[n], x) for n, x in got.items()), "two runs differ"
