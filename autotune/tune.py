"""Tunes from end to end: search, race of the best against the default, validation, artifact.

The winner is faster than the default by more than the noise, measured on whole calls, and has
passed validation on this machine. A configuration that fails it is put in quarantine, with the
reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from .leaderboard import Combination
from .measure import Device, Timing, race
from .search import Budget, Findings, Progress, search, unwatched
from .space import Point
from .tunable import Job, Tunable

_FINALISTS = 3  # configurations of a heat, beside the default
_HEATS = 3  # heats at most: another one follows if validation rejected a finalist
_FOR_RACE = 0.1  # share of the budget
_LEAST_RACE = 1.0  # seconds
_FOR_FINALS = 0.35  # share of the budget: compiling whole configurations, races and validation


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
    """The results of a tuning; `winner` is None if no finalist passed validation."""

    findings: Findings
    finalists: tuple[Finalist, ...]
    winner: Finalist | None
    artifact: Artifact


def tune(
    tunable: Tunable,
    devices: tuple[Device, Device],
    task: Task,
    budget: Budget,
    progress: Progress = unwatched,
    announce: Callable[[str], None] = lambda stage: None,
) -> Tuning:
    """Search, race and validate within the budget; `devices` time parts and whole calls.

    `announce` is told of each stage after the search. Where the time was over before anything was
    measured, the default is not examined either, and nothing is kept.
    """
    parts, whole = devices
    deadline = time.monotonic() + budget.seconds
    within = replace(budget, seconds=budget.seconds * (1 - _FOR_FINALS))
    findings = search(tunable, parts, task.storage, task.study, within, progress)
    finalists: list[Finalist] = []
    winner: Finalist | None = None
    # without a measurement the default is examined only where the search had nothing left to try
    worthwhile = bool(findings.combinations) or findings.seconds < within.seconds
    heats = _heats(tunable, findings, task.rejected) if worthwhile else iter(())
    with Compilers[int](budget.workers) as compilers:
        for heat in heats:
            stage = f"racing the default and {len(heat) - 1} others"
            if findings.interrupted:
                stage = f"interrupted: {stage} (Ctrl-C again leaves at once)"
            announce(stage)
            left = deadline - time.monotonic()
            seconds = min(_FOR_RACE * budget.seconds, max(left / 3, _LEAST_RACE))
            ranked = _raced(tunable, whole, compilers, heat, seconds, deadline)
            announce("validating the fastest")
            validated, winner = _validated(tunable, compilers, ranked, deadline)
            finalists += validated
            rejected = any(f.certificate is not None and not f.certificate.ok for f in validated)
            if not rejected or (winner is not None and winner.config != tunable.default):
                break
            if time.monotonic() > deadline:
                break
    return Tuning(findings, tuple(finalists), winner, _artifact(task, findings, finalists, winner))


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


def _raced(
    tunable: Tunable,
    device: Device,
    compilers: Compilers[int],
    heat: list[tuple[Configuration, Combination | None]],
    seconds: float,
    deadline: float,
) -> list[Finalist]:
    """The finalists with their times, the fastest first.

    Those that cannot run are left out, and those that are not compiled by the deadline.
    """
    likely = heat[-1 if len(heat) == 1 else 1][0]
    orders = [partial(tunable.whole_jobs, config) for config, _ in heat]
    # the validation suite is made while whole configurations compile
    orders.append(partial(tunable.validation_jobs, likely))
    late = _late(compilers, orders, deadline)
    running = []
    for n, (config, combination) in enumerate(heat):
        if n in late and config != tunable.default:
            continue
        run = tunable.whole(config)
        try:
            run()
        except RuntimeError:  # a launch lacks resources, although the part ran with other operands
            continue
        running.append((config, combination, run))
    if not running:
        return []
    timings = race(device, [run for _, _, run in running], seconds=seconds, least=11, most=44)
    ranked = [
        Finalist(config, combination, timed)
        for (config, combination, _), timed in zip(running, timings, strict=True)
    ]
    return sorted(ranked, key=lambda f: f.timing.median)


def _validated(
    tunable: Tunable, compilers: Compilers[int], ranked: list[Finalist], deadline: float
) -> tuple[list[Finalist], Finalist | None]:
    """The finalists with verdicts, and the winner: the fastest that is surely faster and right."""
    default = next((f.timing for f in ranked if f.config == tunable.default), None)
    validated: list[Finalist] = []
    winner: Finalist | None = None
    for f in ranked:
        own = f.config == tunable.default
        if winner is not None:
            slower = f.timing.median / winner.timing.median - 1
            validated.append(replace(f, why=f"slower than the winner by {slower:.1%}"))
            continue
        if not own and default is not None and not f.timing.surely_below(default):
            validated.append(replace(f, why="not faster than the default by more than the noise"))
            continue
        if _late(compilers, [partial(tunable.validation_jobs, f.config)], deadline) and not own:
            validated.append(replace(f, why="the budget ended before its validation"))
            continue
        certificate = tunable.validate(f.config)
        if certificate.ok:
            why = "the default keeps its place" if own else "faster than the default, and right"
            winner = replace(f, certificate=certificate, why=why)
            validated.append(winner)
        else:
            why = f"rejected: {certificate.faults[0]}"
            validated.append(replace(f, certificate=certificate, why=why))
    return validated, winner


def _late(
    compilers: Compilers[int], orders: Sequence[Callable[[], tuple[Job, ...]]], deadline: float
) -> set[int]:
    """Wait until all jobs are compiled; the orders that are not by the deadline.

    A failure shows when the configuration runs.
    """
    late = set(range(len(orders)))
    for n, jobs in enumerate(orders):
        compilers.order(n, jobs())
    while compilers.orders:
        late -= {n for n, _ in compilers.done(0.2)}
        if late and time.monotonic() > deadline:
            compilers.cancel()
    return late


def _artifact(
    task: Task, findings: Findings, finalists: list[Finalist], winner: Finalist | None
) -> Artifact:
    rejected = tuple(
        Rejected(f.config, task.versions, "; ".join(f.certificate.faults))
        for f in finalists
        if f.certificate is not None and not f.certificate.ok
    )
    tuned = () if winner is None else (_tuned(task, findings, finalists, winner),)
    return Artifact(task.recurrence, task.key, tuned, rejected)


def _tuned(task: Task, findings: Findings, finalists: list[Finalist], winner: Finalist) -> Tuned:
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
