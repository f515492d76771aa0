"""Every value of an artifact has its limits, and a configuration made by hand has the same."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from chunkwise.autotune import store
from chunkwise.codegen.config import Config, EagerConfig, KernelConfig
from chunkwise.codegen.tir.config import TvmConfig, default_config
from chunkwise.dsl import errors
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import LARGEST, Artifact, to_text

from tests.autotune.artifacts import ARTIFACT, EAGER, KEY, PLAN, TVM, tuned

BY_ENGINE = {"triton": ARTIFACT, "eager": EAGER, "tvm": TVM}


def _numbers(hint: Any, at: str, limited: bool = False) -> Iterator[tuple[str, bool]]:
    """The places of numbers in the type `hint`, each with whether it is limited."""
    if get_origin(hint) is Annotated:
        yield from _numbers(get_args(hint)[0], at, limited=True)
    elif is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for f in fields(hint):
            yield from _numbers(hints[f.name], f"{at}.{f.name}")
    elif get_origin(hint) in (tuple, Union, types.UnionType):
        for inner in get_args(hint):
            yield from _numbers(inner, at)
    elif hint in (int, float):
        yield at, limited


def test_every_number_has_a_range() -> None:
    found = dict(_numbers(Artifact, "artifact"))
    assert len(found) > 30
    assert [at for at, limited in found.items() if not limited] == []


def _put(document: dict[str, Any], place: str, value: object) -> None:
    *way, last = place.split(".")
    at: Any = document
    for step in way:
        at = at[int(step)] if step.isdigit() else at[step]
    assert last in at
    at[last] = value


# engine, place in the document, value, what is said of it; the value of W11 first
WRONG: list[tuple[str, str, object, str]] = [
    ("tvm", "tuned.0.config.v_tile", -1, "tuned[0].config.v_tile is -1, expected a number from 1"),
    # 48 tokens of a decayed product are halved to 3: kda's output was 0.07 off
    ("tvm", "tuned.0.config.chunk", 48, "config.chunk is 48, expected a power of two from 1"),
    ("tvm", "tuned.0.config.lanes", 12, "config.lanes is 12, expected a power of two"),
    ("tvm", "tuned.0.config.rows", 0, "config.rows is 0, expected a number from 1 to 32"),
    ("tvm", "tuned.0.config.vectors", 0, "config.vectors is 0, expected a number from 1 to 16"),
    ("tvm", "tuned.0.config.vectors", 1 << 40, "config.vectors is 1099511627776, expected"),
    (
        "triton",
        "tuned.0.config.default.v_tile",
        -1,
        "config.default.v_tile is -1, expected a power",
    ),
    (
        "triton",
        "tuned.0.config.default.k_tile",
        24,
        "config.default.k_tile is 24, expected a power",
    ),
    (
        "triton",
        "tuned.0.config.default.warps",
        64,
        "warps is 64, expected a power of two from 1 to",
    ),
    ("triton", "tuned.0.config.default.stages", 0, "stages is 0, expected a number from 1 to 16"),
    ("triton", "tuned.0.config.default.warps", 4.0, "warps is 4.0, expected an integer"),
    ("triton", "tuned.0.config.chunk", True, "chunk is True, expected an integer"),
    ("triton", "tuned.0.config.forward.hoist", ["ALL"], "hoist is 'ALL', expected one of PREFIXES"),
    ("triton", "tuned.0.time_us", -1.0, "tuned[0].time_us is -1.0, expected a number from 0"),
    ("triton", "tuned.0.bucket.rows", -1, "tuned[0].bucket.rows is -1, expected a number from 0"),
    ("triton", "tuned.0.kernels.forward_scan.spills", -8, "forward_scan.spills is -8, expected"),
    ("triton", "crossovers.0.confidence", 1.5, "confidence is 1.5, expected a number from 0 to 1"),
    ("triton", "key.engine", "CUDA", "key.engine is 'CUDA', expected one of REFERENCE, EAGER"),
    ("triton", "key.dtype", "load", "key.dtype is 'load', expected one of float32, bfloat16"),
    ("triton", "key.form", "../..", "key.form is '../..', expected a digest"),
    ("triton", "key.dims.K", 0, "key.dims.K is 0, expected a number from 1"),
    ("triton", "key.machine.kind", "tpu", "key.machine.kind is 'tpu', expected one of cuda"),
    ("triton", "key.machine.threads", -1, "key.machine.threads is -1, expected a number from 0"),
    ("triton", "recurrence", "x" * 10_001, "recurrence has 10001 characters, expected at most"),
    ("eager", "tuned.0.config.chunk", -1, "config.chunk is -1, expected a power of two from 1"),
    ("eager", "tuned.0.config.chunk", 2048, "config.chunk is 2048, expected a power of two"),
]


@pytest.mark.parametrize(("engine", "place", "value", "says"), WRONG, ids=lambda x: str(x)[:40])
def test_what_is_out_of_its_limits_is_refused(
    engine: str, place: str, value: object, says: str, tmp_path: Path
) -> None:
    path = store.save(BY_ENGINE[engine], tmp_path)
    document = json.loads(path.read_text())
    _put(document, place, value)
    path.write_text(json.dumps(document))
    with pytest.raises(errors.BadArtifact) as refused:
        selection.read(path)
    assert str(path) in refused.value.headline
    assert says in refused.value.why


def _with(text: str) -> Callable[[str], str]:
    """The artifact's text with `text` in place of a time."""
    return lambda whole: whole.replace("812.5", text)


ODD: dict[str, tuple[Callable[[str], str], str]] = {
    "a name twice": (
        lambda text: text.replace('"rows": 64', '"rows": 1, "rows": 64', 1),
        "it says 'rows' twice",
    ),
    "infinity": (_with("-Infinity"), "-Infinity is not a finite number"),
    "overflow": (_with("1e999"), "time_us is not a finite number"),
    "many digits": (_with("9" * 4000), "a number has 4000 digits"),
    "digits that Python refuses": (_with("9" * 400_000), "a number has 400000 digits"),
    "deep": (lambda text: "[" * 200_000, "nested too deeply"),
    "deep inside": (
        _with("[" * 150 + "]" * 150),
        "time_us is [[[[[[[...]]]]]]], expected a number",
    ),
    "deep objects": (_with('{"a":' * 200_000), "nested too deeply"),
    "long": (lambda text: text + " " * LARGEST, f"more than {LARGEST} bytes"),
    "a lone surrogate": (_with('"\\ud800"'), "expected a number"),
}


@pytest.mark.parametrize("odd", ODD)
def test_json_that_is_not_ours(odd: str, tmp_path: Path) -> None:
    change, says = ODD[odd]
    path = store.save(ARTIFACT, tmp_path)
    path.write_text(change(to_text(ARTIFACT)))
    with pytest.raises(errors.BadArtifact) as refused:
        selection.read(path)
    assert says in refused.value.why
    assert len(refused.value.why) < 300


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = store.save(ARTIFACT, tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.BadArtifact) as refused:
        selection.read(path)
    assert "not a regular file" in refused.value.why
    with pytest.warns(RuntimeWarning, match="set aside"):
        store.save(ARTIFACT, tmp_path)
    assert selection.read(path) == ARTIFACT


@pytest.mark.parametrize("lock", ["folder", "full folder", "garbage", "pipe"])
def test_a_lock_that_is_none(lock: str, tmp_path: Path) -> None:
    path = tmp_path / KEY.path
    place = path.with_suffix(".lock")
    path.parent.mkdir()
    if lock == "pipe":
        os.mkfifo(place)
    elif lock == "garbage":
        place.write_bytes(b"\xff" * 999)
    else:
        place.mkdir()
        if lock == "full folder":
            (place / "file").touch()
    store.save(ARTIFACT, tmp_path)
    assert selection.read(path) == ARTIFACT


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chunkwise tune` reports it; no partial file stays, not even that of a killed process."""
    path = store.save(ARTIFACT, tmp_path)
    left = path.with_name(f"{path.name}.abc.tmp")
    left.write_text("half")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(errors.BadCache, match="No space left on device"):
        store.save(replace(ARTIFACT, tuned=(tuned(1, 1),)), tmp_path)
    assert selection.read(path) == ARTIFACT
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("part", ["artifacts", "form"])
def test_artifacts_that_others_may_write_are_not_read(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    path = store.save(ARTIFACT)
    shared = path.parents[1] if part == "artifacts" else path.parent
    shared.chmod(0o777)
    found = selection.find(KEY, (tmp_path / "artifacts",))
    assert found.artifact is None
    assert f"others may write to {shared}" in caplog.text
    assert list(selection.scan((tmp_path / "artifacts",))) == []
    assert len(caplog.records) == 1
    shared.chmod(0o700)
    assert list(selection.scan((tmp_path / "artifacts",))) == [(path, ARTIFACT)]


MADE: list[tuple[Callable[[], object], str]] = [
    (lambda: EagerConfig(chunk=-1), "EagerConfig.chunk is -1, expected a power of two"),
    (lambda: EagerConfig(0), "chunk is 0"),
    (lambda: EagerConfig(48), "chunk is 48"),
    (lambda: EagerConfig(64.0), "chunk is 64.0"),  # type: ignore[arg-type]
    (lambda: EagerConfig(True), "chunk is True"),
    (lambda: EagerConfig(math.nan), "chunk is nan"),  # type: ignore[arg-type]
    (lambda: EagerConfig("64"), "chunk is '64'"),  # type: ignore[arg-type]
    (lambda: KernelConfig(v_tile=-1), "KernelConfig.v_tile is -1"),
    (lambda: KernelConfig(k_tile=0), "KernelConfig.k_tile is 0"),
    (lambda: KernelConfig(warps=3), "KernelConfig.warps is 3"),
    (lambda: KernelConfig(stages=0), "KernelConfig.stages is 0"),
    (lambda: Config(-64, PLAN, PLAN, KernelConfig()), "Config.chunk is -64"),
    (lambda: replace(default_config(8), v_tile=-1), "TvmConfig.v_tile is -1"),
    (lambda: replace(default_config(8), chunk=24), "TvmConfig.chunk is 24"),
    (lambda: TvmConfig(32, PLAN, PLAN, 0, 4, 2), "TvmConfig.lanes is 0"),
    (lambda: TvmConfig(32, PLAN, PLAN, 8, -1, 2), "TvmConfig.rows is -1"),
]


@pytest.mark.parametrize(("make", "says"), MADE, ids=[says for _, says in MADE])
def test_made_by_hand(make: Callable[[], object], says: str) -> None:
    with pytest.raises(errors.BadConfiguration) as refused:
        make()
    assert says in refused.value.headline
    assert refused.value.why
    again = pickle.loads(pickle.dumps(refused.value))
    assert str(again) == str(refused.value)


def test_configurations_are_values() -> None:
    config = default_config(16)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert not any(isinstance(getattr(config, f.name), Enum) for f in fields(config))
