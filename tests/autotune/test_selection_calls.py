"""Calls under artifacts: the tuned configuration serves, and a bad file never stops a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunkwise import library
from chunkwise.autotune import store
from chunkwise.codegen.config import Config, Dims, EagerConfig, KernelConfig
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime import eager as eager_engine
from chunkwise.runtime.engine import Task
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import Artifact, Key, from_text, to_text
from torch import Tensor

from tests.autotune.artifacts import A100, tuned
from tests.interpreted import small

OP = library.simple_gla
CPU = torch.device("cpu")


def _form() -> NormalForm:
    return OP.declaration.normal_form()


@pytest.fixture
def chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunk lengths of the eager engine's runs; artifacts lie in a folder of the test's own."""
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    used: list[int] = []

    class Recorded(eager_engine._Run):
        def __init__(self, task: Task, chunk: int, *kernels: Any) -> None:
            used.append(chunk)
            super().__init__(task, chunk, *kernels)

    monkeypatch.setattr(eager_engine, "_Run", Recorded)
    return used


def _key(V: int) -> Key:
    return selection.key_here(_form(), EngineName.EAGER, torch.float32, Dims(3, V), CPU)


def _called(V: int, T: int, engine: str = "eager") -> Tensor:
    """A call, compared with the token loop."""
    random = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, T, 2, 3, generator=random) for _ in range(2))
    v = torch.randn(2, T, 2, V, generator=random)
    g = -torch.rand(2, T, 2, generator=random)
    o, _ = OP(q, k, v, g, engine=engine)
    want, _ = OP(q.double(), k.double(), v.double(), g.double(), engine="reference")
    assert torch.allclose(o.double(), want, atol=1e-4)
    return o


def test_the_nearest_tuned_chunk_serves(chunks: list[int]) -> None:
    entries = (tuned(4, 32, EagerConfig(8)), tuned(4, 512, EagerConfig(16)))
    store.save(Artifact("simple_gla", _key(5), entries))
    for T, chunk in ((40, 8), (300, 16), (5, 8), (3, 4)):
        chunks.clear()
        _called(5, T)
        assert chunks == [chunk]
    chunks.clear()
    _called(6, 100)  # other dimensions: nothing was tuned
    assert chunks == [64]


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[:200], "it is not JSON"),
    "garbled": (lambda text: text.replace('"chunk": 8', '"chunk": -8'), "expected a power of two"),
    "of a newer schema": (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema is 99"),
    "another machine's": (
        lambda text: to_text(_on_another_machine(from_text(text, ""))),
        "it is for NVIDIA A100",
    ),
}


def _on_another_machine(artifact: Artifact) -> Artifact:
    return replace(artifact, key=replace(artifact.key, machine=A100))


@pytest.mark.parametrize(("V", "damage"), list(enumerate(DAMAGE, 9)))
def test_a_bad_file_is_named_once_and_the_default_serves(
    V: int, damage: str, chunks: list[int]
) -> None:
    change, reason = DAMAGE[damage]
    path = store.save(Artifact("simple_gla", _key(V), (tuned(4, 32, EagerConfig(8)),)))
    path.write_text(change(path.read_text()))
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        _called(V, 70)
    assert str(path) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _called(V, 71)
    assert chunks == [64, 64]


def test_an_artifact_that_cannot_be_read_at_all(chunks: list[int]) -> None:
    path = store.save(Artifact("simple_gla", _key(14), (tuned(4, 32, EagerConfig(8)),)))
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="it cannot be read"):
        _called(14, 70)


@pytest.mark.interpreter
def test_triton_takes_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    config: Config = replace(small(_form()), default=KernelConfig(16, 2, 1, 16))
    key = selection.key_here(_form(), EngineName.TRITON, torch.float32, Dims(3, 15), CPU)
    store.save(Artifact("simple_gla", key, (tuned(4, 32, config),)))
    _called(15, 20, "triton")
    (source,) = (tmp_path / "source").glob("*.py")
    assert "chunk       16 tokens" in source.read_text()
    assert "warps=2 stages=1" in source.read_text()
