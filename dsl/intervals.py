"""Intervals, and interval analysis of the preamble: what is known of a gate before any data is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """The closed interval [lo, hi] of the extended reals."""

    lo: float = -math.inf
    hi: float = math.inf
