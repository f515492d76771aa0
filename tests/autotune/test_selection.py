"""Selection depends on the size of a call and on the files, and on nothing else."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
from chunkwise.autotune import store
from chunkwise.codegen.config import Config, Dims
from chunkwise.dsl import errors
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned.artifact import Artifact, CallSize, Crossover, Key
from chunkwise.runtime.tuned.machine import Machine
from chunkwise.runtime.tuned.selection import Nearness, _trusted, find, nearest, select_config
from hypothesis import given
from hypothesis import strategies as st

from tests.autotune.artifacts import (
    A100,
    ARTIFACT,
    CONFIG,
    H100,
    H200,
    KEY,
    config,
    rejected,
    tuned,
)

sizes = st.builds(CallSize, st.integers(1, 1 << 20), st.integers(1, 1 << 20))
some = st.lists(sizes, min_size=1, max_size=8, unique=True)


def _artifact(buckets: list[CallSize], key: Key = KEY) -> Artifact:
    entries = tuple(tuned(b.rows, b.tokens, config(1 << n)) for n, b in enumerate(buckets))
    return Artifact("name", key, entries)


@given(some, sizes, st.randoms())
def test_nearest_is_total_and_deterministic(
    buckets: list[CallSize], call: CallSize, order: random.Random
) -> None:
    """Every call is served, whatever the order of the file, by its own size if there is one."""
    artifact = _artifact(buckets)
    chosen = nearest(artifact, call)
    assert chosen is not None
    shuffled = list(artifact.tuned)
    order.shuffle(shuffled)
    assert nearest(replace(artifact, tuned=tuple(shuffled)), call) == chosen
    if call in buckets:
        assert chosen.bucket == call


@given(some, sizes, st.integers(1, 1000))
def test_nearest_goes_by_ratios(buckets: list[CallSize], call: CallSize, factor: int) -> None:
    """A common factor of all sizes changes nothing, and no size is nearer than the chosen one."""

    def times(b: CallSize) -> CallSize:
        return CallSize(b.rows * factor, b.tokens)

    chosen = nearest(_artifact(buckets), call)
    scaled = nearest(_artifact([times(b) for b in buckets]), times(call))
    assert chosen is not None
    assert scaled is not None
    assert scaled.bucket == times(chosen.bucket)


def test_nearest_on_a_page() -> None:
    artifact = _artifact([CallSize(16, 1024), CallSize(16, 4096), CallSize(256, 1024)])
    served = {
        (16, 1024): (16, 1024),
        (1, 1): (16, 1024),
        (16, 2048): (16, 1024),  # as far from 1024 as from 4096: the smaller
        (16, 2049): (16, 4096),
        (64, 1024): (16, 1024),
        (65, 1024): (256, 1024),
        (10**6, 10**6): (256, 1024),
    }
    for (rows, tokens), bucket in served.items():
        chosen = nearest(artifact, CallSize(rows, tokens))
        assert chosen is not None
        assert (chosen.bucket.rows, chosen.bucket.tokens) == bucket, (rows, tokens)


def test_what_is_not_trusted_does_not_serve() -> None:
    call = CallSize(64, 4096)
    failed = tuned(64, 4096, faults=("d k: relative RMS error 0.5",))
    other = tuned(8, 8, config(32))
    assert nearest(Artifact("name", KEY, (failed, other)), call) == other
    in_quarantine = Artifact("name", KEY, (tuned(64, 4096), other), (rejected(CONFIG),))
    assert nearest(in_quarantine, call) == other
    assert nearest(Artifact("name", KEY), call) is None


def test_the_exact_machine_then_its_architecture_then_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def saved(name: str, *machines: Machine) -> tuple[Path, ...]:
        for m in machines:
            store.save(replace(ARTIFACT, key=replace(KEY, machine=m)), tmp_path / name)
        return (tmp_path / name,)

    exact = find(KEY, saved("exact", A100, H100, H200))
    assert exact.nearness is Nearness.MACHINE
    assert exact.artifact is not None
    assert exact.artifact.key.machine == H200
    alike = find(KEY, saved("alike", A100, H100))
    assert alike.nearness is Nearness.ARCHITECTURE
    assert alike.artifact is not None
    assert alike.artifact.key.machine == H100
    none = find(KEY, saved("none", A100))
    assert none.nearness is Nearness.NONE
    assert none.artifact is None
    (miss,) = none.misses
    assert miss.endswith("it is for machine NVIDIA A100-SXM4-80GB (sm_80), not NVIDIA H200 (sm_90)")
    with caplog.at_level(logging.INFO, "chunkwise"):
        nowhere = find(KEY, (tmp_path / "nowhere",))
    assert (nowhere.nearness, nowhere.misses) == (Nearness.NONE, ())
    assert Nearness.NONE.value in caplog.text


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(KEY, dtype="float16"), "dtype float16, not bfloat16"),
        (replace(KEY, dims=Dims(64, 64)), "dimensions K=64 V=64, not K=128 V=128"),
        (replace(KEY, engine=EngineName.TVM), "engine"),
        (replace(KEY, dtype="float16", machine=A100), "dtype float16, not bfloat16, machine"),
    ],
)
def test_a_miss_says_which_key_differed(other: Key, says: str, tmp_path: Path) -> None:
    if other.engine is EngineName.TVM:  # what lies there is Triton's; the call wants another
        store.save(ARTIFACT, tmp_path)
        found = find(other, (tmp_path,))
        says = "engine triton, not tvm"
    else:
        store.save(replace(ARTIFACT, key=other), tmp_path)
        found = find(KEY, (tmp_path,))
    assert found.artifact is None
    (miss,) = found.misses
    assert says in miss


def test_the_users_own_wins_over_what_was_shipped(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    store.save(Artifact("name", KEY, (tuned(64, 4096, time_us=9.0), tuned(8, 8))), shipped)
    mine = tuned(64, 4096, config(32), time_us=5.0)
    store.save(Artifact("name", KEY, (mine,)), own)
    found = find(KEY, (shipped, own)).artifact
    assert found is not None
    assert found.tuned == (tuned(8, 8), mine)
    store.save(Artifact("name", KEY, quarantine=(rejected(CONFIG),)), own)
    later = find(KEY, (shipped / ".." / "shipped", own / ".." / "own")).artifact
    assert later is not None
    assert later.tuned == (mine,)


def test_a_machine_without_a_right_configuration_takes_its_architectures(tmp_path: Path) -> None:
    """This machine's quarantine and crossovers still apply."""
    bad, good = config(16), config(32)
    store.save(Artifact("name", replace(KEY, machine=H100), (tuned(8, 8, good),)), tmp_path)
    short = (Crossover(8, 4, 6, 0.95, 40),)
    store.save(Artifact("name", KEY, (), (rejected(bad),), short), tmp_path)
    found = find(KEY, (tmp_path,))
    assert found.nearness is Nearness.ARCHITECTURE
    assert found.artifact is not None
    assert found.artifact.key.machine == H100
    assert (found.artifact.quarantine, found.artifact.crossovers) == ((rejected(bad),), short)
    chosen = nearest(found.artifact, CallSize(8, 8))
    assert chosen is not None
    assert chosen.config == good


def test_cpus_are_told_apart_by_threads(tmp_path: Path) -> None:
    def cpu(model: str, threads: int) -> Key:
        return replace(KEY, machine=Machine("cpu", "x86-64-v4", model, threads))

    for key in (cpu("A", 2), cpu("A", 16), cpu("B", 8)):
        store.save(replace(ARTIFACT, key=key), tmp_path)
    for want, have in (
        (cpu("A", 2), cpu("A", 2)),
        (cpu("A", 8), cpu("A", 2)),
        (cpu("A", 12), cpu("A", 16)),
        (cpu("C", 9), cpu("B", 8)),
    ):
        found = find(want, (tmp_path,)).artifact
        assert found is not None
        assert found.key.machine == have.machine, want


def test_a_call_finds_the_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    key = replace(KEY, form="fedcba987654")  # nobody asked for it before
    store.save(replace(ARTIFACT, key=key))
    assert select_config(Config, key, CallSize(64, 4000), lambda: config(16)) == CONFIG
    other = replace(key, dtype="float32")
    assert select_config(Config, other, CallSize(64, 4000), lambda: config(16)) == config(16)


def test_a_default_in_quarantine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    store.save(Artifact("name", KEY, quarantine=(rejected(CONFIG),)))
    assert select_config(Config, KEY, CallSize(1, 1), lambda: config(16)) == config(16)
    with pytest.raises(errors.EngineUnavailable) as refused:
        select_config(Config, KEY, CallSize(1, 1), lambda: CONFIG)
    assert "found wrong on NVIDIA H200 (sm_90): two runs differ: d k" in refused.value.why
    assert "chunkwise tune" in refused.value.help


@pytest.mark.parametrize(
    ("machine", "rows", "chunk"),
    [(H200, 64, 64), (H200, 65, 64), (H200, 63, 16), (H100, 64, 16), (H100, 63, 16)],
)
def test_what_was_tuned_elsewhere_or_for_more_rows_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, rows: int, chunk: int
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    store.save(ARTIFACT)  # of an H200, for 64 rows
    key = replace(KEY, machine=machine)

    def served() -> Config:
        return select_config(
            Config, key, CallSize(rows, 4096), lambda: config(8), lambda c: replace(c, chunk=16)
        )

    assert served().chunk == chunk
    store.save(Artifact("name", KEY, quarantine=(rejected(replace(CONFIG, chunk=16)),)))
    find.cache_clear()
    _trusted.cache_clear()
    assert served() == CONFIG


def test_a_default_is_fitted_unless_that_is_in_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    assert select_config(Config, KEY, CallSize(1, 1), lambda: config(8), lambda c: CONFIG) == CONFIG
    other = replace(KEY, dtype="float16")
    store.save(Artifact("name", other, quarantine=(rejected(CONFIG),)))
    assert select_config(
        Config, other, CallSize(1, 1), lambda: config(8), lambda c: CONFIG
    ) == config(8)
    with pytest.raises(errors.EngineUnavailable):
        select_config(Config, other, CallSize(1, 1), lambda: CONFIG, lambda c: config(8))
