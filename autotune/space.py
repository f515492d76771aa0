"""Search spaces as data: axes, points, and rules that say which points are legal and why.

A rule measures by how much a choice breaks it, so that the study's model learns where the legal
points end. It also carries its reason, for the tables that users read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

# the name and the value of every axis, in the order of the axes
Point = tuple[tuple[str, int], ...]
X = TypeVar("X")


@dataclass(frozen=True, slots=True)
class Axis:
    """A parameter, and the integers among which it is chosen."""

    name: str
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule(Generic[X]):
    """A condition on a choice, which holds where its `excess` (in any unit) is 0 or less."""

    name: str
    excess: Callable[[X], float]
    reason: str


def points(axes: tuple[Axis, ...]) -> Iterator[Point]:
    """Every point, in the order of the axes and their choices."""
    names = [a.name for a in axes]
    for values in product(*(a.choices for a in axes)):
        yield tuple(zip(names, values, strict=True))


def broken(rules: tuple[Rule[X], ...], choice: X) -> dict[str, float]:
    """The rules that `choice` breaks, by name, each with its excess; empty if it is legal."""
    excesses = {r.name: r.excess(choice) for r in rules}
    return {name: excess for name, excess in excesses.items() if excess > 0}


def text(point: Point) -> str:
    """A point for tables: `v_tile=64 warps=4`."""
    return " ".join(f"{name}={value}" for name, value in point)
