"""The cache folder: whose it must be, how entries come to lie there, and going on without it."""

from __future__ import annotations

import errno
import inspect
import linecache
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.dsl import errors
from chunkwise.runtime import cache
from chunkwise.runtime.triton import engine as triton_engine

CAN_WRITE = "def answer():\n    return 42\n"


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that nobody has made yet."""
    folder = tmp_path / "made" / "cache"
    monkeypatch.setenv("CHUNKWISE_CACHE", str(folder))
    return folder


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_are_the_users_own_whatever_the_umask(top: Path) -> None:
    before = os.umask(0)
    try:
        assert cache.own_folder("a", "b") == top / "a" / "b"
        cache.import_source("# with an umask of 0\n" + CAN_WRITE)
    finally:
        os.umask(before)
    folders = [top.parent, top, *(p for p in top.rglob("*") if p.is_dir())]
    assert {_mode(p) for p in folders} == {0o700}
    assert not list(top.rglob("__pycache__"))


def _others_write(top: Path) -> None:
    cache.own_folder("tvm")
    (top / "tvm").chmod(0o770)


def _all_write(top: Path) -> None:
    cache.own_folder()
    top.chmod(0o777)


def _link(top: Path) -> None:
    (elsewhere := top.parent / "elsewhere").mkdir(parents=True)
    top.symlink_to(elsewhere)


def _link_below(top: Path) -> None:
    cache.own_folder()
    (elsewhere := top.parent / "elsewhere").mkdir(parents=True)
    (top / "tvm").symlink_to(elsewhere)


def _a_file(top: Path) -> None:
    top.parent.mkdir()
    top.touch()


def _a_file_above(top: Path) -> None:
    top.parent.touch()


def _others_rename(top: Path) -> None:
    cache.own_folder()
    top.parent.chmod(0o777)


UNSAFE: list[tuple[Callable[[Path], None], str]] = [
    (_others_write, "others may write to"),
    (_all_write, "others may write to"),
    (_link, "is a symbolic link"),
    (_link_below, "is a symbolic link"),
    (_a_file, "is no folder"),
    (_a_file_above, "Not a directory"),
    (_others_rename, "others may rename what lies in"),
]


@pytest.mark.parametrize(("spoil", "why"), UNSAFE, ids=[spoil.__name__ for spoil, _ in UNSAFE])
def test_folders_that_are_refused(spoil: Callable[[Path], None], why: str, top: Path) -> None:
    spoil(top)
    with pytest.raises(errors.BadCache) as refused:
        cache.own_folder("tvm")
    assert str(top) in refused.value.headline
    assert why in refused.value.why
    assert isinstance(refused.value, OSError)


def test_of_another_user(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.own_folder("tvm")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(errors.BadCache) as refused:
        cache.own_folder("tvm")
    assert "belongs to user" in refused.value.why
    assert "this process to user 12345" in refused.value.why


def test_a_sticky_folder_above_will_do(top: Path) -> None:
    top.parent.mkdir()
    top.parent.chmod(0o1777)
    assert cache.own_folder("tvm").is_dir()
    top.chmod(0o755)  # which others may read
    assert cache.own_folder("tvm").is_dir()


def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~`, a relative name, an empty one; names that no file system or linker takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def own(name: str) -> Path:
        monkeypatch.setenv("CHUNKWISE_CACHE", name)
        return cache.own_folder("x")

    cache._folder.cache_clear()
    assert own("~/mine") == tmp_path / "home" / "mine" / "x"
    assert own("here/../there") == tmp_path / "there" / "x"
    assert own("") == tmp_path / "home" / ".cache" / "chunkwise" / "x"
    assert own(str(tmp_path / "ä ö")).is_dir()
    with pytest.raises(errors.BadCache, match="not UTF-8"):
        own(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(errors.BadCache, match="too long"):
        own(str(tmp_path / ("x" * 300)))
    with pytest.raises(errors.BadCache, match="too long"):
        own(str(tmp_path) + "/x" * 4000)
    assert not (tmp_path / "x").exists()
    with pytest.raises(errors.BadCache, match="no home folder"):
        own("~nobody-of-that-name/cache")
    cache._folder.cache_clear()


def _denied(number: int) -> Callable[..., Any]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("verb", ["write_bytes", "replace", "mkdir"])
def test_source_without_a_cache(
    number: int,
    verb: str,
    top: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is imported from memory, where Triton and tracebacks find its text; one line says so."""
    for n in range(2):
        source = f"# {number} {verb} {n}\n" + CAN_WRITE
        with monkeypatch.context() as patch:
            patch.setattr(Path, verb, _denied(number))
            module = cache.import_source(source)
        assert module.answer() == 42
        linecache.checkcache()
        assert inspect.getsource(module.answer) == CAN_WRITE
    (record,) = caplog.records
    assert os.strerror(number) in record.getMessage()
    assert not [p for p in top.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_module_that_was_changed_is_set_aside(
    top: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.import_source("# changed\n" + CAN_WRITE)
    (path,) = (top / "source").glob("*.py")
    path.write_text("raise SystemExit\n")
    cache.import_source.cache_clear()
    module = cache.import_source("# changed\n" + CAN_WRITE)
    assert module.answer() == 42
    assert path.read_text().endswith(CAN_WRITE)
    assert path.with_suffix(".py.damaged").read_text() == "raise SystemExit\n"
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text


def test_an_entry_that_is_a_folder(top: Path) -> None:
    path = cache.own_folder("x") / "entry.a"
    for _ in range(2):  # the second time, another was set aside before
        path.mkdir()
        (path / "file").touch()
        cache.keep(path, path.is_file, lambda folder: [_file(folder / "entry.a")])
        assert path.read_text() == "whole"
        path.unlink()


def _file(path: Path) -> Path:
    path.write_text("whole")
    return path


def test_what_fails_or_was_killed_leaves_nothing(top: Path) -> None:
    path = cache.own_folder("x") / "entry.a"
    (left := path.with_suffix(".build")).mkdir()
    (left / "half").touch()

    def interrupted(folder: Path) -> list[Path]:
        assert list(folder.iterdir()) == []
        _file(folder / "entry.a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.keep(path, path.is_file, interrupted)
    assert {p.name for p in path.parent.iterdir()} <= {"entry.lock"}
    cache.keep(path, path.is_file, lambda folder: [_file(folder / "entry.a")])
    assert path.read_text() == "whole"


def test_a_lock_that_nobody_gives_back(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PATIENCE_S", 0.05)
    path = cache.own_folder("x") / "entry.a"
    with cache.locked(path):
        other = cache.lock_of(path)
        with pytest.raises(OSError, match=r"entry\.lock"):
            other.acquire()


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert cache.read_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        cache.read_file(path, 4)
    with pytest.raises(OSError, match="not a regular file"):
        cache.read_file(tmp_path, 4)


@pytest.mark.interpreter
def test_kernels_run_from_memory(top: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Triton's, where the cache is a file."""
    top.parent.mkdir()
    top.touch()
    cache.import_source.cache_clear()
    triton_engine.compile_with.cache_clear()
    q, k, v = (torch.randn(1, 20, 1, 4, dtype=torch.float64) for _ in range(3))
    want, _ = cw.library.linear_attention(q, k, v, engine="reference")
    got, _ = cw.library.linear_attention(q.float(), k.float(), v.float(), engine="triton")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert len(caplog.records) == 1
