"""Tuning from end to end: only a faster and right configuration wins; wrong ones are recorded."""

from __future__ import annotations

from pathlib import Path

import chunkwise.runtime.eager as eager_engine
import pytest
import torch
from chunkwise.autotune.deadline import Deadline
from chunkwise.autotune.plot import plot
from chunkwise.autotune.report import report
from chunkwise.autotune.search import Budget
from chunkwise.autotune.space import Point
from chunkwise.autotune.subject import Size, subject
from chunkwise.autotune.tunable import Part, Run
from chunkwise.autotune.tune import Task, Tuning, tune
from chunkwise.autotune.validation import validate, validation_suite
from chunkwise.codegen.config import Dims, EagerConfig
from chunkwise.dsl.library import by_name
from chunkwise.runtime.call import Call
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned.artifact import CallSize, Certificate, Configuration, Key, Versions
from chunkwise.runtime.tuned.machine import Machine
from optuna.storages import InMemoryStorage
from torch import Tensor

from tests.autotune.fake import DEFAULT, GENEROUS, Clock, Fake, Timed, made

FASTEST = made(32, 2)
KEY = Key("f" * 12, EngineName.EAGER, "float32", Dims(8, 8), Machine("cpu", "x", "a CPU", 1))
VERSIONS = Versions("0", "2")


def tuned(tunable: Fake, seconds: float = GENEROUS, device: Clock | None = None) -> Tuning:
    task = Task("fake", KEY, CallSize(2, 64), VERSIONS, InMemoryStorage(), "memory")
    device = device or Clock()
    return tune(tunable, (device, device), task, Budget(seconds, seed=1))


def test_the_fastest_wins_and_is_written_down_with_its_evidence() -> None:
    tuning = tuned(Fake())
    (kept,) = tuning.artifact.tuned
    assert kept.config == FASTEST
    assert kept.low_us <= kept.time_us <= kept.high_us < kept.default_us == pytest.approx(700, 0.02)
    assert [name for name, _ in kept.kernels] == ["a", "b"]
    assert kept.study.trials == tuning.findings.trials
    assert tuning.artifact.quarantine == ()
    assert "faster than the default, and right" in report(tuning)


def test_the_default_keeps_its_place_within_the_noise() -> None:
    class Close(Fake):
        def whole(self, config: Configuration) -> Run:
            return Timed(700.0 if config == DEFAULT else 693.0)

    tuning = tuned(Close())
    assert [t.config for t in tuning.artifact.tuned] == [DEFAULT]
    verdicts = {f.config: f.why for f in tuning.finalists}
    assert verdicts[FASTEST] == "not faster than the default by more than the noise"


def test_what_is_wrong_is_rejected_and_the_next_wins() -> None:
    tuning = tuned(Fake(wrong=lambda config: config == FASTEST))
    (rejected,) = tuning.artifact.quarantine
    assert rejected.config == FASTEST
    assert rejected.reason == "d k: wrong"
    assert rejected.versions == VERSIONS
    (kept,) = tuning.artifact.tuned
    assert kept.config not in (FASTEST, DEFAULT)
    assert "rejected: d k: wrong" in report(tuning)


def test_what_was_rejected_before_is_not_tried_again() -> None:
    before = frozenset({FASTEST})
    task = Task("fake", KEY, CallSize(2, 64), VERSIONS, InMemoryStorage(), "memory", before)
    tuning = tune(Fake(), (Clock(), Clock()), task, Budget(GENEROUS, seed=1))
    assert FASTEST not in {f.config for f in tuning.finalists}
    assert tuning.winner is not None
    assert tuning.winner.config != DEFAULT


def test_nothing_wins_where_everything_is_wrong() -> None:
    tuning = tuned(Fake(wrong=lambda config: True))
    assert tuning.winner is None
    assert tuning.artifact.tuned == ()
    assert DEFAULT in {r.config for r in tuning.artifact.quarantine}
    assert "nothing passed" in report(tuning)


def test_the_default_serves_where_nothing_could_be_measured() -> None:
    class Illegal(Fake):
        def excess(self, part: Part, point: Point) -> dict[str, float]:
            return {"too much": 1.0}

    tuning = tuned(Illegal())
    assert [t.config for t in tuning.artifact.tuned] == [DEFAULT]
    assert "nothing was measured" in report(tuning)


def test_nothing_is_examined_after_the_budget() -> None:
    tuning = tuned(Fake(), seconds=0.0)
    assert tuning.finalists == ()
    assert tuning.artifact.tuned == ()
    assert "winner" not in report(tuning)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(tuned(Fake()), tmp_path / "study.svg")
    assert "microseconds" in (tmp_path / "study.svg").read_text(encoding="utf-8")


# ---- faults planted in an engine -----------------------------------------------------------------


class Miscompiled:
    """The eager engine, whose gradient of k lacks its last chunk's first row."""

    def __init__(self, config: EagerConfig) -> None:
        self._config = config

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        return eager_engine.ENGINE.forward(call, self._config)

    def backward(
        self, call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        grads, initials = eager_engine.ENGINE.backward(call, do, dfinals, self._config)
        grads["k"] = grads["k"].clone()
        grads["k"][:, -1] = 0
        return grads, initials


class Undecided(Miscompiled):
    """The eager engine, whose output's last bit differs from run to run."""

    runs = 0

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, finals = super().forward(call)
        self.runs += 1
        return o * (1 + self.runs * 2.0**-23), finals

    def backward(
        self, call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        return eager_engine.ENGINE.backward(call, do, dfinals, self._config)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Miscompiled, "d k (ordinary)"), (Undecided, "two runs differ")]
)
def test_a_planted_fault_is_rejected(kind: type[Miscompiled], reason: str) -> None:
    """One configuration of a real engine is broken; it is the fastest, and must not win."""
    declaration, dims = by_name("delta_rule"), Dims(8, 8)
    suite = validation_suite(declaration, dims, torch.float32, torch.device("cpu"), tokens=80)

    class Planted(Fake):
        def validate(self, config: Configuration, deadline: Deadline) -> Certificate:
            runs = kind(EagerConfig(32))
            if config == FASTEST:
                return validate(suite, runs)
            return super().validate(config, deadline)

    tuning = tuned(Planted())
    (rejected,) = tuning.artifact.quarantine
    assert rejected.config == FASTEST
    assert reason in rejected.reason
    assert tuning.winner is not None
    assert tuning.winner.config != FASTEST


def test_a_real_engine_is_tuned_and_its_artifact_serves() -> None:
    about = subject(
        by_name("delta_rule"),
        EngineName.EAGER,
        Dims(8, 8),
        torch.float32,
        Size(1, 128, 2),
        torch.device("cpu"),
        chunks=(16, 64),
    )
    task = Task("delta_rule", about.key, about.call_size, VERSIONS, InMemoryStorage(), "memory")
    tuning = tune(about.tunable, about.devices, task, Budget(GENEROUS, seed=1))
    (kept,) = tuning.artifact.tuned
    assert kept.bucket == CallSize(2, 128)
    assert kept.config in (EagerConfig(16), EagerConfig(64))
    assert kept.certificate.ok
    assert {name for name, _ in kept.certificate.errors} >= {"o", "final S", "d q", "d initial S"}
