"""The one table of tolerances, and the one comparison: relative RMS and maximum error.

The numbers are those that the project promises, by the dtype of the values and by quantity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Relative RMS errors of o and final states, of gradients, and of gradients of gates, steps."""

    outputs: float
    gradients: float
    gates: float


BY_DTYPE = {
    torch.bfloat16: Tolerance(0.005, 0.008, 0.015),
    torch.float16: Tolerance(0.002, 0.004, 0.008),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-5),
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10),  # the eager engine, against the oracle
}
# gates to -20 mixed with gates near 0 (prefix sums lose digits), and float32 on a GPU
FLOAT32_HARD = Tolerance(1e-4, 1e-4, 1e-4)
# what float64 keeps of gradients that are random: ill-conditioned draws included
FLOAT64_RANDOM = Tolerance(1e-9, 1e-9, 1e-9)

# the largest single error, against the largest entry
MAXIMUM = 10.0
# below this, errors count absolutely (a gradient that vanishes has no relative error)
FLOOR = 1e-3

GATES = frozenset({"g", "w", "f", "dt", "slope", "beta", "i", "A_log", "dt_bias"})


def assert_agree(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: Tolerance | torch.dtype,
    *,
    gates: frozenset[str] = GATES,
) -> None:
    """Each tensor of `got` against that of `want`; a gradient of operand x is called dx."""
    if isinstance(tolerance, torch.dtype):
        tolerance = BY_DTYPE[tolerance]
    assert got.keys() == want.keys()
    wrong = []
    for name, y in want.items():
        x, y = got[name].double(), y.double()
        assert x.shape == y.shape, f"{name}: shape {list(x.shape)}, expected {list(y.shape)}"
        if y.numel() == 0:
            continue
        allowed = tolerance.outputs
        if name.startswith("d"):
            allowed = tolerance.gates if name[1:] in gates else tolerance.gradients
        rms = _rms(x - y) / max(_rms(y), FLOOR)
        worst = float((x - y).abs().max()) / max(float(y.abs().max()), FLOOR)
        # written so that a NaN is wrong
        if not (rms <= allowed and worst <= MAXIMUM * allowed):
            wrong.append(
                f"{name}: relative RMS error {rms:.1e}, maximum {worst:.1e}, not {allowed}"
            )
    assert not wrong, "\n".join(wrong)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
