"""The tolerances that the project promises, and its measures of error: relative RMS and maximum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The relative RMS errors allowed.

    Attributes:
        outputs: of the output and of final states.
        gradients: of gradients.
        gates: of the gradients of gates and step sizes.
    """

    outputs: float
    gradients: float
    gates: float


BY_DTYPE = {
    torch.bfloat16: Tolerance(0.005, 0.008, 0.015),
    torch.float16: Tolerance(0.002, 0.004, 0.008),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-5),
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10),  # the eager engine, against the oracle
}
# for float32 on a GPU, and where gates of -20 meet gates near 0 (prefix sums lose digits)
FLOAT32_HARD = Tolerance(1e-4, 1e-4, 1e-4)

# the largest error, relative to the largest entry, may be so many times the limit of the RMS
MAXIMUM = 10.0
# below this magnitude errors are absolute: a gradient that vanishes has no relative error
FLOOR = 1e-3


# kernels round intermediate values a few more times than operands, which are rounded once
ROUNDINGS = 4.0


def wobbled(x: Tensor, random: torch.Generator) -> Tensor:
    """`x` in float64, each number changed by up to half a unit in the last place of its dtype.

    If this alone changes a result by about the tolerance (a sum of thousands of terms that cancel),
    no kernel can be more accurate; then `ROUNDINGS` times the change is allowed.
    """
    drawn = torch.rand(x.shape, generator=random, dtype=torch.float64, device="cpu")
    noise = drawn.to(x.device) - 0.5
    return x.detach().double() * (1 + noise * torch.finfo(x.dtype).eps)


def relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The RMS and maximum error of `got`, relative to those of `want`; 0 for empty tensors."""
    if want.numel() == 0:
        return 0.0, 0.0
    x, y = got.double(), want.double()
    rms = _rms(x - y) / max(_rms(y), FLOOR)
    return rms, float((x - y).abs().max()) / max(float(y.abs().max()), FLOOR)


def within(rms: float, maximum: float, limit: float) -> bool:
    """Whether errors as of `relative_errors` are within `limit`; a NaN is not."""
    return rms <= limit and maximum <= MAXIMUM * limit


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
