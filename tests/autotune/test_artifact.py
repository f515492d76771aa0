"""Artifacts as files: an artifact is read as it was written, and a bad file is refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chunkwise import library
from chunkwise.autotune import store
from chunkwise.autotune.store import versions_here
from chunkwise.codegen.config import Dims
from chunkwise.dsl import errors
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import Artifact, Rejected, Tuned, from_text, merged, to_text
from hypothesis import given
from hypothesis import strategies as st

from tests.autotune.artifacts import (
    A100,
    ARTIFACT,
    CONFIG,
    EAGER,
    KEY,
    VERSIONS,
    config,
    rejected,
    tuned,
)

TEXT = to_text(ARTIFACT)
NEWER = replace(VERSIONS, backend="triton 3.8.0")


@pytest.mark.parametrize(
    "artifact", [ARTIFACT, EAGER, Artifact("empty", KEY)], ids=["triton", "eager", "empty"]
)
def test_written_and_read(artifact: Artifact, tmp_path: Path) -> None:
    path = store.save(artifact, tmp_path)
    assert path == tmp_path / artifact.key.path
    assert selection.read(path) == artifact


def test_the_file_is_for_readers() -> None:
    """Names, not numbers; small things on one line; sorted, so that diffs are small."""
    assert '"hoist": ["PREFIXES", "SOLVES"],' in TEXT
    assert '"bucket": {"rows": 64, "tokens": 4096},' in TEXT
    default = '{"v_tile": 64, "warps": 4, "stages": 2, "k_tile": 256, "block": 32, "printer": null}'
    assert f'"default": {default},' in TEXT
    assert max(map(len, TEXT.splitlines())) <= 100
    backwards = replace(ARTIFACT, tuned=ARTIFACT.tuned[::-1])
    assert to_text(backwards) == TEXT
    one_more = replace(ARTIFACT, tuned=(*ARTIFACT.tuned, tuned(128, 128)))
    assert set(TEXT.splitlines()) <= set(to_text(one_more).splitlines())


def _edited(old: str, new: str) -> Callable[[str], str]:
    assert old in TEXT
    return lambda text: text.replace(old, new)


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "it is not JSON"),
    "empty": (lambda text: "", "was it cut off?"),
    "no object": (lambda text: "[]", "does not say which schema"),
    "no schema": (_edited('"schema": 1,', ""), "does not say which schema"),
    "newer": (_edited('"schema": 1', '"schema": 2'), "its schema is 2, this version reads 1"),
    "garbled name": (
        _edited("PREFIXES", "PRE"),
        "tuned[0].config.forward.hoist is 'PRE', expected",
    ),
    "garbled type": (_edited('"rows": 64', '"rows": "64"'), "rows is '64', expected an integer"),
    "a bool": (_edited('"spills": 0', '"spills": false'), "spills is False, expected an integer"),
    "unknown": (_edited('"rows": 64', '"row": 64'), "has 'row', expected only rows, tokens"),
    "missing": (_edited('"rows": 64, ', ""), "tuned[0].bucket lacks 'rows'"),
    "not finite": (_edited("812.5", "NaN"), "not a finite number"),
    "negative": (_edited('"chunk": 64', '"chunk": 60'), "chunk is 60, expected a power of two"),
    "no configuration of its engine": (_edited("TRITON", "EAGER"), "no configuration of 'eager'"),
    "another GPU's": (_edited("NVIDIA H200", "NVIDIA H20"), "it is for NVIDIA H20 (sm_90)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_trusted_is_refused(damage: str, tmp_path: Path) -> None:
    change, reason = DAMAGE[damage]
    path = store.save(ARTIFACT, tmp_path)
    path.write_text(change(TEXT))
    with pytest.raises(errors.BadArtifact) as refused:
        selection.read(path)
    assert str(path) in refused.value.headline
    assert reason in refused.value.why
    with pytest.warns(RuntimeWarning, match="is not used"):
        found = selection.find(KEY, (tmp_path,))
    assert found.nearness is selection.Nearness.NONE
    assert selection.find(KEY, (tmp_path,)) is found  # and no second warning


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = store.save(ARTIFACT, tmp_path)
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(errors.BadArtifact, match="is not used") as refused:
        selection.read(path)
    assert "cannot be read" in refused.value.why


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_a_changed_character_is_refused_or_means_something(at: int, character: str) -> None:
    """No bad text raises any other error than the one that callers expect."""
    try:
        read = from_text(TEXT[:at] + character + TEXT[at + 1 :], "file")
    except errors.BadArtifact:
        return
    assert from_text(to_text(read), "file") == read


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = store.save(ARTIFACT, tmp_path)
    path.write_text(TEXT[:99])
    with pytest.warns(RuntimeWarning, match=r"set aside as .*\.damaged"):
        store.save(ARTIFACT, tmp_path)
    assert selection.read(path) == ARTIFACT
    assert path.with_suffix(".json.damaged").read_text() == TEXT[:99]


def test_merged_sizes() -> None:
    """The faster configuration of a size stays; of different versions, the newer one stays."""
    faster, slower = tuned(64, 4096, config(16), time_us=1.0), tuned(64, 4096, time_us=2.0)
    newer = tuned(64, 4096, config(32), time_us=3.0, versions=NEWER)
    elsewhere = tuned(8, 8)

    def after(*tuned_in_turn: object) -> tuple[object, ...]:
        merged_so_far = Artifact("name", KEY)
        for t in tuned_in_turn:
            merged_so_far = merged(merged_so_far, replace(merged_so_far, tuned=(t,)))  # type: ignore[arg-type]
        return merged_so_far.tuned

    assert after(faster, slower) == after(slower, faster) == (faster,)
    assert after(faster, newer) == (newer,)
    assert after(faster, elsewhere, slower) == (elsewhere, faster)


def test_quarantine() -> None:
    """A configuration that failed serves no size until it passes under other versions."""
    bad = Artifact("name", KEY, quarantine=(rejected(CONFIG),))
    again = Artifact("name", KEY, (tuned(64, 4096),))
    assert merged(again, bad).tuned == ()
    assert merged(bad, again).tuned == ()
    right = Artifact("name", KEY, (tuned(64, 4096, versions=NEWER),))
    assert merged(bad, right) == right
    fallback = tuned(64, 4096, config(16), time_us=1e6)
    assert merged(again, replace(bad, tuned=(fallback,))).tuned == (fallback,)


def _write_sizes(folder: Path, worker: int) -> None:
    for n in range(20):
        store.save(Artifact("name", KEY, (tuned(worker + 1, n),)), folder)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_sizes, args=(tmp_path, w)) for w in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    artifact = selection.read(tmp_path / KEY.path)
    assert {(t.bucket.rows, t.bucket.tokens) for t in artifact.tuned} == {
        (w + 1, n) for w in range(2) for n in range(20)
    }
    assert not list(tmp_path.glob("*/*.tmp"))


def _write_for_ever(folder: Path) -> None:
    for n in itertools.count():
        store.save(Artifact("name", KEY, (tuned(n % 50 + 1, 1, time_us=1.0 + n),)), folder)


def test_killed_writers_leave_whole_files(tmp_path: Path) -> None:
    """A writer may be killed at any moment, and does not lock out the next one."""
    context = multiprocessing.get_context("fork")
    path = tmp_path / KEY.path
    seen = 0
    for n in range(20):
        writer = context.Process(target=_write_for_ever, args=(tmp_path,))
        writer.start()
        while not path.exists():
            assert writer.is_alive(), "it ended by itself"
            time.sleep(0.001)
        time.sleep(0.002 * (n % 7))
        writer.kill()
        writer.join()
        sizes = len(selection.read(path).tuned)
        assert sizes >= seen  # nothing that was finished is lost
        seen = sizes
    store.save(Artifact("name", KEY, (tuned(1000, 1),)), tmp_path)
    assert len(selection.read(path).tuned) == seen + 1


entries = st.builds(
    tuned,
    st.integers(1, 3),
    st.just(1),
    st.sampled_from([CONFIG, config(16), config(32)]),
    time_us=st.floats(1, 100),
    versions=st.sampled_from([VERSIONS, NEWER]),
)
rejections = st.builds(rejected, st.sampled_from([CONFIG, config(16)]))


@given(st.lists(entries, max_size=5), st.lists(rejections, max_size=2))
def test_merging_twice_changes_nothing(tuned_now: list[Tuned], wrong: list[Rejected]) -> None:
    """A merged artifact never serves a configuration that is in quarantine."""
    artifact = Artifact("name", KEY)
    for t in tuned_now:
        artifact = merged(artifact, Artifact("name", KEY, (t,)))
    artifact = merged(artifact, Artifact("name", KEY, quarantine=tuple(wrong)))
    assert merged(artifact, artifact) == artifact
    assert not {t.config for t in artifact.tuned} & {r.config for r in artifact.quarantine}


def test_keys_do_not_hold_sizes_of_calls() -> None:
    form = library.gated_delta_rule.declaration.normal_form()
    key = selection.key_here(
        form, EngineName.EAGER, torch.float32, Dims(64, 32), torch.device("cpu")
    )
    assert key.form == form.digest
    assert key.machine.kind == "cpu"
    assert key.machine.threads == torch.get_num_threads()
    assert set(json.loads(to_text(Artifact("x", key)))["key"]) == {
        "form", "engine", "dtype", "dims", "machine"
    }  # fmt: skip
    assert replace(key, machine=A100).path.endswith(
        "eager-float32-K64-V32-cuda-sm_80-NVIDIA-A100-SXM4-80GB.json"
    )
    assert versions_here(EngineName.TRITON).backend is not None
    assert versions_here(EngineName.EAGER).backend is None
