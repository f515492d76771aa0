"""Tunes from end to end: search, race of the best against the default, validation, artifact.

The winner is faster than the default by more than the noise, measured on whole calls, and has
passed validation on this machine. A configuration that fails it is put in quarantine, with the
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial

from optuna.storages import BaseStorage

from ..runtime.tuned.artifact import (
    Artifact,
    CallSize,
    Certificate,
    Configuration,
    KernelReport,
    Key,
    Rejected,
    Study,
    Tuned,
    Versions,
)
from .compilers import Compilers
from .deadline import Deadline
from .leaderboard import Combination
from .measure import FEWEST, Device, Lineup, Timing, race
from .search import Budget, Findings, Progress, search, unwatched
from .space import Point
from .tunable import Job, Tunable

_FINALISTS = 3  # configurations of a heat, beside the default
_HEATS = 3  # heats at most: another one follows if validation rejected a finalist
_FOR_RACE = 0.1  # share of the budget
_LEAST_RACE = 1.0  # seconds
_FOR_FINALS = 0.35  # share of the budget: compiling whole configurations, races and validation
_FOR_VALIDATION = 1 / 3  # share of the finals' time that compilations and races leave to it
# what a deadline may cut
DID_NOT_RACE = "finalists that did not race"
_VALIDATIONS = "finalists that were not validated"


@dataclass(frozen=True, slots=True)
class Task:
    """A key and a size of call to tune for, and the storage of the trials.

    `storage_url` is for readers. The configurations `rejected` failed validation before, under the
    same versions, and cannot become finalists.
    """

    recurrence: str
    key: Key
    call_size: CallSize
    versions: Versions
    storage: BaseStorage
    storage_url: str
    rejected: frozenset[Configuration] = frozenset()

    @property
    def study(self) -> str:
        """The first part of its studies' names; times of equal names are comparable."""
        size = f"{self.call_size.rows}x{self.call_size.tokens}"
        return f"{self.recurrence}/{self.key.path.removesuffix('.json')}/{size}"


@dataclass(frozen=True, slots=True)
class Finalist:
    """A whole configuration in the race; `combination` is None for the default."""

    config: Configuration
    combination: Combination | None
    timing: Timing
    certificate: Certificate | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The results of a tuning; `winner` is None if no finalist passed validation.

    `cut`: the number of things that the budget left undone, by their names; empty if none.
    """

    findings: Findings
    finalists: tuple[Finalist, ...]
    winner: Finalist | None
    artifact: Artifact
    cut: tuple[tuple[str, int], ...] = ()


def tune(
    tunable: Tunable,
    devices: tuple[Device, Device],
    task: Task,
    budget: Budget,
    progress: Progress = unwatched,
    announce: Callable[[str], None] = lambda stage: None,
) -> Tuning:
    """Search, race and validate within the budget; `devices` time parts and whole calls.

    `announce` is told of each stage after the search. The budget is kept: its end stops
    compilations, and nothing begins that would end after it, by the durations seen before. Where
    the time was over before anything was measured, the default is not examined either, and nothing
    is kept.
    """
    parts, whole = devices
    deadline = Deadline.after(budget.seconds)
    within = replace(budget, seconds=budget.seconds * (1 - _FOR_FINALS))
    findings = search(tunable, parts, task.storage, task.study, within, progress)
    # without a measurement the default is examined only where the search had nothing left to try
    if findings.combinations or not findings.cut:
        with Compilers[int](budget.workers) as compilers:
            finals = _Finals(tunable, whole, compilers, budget.seconds, deadline)
            finals.hold(findings, task.rejected, announce)
        finalists, winner, cut = tuple(finals.finalists), finals.winner, finals.cut
    else:
        finalists, winner, cut = (), None, Counter()
    artifact = _artifact(task, findings, finalists, winner)
    return Tuning(findings, finalists, winner, artifact, (*findings.cut, *cut.items()))


Heat = Sequence[tuple[Configuration, Combination | None]]


@dataclass(slots=True, eq=False)
class _Finals:
    """Races of whole configurations against the default, and their validation."""

    _tunable: Tunable
    _device: Device
    _compilers: Compilers[int]
    _budget_s: float
    _deadline: Deadline
    finalists: list[Finalist] = field(default_factory=list)
    winner: Finalist | None = None
    cut: Counter[str] = field(default_factory=Counter)

    def hold(
        self,
        findings: Findings,
        rejected: frozenset[Configuration],
        announce: Callable[[str], None],
    ) -> None:
        """Heats, until one has no wrong finalist, or a right one that beats the default."""
        for heat in _heats(self._tunable, findings, rejected):
            stage = f"racing the default and {len(heat) - 1} others"
            if findings.interrupted:
                stage = f"interrupted: {stage} (Ctrl-C again leaves at once)"
            announce(stage)
            ranked = self._raced(heat)
            announce("validating the fastest")
            validated = self._validated(ranked)
            self.finalists += validated
            wrong = any(f.certificate is not None and not f.certificate.ok for f in validated)
            if not wrong or (self.winner is not None and self.winner.combination is not None):
                break
            if not self._deadline.allows():
                break

    def _raced(self, heat: Heat) -> list[Finalist]:
        """The finalists with their times, the fastest first.

        Left out are those that cannot run, and those for which no time is left; all of them where
        no time is left for the default.
        """
        likely = heat[-1 if len(heat) == 1 else 1][0]
        orders = [partial(self._tunable.whole_jobs, config) for config, _ in heat]
        # the validation suite is made while whole configurations compile
        orders.append(partial(self._tunable.validation_jobs, likely, self._deadline))
        by = self._deadline.earlier(_FOR_VALIDATION)
        late = self._late(orders, by)
        lineup = Lineup(by, rounds=FEWEST + 1)
        racing = []
        slowest = max((c.us for _, c in heat if c is not None), default=0.0)
        for n, (config, combination) in enumerate(heat):
            expected_s = (slowest if combination is None else combination.us) * 1e-6
            try:
                joins = n not in late and lineup.joins(self._tunable.whole(config), expected_s)
            except RuntimeError:  # a launch lacks resources, although the part ran by itself
                continue
            if joins:
                racing.append((config, combination))
                continue
            self.cut[DID_NOT_RACE] += 1
            if combination is None:
                return []
        seconds = min(_FOR_RACE * self._budget_s, max(self._deadline.left / 3, _LEAST_RACE))
        timings: list[Timing] = []
        if lineup.starts:
            with suppress(TimeoutError):  # another process measured all the time
                timings = race(
                    self._device,
                    lineup.runs,
                    seconds=seconds,
                    least=11,
                    most=44,
                    deadline=by,
                )
        if not timings:
            self.cut[DID_NOT_RACE] += len(racing)
        ranked = [
            Finalist(config, combination, timed)
            for (config, combination), timed in zip(racing, timings, strict=False)
        ]
        return sorted(ranked, key=lambda f: f.timing.median)

    def _validated(self, ranked: list[Finalist]) -> list[Finalist]:
        """The finalists with verdicts; the fastest that is surely faster and right wins."""
        default = next((f.timing for f in ranked if f.combination is None), None)
        validated: list[Finalist] = []
        winner: Finalist | None = None
        for f in ranked:
            if winner is not None:
                slower = f.timing.median / winner.timing.median - 1
                validated.append(replace(f, why=f"slower than the winner by {slower:.1%}"))
            elif f.combination is None or default is None or f.timing.surely_below(default):
                validated.append(self._examined(f))
                if (certificate := validated[-1].certificate) is not None and certificate.ok:
                    winner = validated[-1]
            else:
                why = "not faster than the default by more than the noise"
                if not (f.timing.enough and default.enough):
                    why = "the budget ended before its race did"
                validated.append(replace(f, why=why))
        self.winner = winner or self.winner
        return validated

    def _examined(self, f: Finalist) -> Finalist:
        """The finalist with its certificate, if the deadline leaves time for it."""
        try:
            jobs = partial(self._tunable.validation_jobs, f.config, self._deadline)
            if self._late([jobs], self._deadline):
                raise TimeoutError
            certificate = self._tunable.validate(f.config, self._deadline)
        except TimeoutError:
            self.cut[_VALIDATIONS] += 1
            return replace(f, why="the budget ended before its validation did")
        if not certificate.ok:
            return replace(f, certificate=certificate, why=f"rejected: {certificate.faults[0]}")
        own = f.combination is None
        why = "the default keeps its place" if own else "faster than the default, and right"
        return replace(f, certificate=certificate, why=why)

    def _late(self, orders: Sequence[Callable[[], tuple[Job, ...]]], by: Deadline) -> set[int]:
        """Wait until all jobs are compiled; the orders that are not by that deadline.

        A failure shows when the configuration runs.
        """
        late = set(range(len(orders)))
        for n, jobs in enumerate(orders):
            try:
                by.check()
                self._compilers.order(n, jobs())
            except TimeoutError:
                break
        while self._compilers.orders:
            late -= {n for n, _ in self._compilers.done(min(0.2, max(by.left, 0.0)))}
            if late and not by.allows():
                self._compilers.cancel()
        return late


def _heats(
    tunable: Tunable, findings: Findings, rejected: frozenset[Configuration]
) -> Iterator[list[tuple[Configuration, Combination | None]]]:
    """The default beside the best few, then beside the next few."""
    found: dict[Configuration, Combination | None] = {}
    for c in findings.combinations:
        points: dict[str, Point] = {key: m.point for key, m in c.points}
        found.setdefault(tunable.configuration(dict(c.chosen), points), c)
    found.pop(tunable.default, None)
    others = [(config, c) for config, c in found.items() if config not in rejected]
    for n in range(_HEATS):
        some = others[n * _FINALISTS : (n + 1) * _FINALISTS]
        if some or n == 0:
            yield [(tunable.default, None), *some]


def _artifact(
    task: Task, findings: Findings, finalists: Sequence[Finalist], winner: Finalist | None
) -> Artifact:
    rejected = tuple(
        Rejected(f.config, task.versions, "; ".join(f.certificate.faults))
        for f in finalists
        if f.certificate is not None and not f.certificate.ok
    )
    tuned = () if winner is None else (_tuned(task, findings, finalists, winner),)
    return Artifact(task.recurrence, task.key, tuned, rejected)


def _tuned(
    task: Task, findings: Findings, finalists: Sequence[Finalist], winner: Finalist
) -> Tuned:
    assert winner.certificate is not None
    timed = winner.timing
    # the default's time in the last heat, in which the winner ran
    default = next((f.timing.median for f in reversed(finalists) if f.combination is None), None)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    study = Study(now, findings.trials, round(findings.seconds, 1), task.storage_url)
    return Tuned(
        bucket=task.call_size,
        config=winner.config,
        time_us=round(timed.median, 2),
        low_us=round(timed.low, 2),
        high_us=round(timed.high, 2),
        default_us=None if default is None else round(default, 2),
        kernels=_reports(winner.combination),
        certificate=winner.certificate,
        versions=task.versions,
        study=study,
    )


def _reports(combination: Combination | None) -> tuple[tuple[str, KernelReport], ...]:
    """The time and resources of each kernel, from the trial that measured it."""
    if combination is None:
        return ()
    measured = dict(combination.points)
    reports = []
    for _, alternative in combination.chosen:
        for name, key in zip(alternative.kernels, alternative.parts, strict=True):
            m = measured[key]
            taken = [_number(m.notes.get(n)) for n in ("registers", "spills", "shared")]
            reports.append((name, KernelReport(round(m.us, 2), *taken)))
    return tuple(reports)


def _number(noted: object) -> int | None:
    return int(noted) if isinstance(noted, int) else None
