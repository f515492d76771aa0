"""The end of a tuning's time: work that would end after it is not begun."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment `at` of `time.monotonic`, in seconds; by default there is none.

    A run of a kernel and a compiler's library cannot be stopped. So each stage asks `allows` with
    the seconds that it expects to take before it begins, and works in steps as short as one run.
    """

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline in `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds until the deadline; below 0 after it."""
        return self.at - time.monotonic()

    def earlier(self, share: float) -> Deadline:
        """The moment when this share of the time that is left now will still be left."""
        return Deadline(self.at - share * max(self.left, 0.0))

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether work of that many seconds, begun now, ends before the deadline."""
        return self.left > seconds

    def check(self) -> None:
        """Raise TimeoutError if the deadline has passed."""
        if not self.allows():
            raise TimeoutError("the budget ended")


NEVER = Deadline()
