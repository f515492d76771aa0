"""The search: what is tried next, compiled beside what is measured, until time or points run out.

Parts that the best alternatives need are tried most (in proportion to 1 / (1 + rank), ranked by
what is measured, and by the cost model before that), so a total always exists and gets better: the
search may be stopped at any moment. Within a part: first what it begins with, then what the model
of the study proposes, and whatever is left where that is little.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

from optuna.storages import BaseStorage

from .compilers import Compilers
from .measure import Device, race
from .space import Point, points
from .trials import Claim, Measured, Trials
from .tunable import Alternative, Built, Part, Run, Tunable

_FEW = 12  # points of a part: so few are all tried, in the cost model's order
_MISSES = 2  # proposals of what is known already, before the cost model's next is taken
_SPREAD = 0.1  # trials that an untried part is credited with: lower tries new parts sooner
_LEAST_LIMIT = 10.0  # seconds that a compilation may take, however small the budget
_FOR_RACE = 0.03  # of the budget, at most
_TOGETHER = 6  # candidates of one part in a race


@dataclass(frozen=True, slots=True)
class Budget:
    """When the search ends: after `seconds` at the latest. `exhaustive`: every point of every part.

    `workers`: compilations at a time. `seed`: of the proposals.
    """

    seconds: float
    workers: int = 1
    exhaustive: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """One alternative per role and the best point of each part; `us`: their times together."""

    chosen: tuple[tuple[str, Alternative], ...]
    points: tuple[tuple[str, Measured], ...]
    us: float


@dataclass(frozen=True, slots=True)
class Findings:
    """What the search learnt. `trials`: measured by anybody; `mine`: by this process.

    Attributes:
        combinations: whole configurations whose parts are all measured, the fastest first.
        parts: everything measured, by part.
        refused: how many configurations were refused, by reason.
        interrupted: whether Ctrl-C ended it.
    """

    combinations: tuple[Combination, ...]
    parts: tuple[tuple[Part, tuple[Measured, ...]], ...]
    refused: tuple[tuple[str, int], ...]
    trials: int
    mine: int
    seconds: float
    interrupted: bool


class Progress(Protocol):
    """Whoever watches."""

    def __call__(self, part: Part, us: float | None, best_us: float | None, trials: int) -> None:
        """A trial of `part` ended; `us` None if it was refused. `best_us`: the best total."""


def unwatched(part: Part, us: float | None, best_us: float | None, trials: int) -> None:
    """Nobody watches."""


@dataclass(slots=True)
class _State:
    """A part with what is known of it."""

    part: Part
    trials: Trials
    left: list[Point]  # legal, the most promising first
    legal: int
    measured: dict[Point, Measured]
    tried: int = 0
    misses: int = 0
    exhausted: bool = False
    codes: dict[str, float] = field(default_factory=dict)
    runs: dict[Point, Run] = field(default_factory=dict)

    @property
    def best(self) -> Measured | None:
        return min(self.measured.values(), key=lambda m: m.us, default=None)


def search(
    tunable: Tunable,
    device: Device,
    storage: BaseStorage,
    study: str,
    budget: Budget,
    progress: Progress = unwatched,
) -> Findings:
    """Try configurations of `tunable`'s parts; studies are called `study` and the part's key."""
    return _Search(tunable, device, storage, study, budget, progress).run()


class _Search:
    def __init__(
        self,
        tunable: Tunable,
        device: Device,
        storage: BaseStorage,
        study: str,
        budget: Budget,
        progress: Progress,
    ) -> None:
        self._tunable = tunable
        self._device = device
        self._storage = storage
        self._study = study
        self._budget = budget
        self._progress = progress
        self._started = time.monotonic()
        self._states: dict[str, _State] = {}
        self._guesses: dict[str, float] = {}
        self._refused: Counter[str] = Counter()
        self._claims: dict[tuple[str, Point], Claim] = {}
        self._mine = 0

    def run(self) -> Findings:
        interrupted = False
        try:
            limit = max(self._budget.seconds / 4, _LEAST_LIMIT)
            with Compilers[tuple[str, Point]](self._budget.workers, limit) as compilers:
                self._loop(compilers)
        except KeyboardInterrupt:
            interrupted = True
        for (key, _), claim in self._claims.items():
            self._states[key].trials.give_up(claim)
        for state in self._states.values():
            state.measured = state.trials.measured  # others may have learnt more
        return Findings(
            combinations=self._with_variants(self._combinations()),
            parts=tuple((s.part, tuple(s.measured.values())) for s in self._states.values()),
            refused=tuple(self._refused.most_common()),
            trials=sum(len(s.measured) for s in self._states.values()),
            mine=self._mine,
            seconds=time.monotonic() - self._started,
            interrupted=interrupted,
        )

    # ---- the loop --------------------------------------------------------------------------------

    def _loop(self, compilers: Compilers[tuple[str, Point]]) -> None:
        more = True
        while time.monotonic() - self._started < self._budget.seconds:
            while more and compilers.hungry:
                more = self._order(compilers)
            if not compilers.orders:
                return
            done: dict[str, list[tuple[Point, tuple[Built, ...]]]] = {}
            for (key, point), built in compilers.done(0.05):
                done.setdefault(key, []).append((point, built))
            for key, finished in done.items():
                self._learn(self._states[key], finished)

    def _order(self, compilers: Compilers[tuple[str, Point]]) -> bool:
        """Order the next configuration to be compiled; False if there is none."""
        while True:
            state = self._next_state()
            if state is None:
                return False
            claim = self._claim(state)
            if claim is not None:
                self._claims[state.part.key, claim.point] = claim
                compilers.order(
                    (state.part.key, claim.point), self._tunable.jobs(state.part, claim.point)
                )
                return True

    def _learn(self, state: _State, finished: list[tuple[Point, tuple[Built, ...]]]) -> None:
        """Measure what could be built, the best so far beside it, and record everything."""
        candidates: list[tuple[Point, Built]] = []
        for point, several in finished:
            built = next((b for b in several if b.error), several[0] if several else Built())
            if built.error is not None:
                self._refuse(state, point, {"compiles": 1.0}, built.error)
            elif built.code is not None and built.code in state.codes:
                self._record(state, point, state.codes[built.code], built, "machine code known")
            else:
                candidates.append((point, built))
        for n in range(0, len(candidates), _TOGETHER):
            self._race(state, candidates[n : n + _TOGETHER])

    def _race(self, state: _State, candidates: list[tuple[Point, Built]]) -> None:
        part, runs, racing = state.part, [], []
        for point, built in candidates:
            try:
                run = self._tunable.run(part, point)
                run()
            except RuntimeError as why:  # what a launch raises: too many resources, say
                self._refuse(state, point, {"launches": 1.0}, str(why).splitlines()[0])
                continue
            runs.append(run)
            racing.append((point, built))
        if not racing:
            return
        best = state.best
        beside = [state.runs[best.point]] if best is not None and best.point in state.runs else []
        timings = race(self._device, [*runs, *beside], seconds=_FOR_RACE * self._budget.seconds)
        for run, (point, built), timed in zip(runs, racing, timings, strict=False):
            if built.code is not None:
                state.codes[built.code] = timed.median
            state.runs[point] = run
            self._record(state, point, timed.median, built, None)
        fastest = state.best
        state.runs = {p: r for p, r in state.runs.items() if fastest and p == fastest.point}

    def _record(
        self, state: _State, point: Point, us: float, built: Built, why: str | None
    ) -> None:
        notes: dict[str, object] = {
            "registers": built.report.registers,
            "spills": built.report.spills,
            "shared": built.report.shared,
            "compile_seconds": round(built.seconds, 2),
            "why": why,
        }
        state.trials.finish(self._claims.pop((state.part.key, point)), us, notes)
        state.measured[point] = Measured(point, us, notes)
        self._mine += 1
        self._watch(state, us)

    def _refuse(self, state: _State, point: Point, excess: Mapping[str, float], why: str) -> None:
        state.trials.refuse(self._claims.pop((state.part.key, point)), excess, {"why": why})
        self._refused[why] += 1
        self._watch(state, None)

    def _watch(self, state: _State, us: float | None) -> None:
        best = next(iter(self._combinations(1)), None)
        self._progress(state.part, us, None if best is None else best.us, self._mine)

    # ---- which part, which point -----------------------------------------------------------------

    def _next_state(self) -> _State | None:
        """The part that has had fewest trials for its worth."""
        found: tuple[float, int, str] | None = None
        seen: set[str] = set()
        for rank, alternative in enumerate(self._ranked()):
            for key in alternative.parts:
                state = self._states.get(key)
                if key in seen or (state is not None and state.exhausted):
                    continue
                seen.add(key)
                worth = 1.0 if self._budget.exhaustive else 1 / (1 + rank)
                tried = 0 if state is None else state.tried
                candidate = ((tried + _SPREAD) / worth, rank, key)
                found = candidate if found is None or candidate < found else found
        return None if found is None else self._state(found[2])

    def _ranked(self) -> list[Alternative]:
        """The alternatives that may still win, by what can be reached through each."""
        times = {a: self._us(a) for a in self._tunable.alternatives}
        least: dict[tuple[str, str], float] = {}
        bounds: dict[tuple[str, str], float] = {}
        for a, us in times.items():
            at = (a.group, a.role)
            least[at] = min(us, least.get(at, us))
            bounds[at] = min(a.bound_us, bounds.get(at, a.bound_us))
        best = next(iter(self._combinations(1)), None)

        def beside(a: Alternative, of: Mapping[tuple[str, str], float]) -> float:
            return sum(us for at, us in of.items() if at[0] == a.group and at[1] != a.role)

        kept = [
            a
            for a in times
            if best is None or self._budget.exhaustive or a.bound_us + beside(a, bounds) < best.us
        ]
        return sorted(kept, key=lambda a: times[a] + beside(a, least))

    def _us(self, alternative: Alternative) -> float:
        """Its time: measured where it is, else guessed."""
        ratio = self._calibration()
        total = 0.0
        for key in alternative.parts:
            state = self._states.get(key)
            best = None if state is None else state.best
            total += self._guess(key) * ratio if best is None else best.us
        return total

    def _guess(self, key: str) -> float:
        if key not in self._guesses:
            part = self._tunable.part(key)
            first = part.first[0] if part.first else next(points(part.axes))
            self._guesses[key] = self._tunable.predicted_us(part, first)
        return self._guesses[key]

    def _calibration(self) -> float:
        """How much longer parts take than was guessed."""
        found = [(s.best, self._guess(k)) for k, s in self._states.items()]
        ratios = [best.us / guess for best, guess in found if best is not None and guess > 0]
        return statistics.median(ratios) if ratios else 1.0

    def _state(self, key: str) -> _State:
        if key not in self._states:
            part = self._tunable.part(key)
            legal = [p for p in points(part.axes) if not self._tunable.excess(part, p)]
            legal.sort(key=lambda p: self._tunable.predicted_us(part, p))
            trials = Trials(self._storage, f"{self._study}/{key}", part.axes, self._budget.seed)
            state = _State(part, trials, legal, len(legal), trials.measured)
            state.tried = len(state.measured)
            if not state.measured:
                for point in dict.fromkeys((*part.first, *legal[:1])):
                    if point in legal:
                        trials.propose(point)
            self._states[key] = state
        return self._states[key]

    def _claim(self, state: _State) -> Claim | None:
        """A configuration of the part that nobody has; None if there was none this time."""
        taken = state.trials.taken
        state.left = [p for p in state.left if p not in taken]
        if not state.trials.proposals:
            if not state.left:
                state.exhausted = True
                return None
            few = state.legal <= _FEW or len(state.left) <= _FEW // 2
            if few or self._budget.exhaustive or state.misses >= _MISSES:
                state.trials.propose(state.left[0])
                state.misses = 0
        claim = state.trials.claim()
        if claim is None:
            state.misses += 1
            return None
        excess = self._tunable.excess(state.part, claim.point)
        if excess:
            state.trials.refuse(claim, excess, {"why": ", ".join(excess)})
            state.misses += 1
            return None
        state.tried += 1
        return claim

    # ---- totals ----------------------------------------------------------------------------------

    def _combinations(self, most: int = 64) -> tuple[Combination, ...]:
        """Whole configurations whose parts are all measured, the fastest first."""
        totals: dict[tuple[str, str], list[tuple[float, Alternative]]] = {}
        for a in self._tunable.alternatives:
            best = [s.best if (s := self._states.get(k)) else None for k in a.parts]
            us = [m.us for m in best if m is not None]
            if len(us) == len(a.parts):
                totals.setdefault((a.group, a.role), []).append((sum(us), a))
        roles = list(dict.fromkeys(a.role for a in self._tunable.alternatives))
        found: list[tuple[float, tuple[Alternative, ...]]] = []
        for group in dict.fromkeys(a.group for a in self._tunable.alternatives):
            per_role = [sorted(totals.get((group, r), []), key=lambda x: x[0])[:4] for r in roles]
            for several in product(*per_role):
                found.append((sum(us for us, _ in several), tuple(a for _, a in several)))
        found.sort(key=lambda x: x[0])
        return tuple(self._combination(us, several) for us, several in found[:most])

    def _with_variants(self, found: tuple[Combination, ...]) -> tuple[Combination, ...]:
        """Also the fastest one with a part's second or third best point instead of its best."""
        variants = list(found)
        for best in found[:1]:
            for key, own in best.points:
                ranked = sorted(self._states[key].measured.values(), key=lambda m: m.us)
                for other in ranked[1:3]:
                    points = tuple((k, other if k == key else m) for k, m in best.points)
                    variants.append(Combination(best.chosen, points, best.us + other.us - own.us))
        return tuple(sorted(variants, key=lambda c: c.us))

    def _combination(self, us: float, several: Iterable[Alternative]) -> Combination:
        several = tuple(several)
        keys = dict.fromkeys(key for a in several for key in a.parts)
        best = {key: self._states[key].best for key in keys}
        return Combination(
            tuple((a.role, a) for a in several),
            tuple((key, m) for key, m in best.items() if m is not None),
            us,
        )
