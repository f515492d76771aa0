"""The values that a field may hold, written beside it as data: ranges of numbers, forms of text.

A configuration checks itself when it is made, so that none out of range reaches a printer; files
are checked against the same annotations (`runtime.tuned.json`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

from ..dsl import errors


class Limit(Protocol):
    """An annotation of a field's values; as text it names the values expected."""

    why: str

    def admits(self, value: Any) -> bool:
        """Whether a field may hold `value`, which has the field's type."""


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; `power`: of those the powers of two."""

    least: float
    most: float
    why: str = ""
    power: bool = False

    def admits(self, value: Any) -> bool:
        """As `Limit.admits`; NaN is admitted nowhere."""
        inside = bool(self.least <= value <= self.most)
        return inside and not (self.power and value & (value - 1))

    def __str__(self) -> str:
        return f"{'a power of two' if self.power else 'a number'} from {self.least} to {self.most}"


@dataclass(frozen=True)
class Form:
    """Text that a regular expression describes from end to end; `says`: the same in words."""

    pattern: str
    says: str
    why: str = ""

    def admits(self, value: Any) -> bool:
        """As `Limit.admits`."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.says


class Limited:
    """The base of dataclasses of integers that compare their fields' limits with them.

    Raises:
        BadConfiguration: one is no integer, or out of its range.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, limit in _limits(kind):
            value = getattr(self, name)
            if type(value) is not int or not limit.admits(value):
                field = f"{kind.__name__}.{name}"
                raise errors.BadConfiguration(field, value, str(limit), limit.why)


@lru_cache(maxsize=64)
def _limits(kind: Any) -> tuple[tuple[str, Limit], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (name, limit)
        for name, hint in hints.items()
        if get_origin(hint) is Annotated
        for limit in get_args(hint)[1:]
    )
