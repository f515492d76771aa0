"""Compiled code on disk: shared among processes, damaged, cut off; and none where none can be."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.autotune import store
from chunkwise.codegen.config import Dims
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.tir.config import TvmConfig
from chunkwise.dsl import errors
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import Artifact
from chunkwise.runtime.tvm import build as tvm_build
from chunkwise.runtime.tvm import engine as tvm_engine
from chunkwise.runtime.tvm.export import export_library
from torch import Tensor

from tests.autotune.artifacts import tuned

OP = cw.library.linear_attention
Spoil = Callable[[Path], None]


def _agrees(op: Any, *operands: Tensor) -> None:
    """The engine, compiling anew, against the token loop in float64."""
    tvm_engine.compiled.cache_clear()
    Records.forget()
    want, _ = op(*(x.double() for x in operands), engine="reference")
    got, _ = op(*operands, engine="tvm")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def _operands(K: int = 8) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 40, 2, K, generator=random) for _ in range(3))


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that nobody has made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CHUNKWISE_CACHE", str(folder))
    return folder


def _file(top: Path) -> None:
    top.touch()


def _shared(top: Path) -> None:
    top.mkdir()
    top.chmod(0o777)


def _link(top: Path) -> None:
    top.symlink_to(top.parent)


@pytest.mark.parametrize("spoil", [_file, _shared, _link])
def test_a_cache_that_is_refused(spoil: Spoil, top: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is read from it or written to it, one line says so, and results are the same."""
    spoil(top)
    _agrees(OP, *_operands())
    _agrees(OP, *_operands())
    (record,) = caplog.records
    assert "compiled into memory" in record.getMessage()
    assert str(top) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not list(top.parent.rglob("*.so"))


@pytest.mark.parametrize("name", [b"\xff", b"x" * 300, b"x/" * 2100])
def test_names_that_cannot_be(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    _agrees(OP, *_operands())
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHUNKWISE_CACHE", "some/ä folder of mine")
    _agrees(OP, *_operands())
    assert list((tmp_path / "some" / "ä folder of mine" / "tvm").glob("*.so"))


LIMITED = """
import torch
import chunkwise as cw
random = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 40, 2, 8, generator=random) for _ in range(3))
q.requires_grad_()
want, _ = cw.library.linear_attention(q.double(), k.double(), v.double(), engine="reference")
got, _ = cw.library.linear_attention(q, k, v, engine="tvm")
torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
got.sum().backward()
"""


@pytest.mark.parametrize("limit", [20_000, 1 << 22])
def test_a_limit_that_cuts_files(limit: int, top: Path) -> None:
    """LLVM would end the process; a library that was cut could crash it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1])),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "compiled into memory" in line]
    assert len(lines) == (limit < 1 << 22)
    assert limit == 1 << 22 or "File too large" in lines[0]
    left = {p.suffix for p in top.rglob("*") if p.is_file()}
    assert left <= ({".so", ".sum", ".lock"} if limit == 1 << 22 else {".lock"})


def _linker(folder: Path, does: str) -> None:
    folder.mkdir()
    for name in tvm_build._LINKERS:
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)


def test_a_linker_that_fails(
    top: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _linker(tmp_path / "bin", "echo cannot find -lc >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    _agrees(OP, *_operands())
    (record,) = caplog.records
    assert "the linker failed with status 3" in record.getMessage()
    assert "cannot find -lc" in record.getMessage()
    form = OP.declaration.normal_form()
    with pytest.raises(errors.LinkerFailed) as failed:
        export_library(form, Dims(4, 4), tmp_path / "library.so")
    assert failed.value.why == "cannot find -lc"
    assert not list(top.rglob("*.o"))


def test_a_library_that_cannot_be_loaded(
    top: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a file system that runs nothing."""
    _linker(tmp_path / "bin", 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    _agrees(OP, *_operands())
    (record,) = caplog.records
    assert "compiled into memory" in record.getMessage()
    assert list(top.rglob("*.so"))


def _cut(library: Path) -> None:
    whole = library.read_bytes()
    library.unlink()  # another file, for this process may have mapped the first
    library.write_bytes(whole[: len(whole) // 2])


def _empty(library: Path) -> None:
    library.unlink()
    library.touch()


def _folder(library: Path) -> None:
    library.unlink()
    library.mkdir()


def _pipe(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


def _sum_garbage(library: Path) -> None:
    library.with_suffix(".sum").write_bytes(b"\xff" * 1000)


def _sum_folder(library: Path) -> None:
    library.with_suffix(".sum").unlink()
    library.with_suffix(".sum").mkdir()
    (library.with_suffix(".sum") / "file").touch()


def _sum_missing(library: Path) -> None:
    library.with_suffix(".sum").unlink()


def _lock_folder(library: Path) -> None:
    _cut(library)
    library.with_suffix(".lock").unlink(missing_ok=True)
    library.with_suffix(".lock").mkdir()


def _left_half_made(library: Path) -> None:
    _empty(library)
    library.with_suffix(".build").mkdir()
    (library.with_suffix(".build") / "0.o").touch()


DAMAGE: list[Spoil] = [
    _cut, _empty, _folder, _pipe, _sum_garbage, _sum_folder, _sum_missing, _lock_folder,
    _left_half_made,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_set_aside_and_mended(
    damage: Spoil, top: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _agrees(OP, *_operands())
    libraries = list((top / "tvm").glob("*.so"))
    assert libraries
    for library in libraries:
        damage(library)
    _agrees(OP, *_operands())
    assert len(caplog.records) == len(libraries)
    assert "is damaged: it is set aside and made again" in caplog.text
    assert all(map(tvm_build._sound, libraries))
    assert all(p.with_name(f"{p.name}.damaged").exists() for p in libraries)
    written = [p.stat().st_mtime_ns for p in libraries]
    caplog.clear()
    _agrees(OP, *_operands())
    assert [p.stat().st_mtime_ns for p in libraries] == written
    assert caplog.records == []
    assert not list(top.rglob("*.build"))


def test_a_cache_that_cannot_be_written_is_read(
    top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _agrees(OP, *_operands())

    def compiled(*_: object, **__: object) -> None:
        pytest.fail("it was compiled")

    monkeypatch.setattr(tvm_build, "_compiled", compiled)
    monkeypatch.setattr("chunkwise.runtime.cache.FileLock", compiled)
    _agrees(OP, *_operands())
    assert caplog.records == []


AT_ONCE = """
import torch
import chunkwise as cw
x = torch.ones(1, 3, 1, 8)
print(float(cw.library.gated_delta_rule(x, x, x, -x[..., 0], x[..., 0], engine="tvm")[0].sum()))
"""


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", AT_ONCE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_at_once_and_one_killed(top: Path) -> None:
    """Four compile the same form into a fresh folder; another was killed as it did."""
    killed = _start()
    while not list(top.glob("tvm/*.build")) and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    several = [_start() for _ in range(4)]
    results = [process.communicate() for process in several]
    x = torch.ones(1, 3, 1, 8, dtype=torch.float64)
    g = x[..., 0]
    want = float(cw.library.gated_delta_rule(x, x, x, -g, g, engine="reference")[0].sum())
    for printed, complaints in results:
        assert float(printed) == pytest.approx(want, rel=1e-5)
        assert complaints == ""
    files = list((top / "tvm").iterdir())
    assert {p.suffix for p in files} <= {".so", ".sum", ".lock"}
    assert all(map(tvm_build._sound, (p for p in files if p.suffix == ".so")))


@pytest.mark.parametrize(("field", "value"), [("v_tile", -1), ("chunk", 48)])
def test_an_artifact_out_of_range_serves_nothing(
    field: str, value: int, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was believed: kda's output was infinite with the one, 0.07 off with the other."""
    op = cw.library.kda
    random = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 100, 2, 32, generator=random) for _ in range(4))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    operands = (q, k, v, -g.abs(), torch.rand(1, 100, 2, generator=random))
    monkeypatch.setattr(selection, "folders", lambda: (top / "artifacts",))
    form, dims = op.declaration.normal_form(), Dims(32, 32)
    key = selection.key_here(form, EngineName.TVM, torch.float32, dims, torch.device("cpu"))
    fused = Plan(Hoist.NOTHING, outputs_in_scan=True)
    lanes = tvm_build.lanes_of(tvm_build.host_cpu())
    config = TvmConfig(32, fused, fused, lanes, 4, 2)
    path = store.save(Artifact("kda", key, (tuned(2, 100, config),)))
    number = getattr(config, field)
    text = path.read_text()
    assert f'"{field}": {number}' in text
    path.write_text(text.replace(f'"{field}": {number}', f'"{field}": {value}'))
    shutil.rmtree(top / "tvm", ignore_errors=True)
    with pytest.warns(RuntimeWarning, match=rf"{field} is {value}, expected"):
        _agrees(op, *operands)
