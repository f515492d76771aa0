"""Ranks the alternatives by the sums of their parts' times, measured or predicted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from .space import Point, points
from .trials import Measured, Trials
from .tunable import Alternative, Part, Run, Tunable

_PER_ROLE = 4  # the fastest alternatives of a role, which are combined with other roles'


@dataclass(frozen=True, slots=True)
class Combination:
    """An alternative per role and a point per part; `us` is the sum of their times."""

    chosen: tuple[tuple[str, Alternative], ...]
    points: tuple[tuple[str, Measured], ...]
    us: float


@dataclass(slots=True)
class PartState:
    """A part, its study, and the results of this search.

    Attributes:
        left, legal: the legal points left to try, the most promising first; their initial number.
        tried, refused, misses: counts of claimed points, refusals, and fruitless proposals.
        codes: the time by digest of the machine code: equal code is not measured twice.
        runs: the fastest point's run, which is measured again beside new points.
    """

    part: Part
    trials: Trials
    left: list[Point]
    legal: int
    measured: dict[Point, Measured]
    tried: int = 0
    refused: int = 0
    misses: int = 0
    exhausted: bool = False
    codes: dict[str, float] = field(default_factory=dict)
    runs: dict[Point, Run] = field(default_factory=dict)

    @property
    def best(self) -> Measured | None:
        return min(self.measured.values(), key=lambda m: m.us, default=None)


class Leaderboard:
    """The states of a tunable's parts, and the ranking of its alternatives that follows."""

    def __init__(self, tunable: Tunable) -> None:
        self._tunable = tunable
        self._guesses: dict[str, float] = {}
        self.states: dict[str, PartState] = {}

    def ranked(self, *, every: bool = False) -> list[Alternative]:
        """The alternatives that may still win, the one with the best attainable total first.

        `every` includes the alternatives whose lower bound exceeds the best total.
        """
        times = {a: self._us(a) for a in self._tunable.alternatives if not self._hopeless(a)}
        least: dict[tuple[str, str], float] = {}
        bounds: dict[tuple[str, str], float] = {}
        for a, us in times.items():
            at = (a.group, a.role)
            least[at] = min(us, least.get(at, us))
            bounds[at] = min(a.bound_us, bounds.get(at, a.bound_us))
        best = next(iter(self.combinations(1)), None)

        def beside(a: Alternative, of: Mapping[tuple[str, str], float]) -> float:
            return sum(us for at, us in of.items() if at[0] == a.group and at[1] != a.role)

        kept = [
            a for a in times if best is None or every or a.bound_us + beside(a, bounds) < best.us
        ]
        return sorted(kept, key=lambda a: times[a] + beside(a, least))

    @property
    def unfinished(self) -> int:
        """The number of parts that may have points left to try."""
        keys = {key for a in self._tunable.alternatives for key in a.parts}
        return sum(key not in self.states or not self.states[key].exhausted for key in keys)

    def _hopeless(self, alternative: Alternative) -> bool:
        """Whether one of its parts has no points left, and none of them ran."""
        states = [self.states.get(key) for key in alternative.parts]
        return any(s is not None and s.exhausted and s.best is None for s in states)

    def _us(self, alternative: Alternative) -> float:
        """Its time in microseconds: parts that are not measured count as predicted."""
        ratio = self._calibration()
        total = 0.0
        for key in alternative.parts:
            state = self.states.get(key)
            best = None if state is None else state.best
            if best is not None:
                total += best.us
            else:  # each refusal makes a part less promising
                refused = 0 if state is None else state.refused
                total += self._guess(key) * ratio * (1 + refused)
        return total

    def _guess(self, key: str) -> float:
        if key not in self._guesses:
            part = self._tunable.part(key)
            first = part.first[0] if part.first else next(points(part.axes))
            self._guesses[key] = self._tunable.predicted_us(part, first)
        return self._guesses[key]

    def _calibration(self) -> float:
        """The median ratio of measured to predicted times."""
        found = [(s.best, self._guess(k)) for k, s in self.states.items()]
        ratios = [best.us / guess for best, guess in found if best is not None and guess > 0]
        return statistics.median(ratios) if ratios else 1.0

    def combinations(self, most: int = 64) -> tuple[Combination, ...]:
        """Whole configurations whose parts are all measured, the fastest first."""
        totals: dict[tuple[str, str], list[tuple[float, Alternative]]] = {}
        for a in self._tunable.alternatives:
            best = [s.best if (s := self.states.get(k)) else None for k in a.parts]
            us = [m.us for m in best if m is not None]
            if len(us) == len(a.parts):
                totals.setdefault((a.group, a.role), []).append((sum(us), a))
        roles = list(dict.fromkeys(a.role for a in self._tunable.alternatives))
        found: list[tuple[float, tuple[Alternative, ...]]] = []
        for group in dict.fromkeys(a.group for a in self._tunable.alternatives):
            per_role = [
                sorted(totals.get((group, r), []), key=lambda x: x[0])[:_PER_ROLE] for r in roles
            ]
            for several in product(*per_role):
                found.append((sum(us for us, _ in several), tuple(a for _, a in several)))
        found.sort(key=lambda x: x[0])
        return tuple(self._combination(us, several) for us, several in found[:most])

    def with_variants(self) -> tuple[Combination, ...]:
        """The combinations, and the fastest one with one part's second or third best point."""
        found = self.combinations()
        variants = list(found)
        for best in found[:1]:
            for key, own in best.points:
                ranked = sorted(self.states[key].measured.values(), key=lambda m: m.us)
                for other in ranked[1:3]:
                    points = tuple((k, other if k == key else m) for k, m in best.points)
                    variants.append(Combination(best.chosen, points, best.us + other.us - own.us))
        return tuple(sorted(variants, key=lambda c: c.us))

    def _combination(self, us: float, several: tuple[Alternative, ...]) -> Combination:
        keys = dict.fromkeys(key for a in several for key in a.parts)
        best = {key: self.states[key].best for key in keys}
        return Combination(
            tuple((a.role, a) for a in several),
            tuple((key, m) for key, m in best.items() if m is not None),
            us,
        )
