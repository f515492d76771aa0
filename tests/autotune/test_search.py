"""The search finds the best points, tries no illegal one, and survives killed workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
from chunkwise.autotune.search import Budget, Findings, search
from chunkwise.autotune.space import Point
from chunkwise.autotune.storage import open_storage, without_secrets
from chunkwise.autotune.trials import Trials
from chunkwise.autotune.tunable import Built, Part
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from tests.autotune.fake import (
    AXES,
    GENEROUS,
    TOO_MUCH,
    Clock,
    Fake,
    StoodStill,
    fails,
    legal,
    microseconds,
)

BEST: Point = (("chunk", 32), ("warps", 2))
PARTS = ("fast/a", "fast/b", "slow/a", "slow/b")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> StoodStill:
    """The search's clock: a search ends when a test has moved it, or when no points are left."""
    stood_still = StoodStill()
    for module in ("search", "deadline"):
        monkeypatch.setattr(f"chunkwise.autotune.{module}.time", stood_still)
    return stood_still


def found(tunable: Fake, **budget: object) -> Findings:
    storage = InMemoryStorage()
    return search(tunable, Clock(), storage, "test", Budget(GENEROUS, seed=1, **budget))  # type: ignore[arg-type]  # two fields by name


def test_finds_the_best_point_of_every_part() -> None:
    findings = found(Fake())
    best = findings.combinations[0]
    assert {m.point for _, m in best.points} == {BEST}
    assert [a.group for _, a in best.chosen] == ["fast", "fast"]
    expected = microseconds("fast/a", BEST) + microseconds("fast/b", BEST)
    assert best.us == pytest.approx(expected, rel=0.02)
    assert findings.mine == findings.trials == 4 * len(legal())


def test_tries_nothing_twice_and_nothing_illegal() -> None:
    measured: Counter[tuple[str, Point]] = Counter()

    def note(part: str, point: Point) -> None:
        measured[part, point] += 1

    found(Fake(note=note))
    assert set(measured.values()) == {1}
    assert {p for _, p in measured} == legal()


def test_begins_with_what_is_known_and_ends_in_time(clock: StoodStill) -> None:
    order: list[Point] = []
    first: Point = (("chunk", 128), ("warps", 1))

    def note(part: str, point: Point) -> None:
        order.append(point)
        clock.sleep(1)

    findings = search(
        Fake(note=note, first=(first,)), Clock(), InMemoryStorage(), "test", Budget(10, seed=1)
    )
    assert order[0] == first
    assert 9 <= findings.trials == findings.seconds <= 10 < 4 * len(legal())
    assert dict(findings.cut).keys() >= {"parts with configurations left to try"}


def test_the_model_proposes_and_learns_where_legality_ends() -> None:
    storage = InMemoryStorage()
    search(Fake(), Clock(), storage, "test", Budget(GENEROUS, seed=2))
    studies = [
        optuna.load_study(study_name=s.study_name, storage=storage)
        for s in optuna.get_all_study_summaries(storage=storage)
    ]
    assert {s.study_name for s in studies} == {
        f"test/{g}/{x}" for g in ("fast", "slow") for x in "ab"
    }
    for study in studies:
        for t in study.trials:
            illegal = tuple(t.params.items()) == TOO_MUCH
            assert (t.state is TrialState.PRUNED) == illegal
            assert ("too much" in t.constraints) == illegal


def test_what_does_not_compile_is_refused_with_its_reason() -> None:
    findings = found(Fake(jobs_of=(fails,)))
    assert findings.combinations == ()
    assert findings.refused == (("no such instruction", 4 * len(legal())),)


def test_equal_machine_code_is_measured_once() -> None:
    runs: Counter[str] = Counter()

    def note(part: str, point: Point) -> None:
        runs[part] += 1

    findings = found(Fake(note=note, jobs_of=(partial(Built, code="the same"),)))
    assert findings.trials == 4 * len(legal())
    # those that were compiled at the same time as the first could not know
    assert all(count <= 4 for count in runs.values())
    for _, measured in findings.parts:
        assert sum(m.notes.get("why") == "machine code known" for m in measured) >= 7


def test_what_cannot_be_launched_is_refused_with_its_reason() -> None:
    class Heavy(Fake):
        def run(self, part: Part, point: Point) -> object:  # type: ignore[override]  # a run that raises
            def launch() -> None:
                raise RuntimeError("out of resource: threads")

            return launch if point == BEST else super().run(part, point)

    findings = found(Heavy())
    assert findings.refused == (("out of resource: threads", 4),)
    assert all(m.point != BEST for m in dict(findings.combinations[0].points).values())


def test_ctrl_c_keeps_the_best_so_far() -> None:
    count = 0

    def note(part: str, point: Point) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    storage = InMemoryStorage()
    findings = search(Fake(note=note), Clock(), storage, "test", Budget(GENEROUS, seed=1))
    assert findings.interrupted
    assert findings.combinations
    for s in optuna.get_all_study_summaries(storage=storage):
        study = optuna.load_study(study_name=s.study_name, storage=storage)
        assert all(t.state is not TrialState.RUNNING for t in study.trials)


def test_resumes_where_it_ended(tmp_path: Path, clock: StoodStill) -> None:
    journal = str(tmp_path / "study.journal")
    tunable = Fake(note=lambda part, point: clock.sleep(1))
    first = search(tunable, Clock(), open_storage(journal), "test", Budget(10, seed=1))
    again = search(Fake(), Clock(), open_storage(f"journal://{journal}"), "test", Budget(GENEROUS))
    assert 0 < first.trials < again.trials == 4 * len(legal())
    assert again.mine == again.trials - first.trials


# ---- several processes ---------------------------------------------------------------------------


def start(journal: Path, spend: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.autotune.fake", str(journal), str(spend)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(journal: Path) -> list[str]:
    return journal.with_suffix(".measured").read_text(encoding="utf-8").splitlines()


def finished(journal: Path) -> dict[str, int]:
    """Finished trials by study."""
    storage = open_storage(str(journal))
    summaries = optuna.get_all_study_summaries(storage=storage)
    return {
        s.study_name: sum(
            t.state is TrialState.COMPLETE
            for t in optuna.load_study(study_name=s.study_name, storage=storage).trials
        )
        for s in summaries
    }


def test_two_processes_divide_the_work(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    workers = [start(journal, 0.01) for _ in range(2)]
    assert [w.wait(timeout=GENEROUS) for w in workers] == [0, 0]
    lines = measured(journal)
    assert sorted(lines) == sorted(f"{k} {p}" for k in PARTS for p in legal())
    assert finished(journal) == {f"fake/{k}": len(legal()) for k in PARTS}


def test_a_killed_search_loses_no_finished_trial(tmp_path: Path) -> None:
    """A worker is killed twenty times at random moments and started again each time."""
    journal = tmp_path / "study.journal"
    before: dict[str, int] = {}
    for n in range(20):
        forked = os.fork()
        if forked == 0:
            from tests.autotune.fake import worker

            worker(journal, 0.005)
            os._exit(0)
        time.sleep(0.03 + 0.013 * n)
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
        after = finished(journal)
        assert all(after[name] >= count for name, count in before.items())
        before = after
    from tests.autotune.fake import worker

    findings = worker(journal, 0.0)
    assert findings.trials == len(PARTS) * len(legal())
    assert finished(journal) == {f"fake/{k}": len(legal()) for k in PARTS}


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    trials = Trials(open_storage(str(journal)), "x", AXES, None)
    claim = trials.claim()
    assert claim is not None
    trials.finish(claim, 3.0, {})
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"op_code":4,"worker_id":"half a li')
    again = Trials(open_storage(str(journal)), "x", AXES, None)
    # a proposal that is known already is no claim
    another = next(claim for claim in iter(again.claim, "never") if claim is not None)
    again.finish(another, 4.0, {})
    assert sorted(
        m.us for m in Trials(open_storage(str(journal)), "x", AXES, None).measured.values()
    ) == [3.0, 4.0]


def test_secrets_are_not_written_down() -> None:
    url = "postgresql://tuner:secret@db:5432/studies"
    assert without_secrets(url) == "postgresql://db:5432/studies"
    assert without_secrets("journal:///a/b") == "journal:///a/b"
