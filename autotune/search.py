"""The search chooses points, compiles and measures them, until the time or the points run out.

The deadline is kept: no trial is begun that would end after it by the durations of earlier ones,
compilations that still run are killed, and a compiled point is measured only where a call of it
still has time. The findings say what was cut.

The parts of the best alternatives get the most trials, in proportion to 1 / (1 + rank).
Alternatives are ranked by measured times, and by the cost model where nothing is measured yet. So a
complete configuration exists early and improves, and the search may be stopped at any moment.
Within a part, the search tries the part's first points, then the proposals of the study's model.
Where few points are left, it tries them all.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from optuna.storages import BaseStorage

from .compilers import Compilers
from .deadline import Deadline
from .leaderboard import Combination, Leaderboard, PartState
from .measure import Device, Lineup, Timing, race
from .space import Point, points
from .trials import Claim, Measured, Trials
from .tunable import Built, Part, Tunable

_FEW = 12  # a part with at most so many points is tried whole, in the cost model's order
_MISSES = 2  # proposals of known points, after which the cost model's next point is taken
_SPREAD = 0.1  # trials that an untried part is credited with: lower tries new parts sooner
_LEAST_LIMIT = 20.0  # seconds that a compilation may take, however small the budget
_FOR_RACE = 0.03  # share of the budget that one race takes at most
_TOGETHER = 6  # candidates of one part in a race
_RECENT = 8  # trials by whose durations the next one's is predicted
# what a deadline may cut
_COMPILATIONS = "configurations whose compilation was stopped"
_MEASUREMENTS = "configurations that were compiled but not measured"
_PARTS = "parts with configurations left to try"
_SUITE = "validation suites that were not made"


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of a search.

    Attributes:
        seconds: the time after which the search ends at the latest.
        workers: the number of compilations at a time.
        exhaustive: whether every point of every part is tried, in order.
        seed: the seed of the study's proposals.
    """

    seconds: float
    workers: int = 1
    exhaustive: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of a search.

    Attributes:
        combinations: whole configurations whose parts are all measured, the fastest first.
        parts: all measured points, by part.
        refused: the number of refused points, by reason.
        cut: the number of things that the deadline left undone, by their names; empty if none.
        trials, mine: measurements by all processes that share the study, and by this process.
        interrupted: whether Ctrl-C ended the search.
    """

    combinations: tuple[Combination, ...]
    parts: tuple[tuple[Part, tuple[Measured, ...]], ...]
    refused: tuple[tuple[str, int], ...]
    cut: tuple[tuple[str, int], ...]
    trials: int
    mine: int
    seconds: float
    interrupted: bool


class Progress(Protocol):
    """A callback that is told of each finished trial."""

    def __call__(self, part: Part, us: float | None, best_us: float | None, trials: int) -> None:
        """A trial of `part` took `us` (None: refused); the best total is `best_us`, both in us."""


def unwatched(part: Part, us: float | None, best_us: float | None, trials: int) -> None:
    """A progress callback that does nothing."""


def search(
    tunable: Tunable,
    device: Device,
    storage: BaseStorage,
    study: str,
    budget: Budget,
    progress: Progress = unwatched,
) -> Findings:
    """Search the parts of `tunable` within `budget`; a part's study is named `study`/key."""
    return _Search(tunable, device, storage, study, budget, progress).run()


@dataclass(slots=True, eq=False)
class _Search:
    _tunable: Tunable
    _device: Device
    _storage: BaseStorage
    _study: str
    _budget: Budget
    _progress: Progress
    _started: float = field(init=False)
    _deadline: Deadline = field(init=False)
    _refused: Counter[str] = field(default_factory=Counter)
    _cut: Counter[str] = field(default_factory=Counter)
    _claims: dict[tuple[str, Point], Claim] = field(default_factory=dict)
    _ordered: dict[tuple[str, Point], float] = field(default_factory=dict)
    _took: deque[float] = field(default_factory=partial(deque, maxlen=_RECENT))
    _mine: int = 0
    _leaderboard: Leaderboard = field(init=False)

    def __post_init__(self) -> None:
        self._started, self._leaderboard = time.monotonic(), Leaderboard(self._tunable)
        self._deadline = Deadline.after(self._budget.seconds)

    def run(self) -> Findings:
        interrupted = False
        try:
            limit = max(self._budget.seconds / 4, _LEAST_LIMIT)
            with Compilers[tuple[str, Point]](self._budget.workers, limit) as compilers:
                self._loop(compilers)
        except KeyboardInterrupt:
            interrupted = True
        for (key, _), claim in self._claims.items():
            self._leaderboard.states[key].trials.give_up(claim)
        for state in self._leaderboard.states.values():
            state.measured = state.trials.measured  # other processes may have measured more
        states = self._leaderboard.states.values()
        return Findings(
            combinations=self._leaderboard.with_variants(),
            parts=tuple((s.part, tuple(s.measured.values())) for s in states),
            refused=tuple(self._refused.most_common()),
            cut=tuple(self._cut.most_common()),
            trials=sum(len(s.measured) for s in states),
            mine=self._mine,
            seconds=time.monotonic() - self._started,
            interrupted=interrupted,
        )

    # ---- the loop --------------------------------------------------------------------------------

    def _loop(self, compilers: Compilers[tuple[str, Point]]) -> None:
        more, prepared = True, False
        while self._deadline.allows():
            while more and compilers.hungry and self._deadline.allows(self._expected_s):
                more = self._order(compilers)
            if not prepared:  # early: the finals must not find that it takes more than is left
                self._prepare()
                prepared = True
            if not compilers.orders:
                break
            done: dict[str, list[tuple[Point, tuple[Built, ...]]]] = {}
            for (key, point), built in compilers.done(0.05):
                done.setdefault(key, []).append((point, built))
            for key, finished in done.items():
                self._learn(self._leaderboard.states[key], finished)
        self._cut[_COMPILATIONS] += compilers.orders
        if more:
            self._cut[_PARTS] += self._leaderboard.unfinished
        self._cut = +self._cut  # without zeros

    @property
    def _expected_s(self) -> float:
        """Seconds from the order of a point until it is measured, by the last ones."""
        return statistics.median(self._took) if self._took else 0.0

    def _prepare(self) -> None:
        try:
            self._tunable.prepare(self._deadline)
        except TimeoutError:
            self._cut[_SUITE] += 1

    def _order(self, compilers: Compilers[tuple[str, Point]]) -> bool:
        """Order the compilation of the next point, if it can be claimed; False: none is left."""
        state = self._next_state()
        if state is None:
            return False
        claim = self._claim(state)
        if claim is not None:
            key = (state.part.key, claim.point)
            self._claims[key] = claim
            self._ordered[key] = time.monotonic()
            compilers.order(key, self._tunable.jobs(state.part, claim.point))
        return True

    def _learn(self, state: PartState, finished: list[tuple[Point, tuple[Built, ...]]]) -> None:
        """Measure the points that compiled, beside the best so far, and record every result."""
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

    def _race(self, state: PartState, candidates: list[tuple[Point, Built]]) -> None:
        part, best = state.part, state.best
        expected_s = 0.0 if best is None else best.us * 1e-6
        beside = [state.runs[best.point]] if best is not None and best.point in state.runs else []
        lineup = Lineup(self._deadline, round_s=expected_s * len(beside))
        racing: list[tuple[Point, Built]] = []
        for point, built in candidates:
            try:
                joined = lineup.joins(self._tunable.run(part, point), expected_s)
            except RuntimeError as why:  # a launch failed, for want of resources for example
                self._refuse(state, point, {"launches": 1.0}, str(why).splitlines()[0])
                continue
            if joined:
                racing.append((point, built))
            else:
                self._cut[_MEASUREMENTS] += 1
        seconds = _FOR_RACE * self._budget.seconds
        timings: list[Timing] = []
        if lineup.starts:
            with suppress(TimeoutError):  # another process measured all the time
                runs = [*lineup.runs, *beside]
                timings = race(self._device, runs, seconds=seconds, deadline=self._deadline)
        if not timings:
            self._cut[_MEASUREMENTS] += len(racing)
        for run, (point, built), timed in zip(lineup.runs, racing, timings, strict=False):
            if built.code is not None:
                state.codes[built.code] = timed.median
            state.runs[point] = run
            self._record(state, point, timed.median, built, None)
        fastest = state.best
        state.runs = {p: r for p, r in state.runs.items() if fastest and p == fastest.point}

    def _record(
        self, state: PartState, point: Point, us: float, built: Built, why: str | None
    ) -> None:
        notes: dict[str, object] = {
            "registers": built.report.registers,
            "spills": built.report.spills,
            "shared": built.report.shared,
            "compile_seconds": round(built.seconds, 2),
            "why": why,
            **built.notes,
        }
        key = (state.part.key, point)
        state.trials.finish(self._claims.pop(key), us, notes)
        self._took.append(time.monotonic() - self._ordered.pop(key))
        state.measured[point] = Measured(point, us, notes)
        self._mine += 1
        self._watch(state, us)

    def _refuse(
        self, state: PartState, point: Point, excess: Mapping[str, float], why: str
    ) -> None:
        key = (state.part.key, point)
        state.trials.refuse(self._claims.pop(key), excess, {"why": why})
        self._ordered.pop(key)
        self._refused[why] += 1
        state.refused += 1
        self._watch(state, None)

    def _watch(self, state: PartState, us: float | None) -> None:
        best = next(iter(self._leaderboard.combinations(1)), None)
        self._progress(state.part, us, None if best is None else best.us, self._mine)

    # ---- which part, which point -----------------------------------------------------------------

    def _next_state(self) -> PartState | None:
        """The part with the fewest trials in proportion to its weight; None if none is left."""
        found: tuple[float, int, str] | None = None
        seen: set[str] = set()
        for rank, alternative in enumerate(self._leaderboard.ranked(every=self._budget.exhaustive)):
            for key in alternative.parts:
                state = self._leaderboard.states.get(key)
                if key in seen or (state is not None and state.exhausted):
                    continue
                seen.add(key)
                worth = 1.0 if self._budget.exhaustive else 1 / (1 + rank)
                tried = 0 if state is None else state.tried
                untried = alternative.known and not tried  # to complete a configuration
                candidate = (0.0 if untried else (tried + _SPREAD) / worth, rank, key)
                found = candidate if found is None or candidate < found else found
        return None if found is None else self._state(found[2])

    def _state(self, key: str) -> PartState:
        if key not in self._leaderboard.states:
            part = self._tunable.part(key)
            legal = [p for p in points(part.axes) if not self._tunable.excess(part, p)]
            legal.sort(key=lambda p: self._tunable.predicted_us(part, p))
            trials = Trials(self._storage, f"{self._study}/{key}", part.axes, self._budget.seed)
            state = PartState(part, trials, legal, len(legal), trials.measured)
            state.tried = len(state.measured)
            if not trials.taken:
                for point in dict.fromkeys((*part.first, *legal[:1])):
                    if point in legal:
                        trials.propose(point)
            self._leaderboard.states[key] = state
        return self._leaderboard.states[key]

    def _claim(self, state: PartState) -> Claim | None:
        """A point of the part that no other worker has; None if this attempt found none."""
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
