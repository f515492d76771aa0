"""The one table of tolerances, and how an error is measured: relative RMS, and the maximum.

The numbers are those that the project promises, by the dtype of the values and by quantity.
"""

from __future__ import annotations

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

# the largest single error, against the largest entry
MAXIMUM = 10.0
# below this, errors count absolutely (a gradient that vanishes has no relative error)
FLOOR = 1e-3


# kernels round in a handful of places more than their operands were rounded once
ROUNDINGS = 4.0


def wobbled(x: Tensor, random: torch.Generator) -> Tensor:
    """`x` in float64, each number off by up to half a unit in the last place of its dtype.

    Where that alone changes a result by about the tolerance (a sum of thousands of terms that
    cancel), no kernel can be nearer: `ROUNDINGS` times the change is allowed then.
    """
    drawn = torch.rand(x.shape, generator=random, dtype=torch.float64, device="cpu")
    noise = drawn.to(x.device) - 0.5
    return x.detach().double() * (1 + noise * torch.finfo(x.dtype).eps)


def relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """RMS and maximum error of `got`, each against that of `want`; 0 of nothing."""
    if want.numel() == 0:
        return 0.0, 0.0
    x, y = got.double(), want.double()
    rms = _rms(x - y) / max(_rms(y), FLOOR)
    return rms, float((x - y).abs().max()) / max(float(y.abs().max()), FLOOR)


def within(rms: float, maximum: float, limit: float) -> bool:
    """Whether such errors are allowed; a NaN is not."""
    return rms <= limit and maximum <= MAXIMUM * limit


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
