"""Arithmetic of intervals: bounds of a result from bounds of the arguments."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Interval:
    """The closed interval [lo, hi] of the extended reals."""

    lo: float = -math.inf
    hi: float = math.inf

    def __add__(self, other: Interval) -> Interval:
        lo, hi = self.lo + other.lo, self.hi + other.hi
        return Interval(-math.inf if math.isnan(lo) else lo, math.inf if math.isnan(hi) else hi)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        corners = [_times(a, b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return Interval(min(corners), max(corners))

    def __truediv__(self, other: Interval) -> Interval:
        return self * other.reciprocal()

    def __abs__(self) -> Interval:
        low, high = sorted((abs(self.lo), abs(self.hi)))
        return Interval(0.0 if self.lo <= 0.0 <= self.hi else low, high)

    def reciprocal(self) -> Interval:
        """The interval of 1 / x."""
        if self.lo < 0.0 < self.hi or (self.lo == self.hi == 0.0):
            return Interval()
        if self.lo >= 0.0:
            upper = math.inf if self.lo == 0.0 else 1.0 / self.lo
            return Interval(1.0 / self.hi, upper).finite()
        return Interval(-math.inf if self.hi == 0.0 else 1.0 / self.hi, 1.0 / self.lo).finite()

    def larger(self, other: Interval) -> Interval:
        """The interval of the larger of two numbers."""
        return Interval(max(self.lo, other.lo), max(self.hi, other.hi))

    def smaller(self, other: Interval) -> Interval:
        """The interval of the smaller of two numbers."""
        return Interval(min(self.lo, other.lo), min(self.hi, other.hi))

    def meet(self, other: Interval) -> Interval:
        """The numbers in both; `other` where they do not meet (a promise overrides)."""
        lo, hi = max(self.lo, other.lo), min(self.hi, other.hi)
        return Interval(lo, hi) if lo <= hi else other

    def finite(self) -> Interval:
        """An inner end that overflowed is a large number: an infinite one would not be sound."""
        return Interval(min(self.lo, _LARGEST), max(self.hi, -_LARGEST))

    def inside(self, lo: float, hi: float) -> bool:
        return lo <= self.lo and self.hi <= hi


def _times(a: float, b: float) -> float:
    """a*b where 0 times infinity is 0: a corner of a product of intervals."""
    return 0.0 if a == 0.0 or b == 0.0 else a * b


def increasing(
    function: Callable[[float], float], low: float = -math.inf, high: float = math.inf
) -> Callable[[Interval], Interval]:
    """The interval of an increasing function.

    `low`: its limit at -infinity or below its domain; `high`: its limit at infinity.
    """

    def at(x: float) -> float:
        if math.isinf(x):
            return low if x < 0 else high
        try:
            return function(x)
        except OverflowError:
            return high
        except ValueError:  # below the domain of log or sqrt
            return low

    return lambda x: Interval(at(x.lo), at(x.hi))
