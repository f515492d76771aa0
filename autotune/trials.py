"""The trials of one part in an Optuna study that several processes and machines may share.

A worker claims a configuration by a trial. The storage numbers trials one by one, and of two trials
of one configuration the one with the lower number has it (Lamport's bakery algorithm: a worker
waits until every trial before its own has chosen). So each configuration is measured once, on any
storage. The running trials of a worker that died are failed, which frees their configurations.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from .space import Axis, Point

_STUDY_STARTUP = 6  # random proposals before the model's, warm starts counted
_CHOOSING = 5.0  # seconds: a worker that takes longer to choose is dead
_LEASE = 600.0  # seconds: a worker of another machine that takes longer to measure is dead
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, slots=True)
class Claim:
    """A configuration that this worker alone is to measure."""

    trial: optuna.Trial
    point: Point


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured point: its time in microseconds, and notes such as registers and spills."""

    point: Point
    us: float
    notes: Mapping[str, object]


class Trials:
    """The study of one part: its results, and the claims of points to measure."""

    def __init__(
        self, storage: BaseStorage, name: str, axes: tuple[Axis, ...], seed: int | None
    ) -> None:
        sampler = optuna.samplers.TPESampler(
            multivariate=True, n_startup_trials=_STUDY_STARTUP, seed=seed
        )
        self._study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, load_if_exists=True
        )
        self._names = [a.name for a in axes]
        self._axes = axes
        self.bury()

    def bury(self) -> None:
        """Fail the running trials of workers that died."""
        for t in self._all():
            if t.state is TrialState.RUNNING and _abandoned(t):
                self._fail(t.number)

    def propose(self, point: Point) -> None:
        """Queue `point` before the sampler's own proposals."""
        # the worker's name frees the point if this worker dies before claiming it
        self._study.enqueue_trial(dict(point), user_attrs={"worker": _me()})

    def claim(self) -> Claim | None:
        """The next proposal, or the sampler's choice; None if another worker has it already."""
        trial = self._study.ask()
        try:
            trial.set_user_attr("worker", _me())
            for axis in self._axes:
                trial.suggest_categorical(axis.name, axis.choices)
        except optuna.exceptions.UpdateFinishedTrialError:
            return None  # another worker took this one for dead
        point = self._point(trial.params)
        if self._has_rival(trial.number, point):
            trial.set_user_attr("why", "somebody else has this configuration")
            self._fail(trial.number)
            return None
        return Claim(trial, point)

    def finish(self, claim: Claim, us: float, notes: Mapping[str, object]) -> None:
        """Record a measurement, in microseconds."""
        self._tell(claim, notes, us)

    def refuse(
        self, claim: Claim, excess: Mapping[str, float], notes: Mapping[str, object]
    ) -> None:
        """Record that the configuration is infeasible: by which rules, and by how much."""
        for name, value in excess.items():
            claim.trial.set_constraint(name, value)
        self._tell(claim, notes, None)

    def give_up(self, claim: Claim) -> None:
        """Free the configuration for other workers."""
        self._fail(claim.trial.number)

    @property
    def measured(self) -> dict[Point, Measured]:
        """Every finished measurement."""
        return {
            p: Measured(p, float(t.values[0]), t.user_attrs)
            for t in self._all()
            if t.state is TrialState.COMPLETE
            for p in [self._point(t.params)]
        }

    @property
    def taken(self) -> set[Point]:
        """The points that are measured, refused, claimed or proposed."""
        known = [self._chosen(t) for t in self._all() if t.state is not TrialState.FAIL]
        return {p for p in known if p is not None}

    @property
    def proposals(self) -> int:
        """The number of unclaimed proposals."""
        return sum(t.state is TrialState.WAITING for t in self._all())

    def _all(self) -> Sequence[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _point(self, params: Mapping[str, int]) -> Point:
        return tuple((name, int(params[name])) for name in self._names)

    def _chosen(self, t: FrozenTrial) -> Point | None:
        """The trial's configuration; None while its worker is still choosing."""
        params = {**t.system_attrs.get("fixed_params", {}), **t.params}
        return self._point(params) if params.keys() >= set(self._names) else None

    def _has_rival(self, number: int, point: Point) -> bool:
        waited = time.monotonic() + _CHOOSING
        while True:
            before = [t for t in self._all() if t.number < number]
            before = [t for t in before if t.state is not TrialState.FAIL]
            if any(self._chosen(t) == point for t in before):
                return True
            choosing = [t for t in before if self._chosen(t) is None]
            choosing = [t for t in choosing if t.state not in _FINISHED]
            if not choosing:
                return False
            if time.monotonic() > waited:
                for t in choosing:
                    self._fail(t.number)
            time.sleep(0.002)

    def _tell(self, claim: Claim, notes: Mapping[str, object], us: float | None) -> None:
        try:
            for name, value in notes.items():
                if value is not None:
                    claim.trial.set_user_attr(name, value)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another worker took this one for dead, and will measure the point again
        state = TrialState.PRUNED if us is None else TrialState.COMPLETE
        self._study.tell(claim.trial.number, us, state, skip_if_finished=True)

    def _fail(self, number: int) -> None:
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _me() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _abandoned(t: FrozenTrial) -> bool:
    started = t.datetime_start or datetime.now()
    age = (datetime.now() - started).total_seconds()
    worker = t.user_attrs.get("worker")
    if worker is None:
        return age > _CHOOSING
    host, _, pid = str(worker).rpartition(":")
    if host != socket.gethostname():
        return age > _LEASE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # another user's process, but alive
    return False
