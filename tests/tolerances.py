"""Compares results with the oracle's in tests, by the project's table of tolerances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from chunkwise.autotune.tolerance import (
    BY_DTYPE,
    FLOAT32_HARD,
    ROUNDINGS,
    Tolerance,
    relative_errors,
    within,
)
from torch import Tensor

__all__ = [
    "BY_DTYPE",
    "FLOAT32_HARD",
    "FLOAT64_RANDOM",
    "GATES",
    "OF_A_CHUNK",
    "Tolerance",
    "assert_agree",
]

# what float64 keeps of gradients that are random: ill-conditioned draws included
FLOAT64_RANDOM = Tolerance(1e-9, 1e-9, 1e-9)

# a chunk of 16 tokens or more rounds about as often as it has tokens, where the token loop adds to
# a state that has forgotten most of what was written before
OF_A_CHUNK = 16.0

GATES = frozenset({"g", "w", "f", "dt", "slope", "beta", "i", "A_log", "dt_bias"})


def assert_agree(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: Tolerance | torch.dtype,
    *,
    gates: frozenset[str] = GATES,
    near: Mapping[str, Tensor] | None = None,
    roundings: float = ROUNDINGS,
) -> None:
    """Assert that each tensor of `got` is near that of `want`; the gradient of x is named dx.

    `near` has the oracle's results for operands that differ by less than the resolution of their
    dtype (or for operands in that dtype). Where this changes a result by more than the tolerance,
    `roundings` times the change is allowed.
    """
    if isinstance(tolerance, torch.dtype):
        tolerance = BY_DTYPE[tolerance]
    assert got.keys() == want.keys()
    wrong = []
    for name, y in want.items():
        x = got[name]
        assert x.shape == y.shape, f"{name}: shape {list(x.shape)}, expected {list(y.shape)}"
        allowed = tolerance.outputs
        if name.startswith("d"):
            allowed = tolerance.gates if name[1:] in gates else tolerance.gradients
        if near is not None:
            allowed = max(allowed, roundings * relative_errors(near[name], y)[0])
        rms, worst = relative_errors(x.to(y.device), y)
        if not within(rms, worst, allowed):
            wrong.append(
                f"{name}: relative RMS error {rms:.1e}, maximum {worst:.1e}, not {allowed}"
            )
    assert not wrong, "\n".join(wrong)
