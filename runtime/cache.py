"""The cache folder: the one place that says where it lies, whether it is safe, how it is written.

What lies in it is run or decides what is run. So a folder that somebody else could write to is
refused, entries appear whole or not at all, damaged ones are set aside and made again, and where
nothing can be kept, the process goes on in memory and says so once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from ..codegen.modules import import_text
from ..dsl import errors

CACHE_VARIABLE = "CHUNKWISE_CACHE"
_LOG = logging.getLogger("chunkwise")
_PATIENCE_S = 600.0  # that an entry of another process is waited for: it may have been stopped


def cache_folder() -> Path:
    """`$CHUNKWISE_CACHE`, else `chunkwise` under the XDG cache folder; it may not exist."""
    return _folder(os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=64)  # asked for by every call, and paths are slow to make
def _folder(chosen: str | None, xdg: str | None) -> Path:
    path = os.path.expanduser(chosen or os.path.join(xdg or "~/.cache", "chunkwise"))
    return Path(path if path.startswith("~") else os.path.abspath(path))


def own_folder(*names: str) -> Path:
    """The folder of those names below the cache's, made where there is none (mode 0700).

    Raises:
        BadCache: it cannot be made, or others could change what lies in it.
    """
    top = cache_folder()
    if not top.is_absolute():
        raise errors.BadCache(str(top), "this user has no home folder")
    below = list(itertools.accumulate(names, lambda folder, name: folder / name, initial=top))
    try:
        os.fspath(top).encode()  # LLVM and linkers are given it as text
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            below[-1].lstat()  # too long a name: nothing of it shall be made
        for path in (*reversed(top.parents), *below):
            if not os.path.lexists(path):
                with contextlib.suppress(FileExistsError):  # another process did
                    path.mkdir(mode=0o700)
            fault = danger(path) if path in below else _others_rename(path)
            if fault:
                raise errors.BadCache(str(top), fault)
    except UnicodeEncodeError:
        raise errors.BadCache(ascii(str(top)), "its name is not UTF-8") from None
    except errors.BadCache:
        raise
    except OSError as why:
        raise errors.BadCache(str(top), str(why)) from None
    return below[-1]


def danger(folder: Path) -> str:
    """Why others could change what lies in a folder of the cache; empty if they cannot."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "no folder"
        return f"{folder} is {kind}"
    if about.st_uid != _user():
        return f"{folder} belongs to user {about.st_uid}, and this process to user {_user()}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder}: chmod 700 makes it yours alone"
    return ""


def _others_rename(folder: Path) -> str:
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return f"others may rename what lies in {folder} (its mode is {stat.S_IMODE(mode):o})"
    return ""


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def do_without(why: Exception) -> None:
    """Say, once per process and cache folder, that the cache is not used, and why."""
    if next(_times_said(cache_folder(), os.getpid())) == 0:
        text = " ".join(str(why).split())
        _LOG.warning("kernels are compiled into memory, by every process again: %s", text)


@lru_cache(maxsize=64)
def _times_said(folder: Path, process: int) -> Iterator[int]:
    del folder, process
    return itertools.count()


def read_file(path: Path, limit: int) -> bytes:
    """What a regular file holds.

    Raises:
        OSError: it cannot be read, is not a regular file, or holds more than `limit` bytes.
    """
    # a pipe would keep us waiting
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(handle, "rb", closefd=False) as file:
            held = file.read(limit + 1)
    finally:
        os.close(handle)
    if len(held) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return held


def write_atomically(path: Path, text: str) -> None:
    """`text` at `path`, whole or not at all: a temporary file in the same folder, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_of(path: Path) -> FileLock:
    """Who holds it, among all processes, may write the entry `path`.

    What lies in its place and is no file is set aside.
    """
    lock = path.with_suffix(".lock")
    if os.path.lexists(lock) and not stat.S_ISREG(lock.lstat().st_mode):
        set_aside(lock)
    return FileLock(lock, timeout=_PATIENCE_S, mode=0o600)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the entry `path`.

    Raises:
        OSError: no lock can be had: the folder is not writable, or another process was stopped
            while it held it.
    """
    held = lock_of(path)
    try:
        held.acquire()
    except NotImplementedError as why:  # filelock's word for a file system without locks
        raise OSError(errno.ENOLCK, str(why), str(path)) from None
    try:
        for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def set_aside(path: Path) -> Path:
    """Rename what is damaged to `<name>.damaged`, in place of what was before; returns its path."""
    aside = path.with_name(f"{path.name}.damaged")
    _remove(aside)
    path.rename(aside)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep(path: Path, sound: Callable[[], bool], make: Callable[[Path], Iterable[Path]]) -> None:
    """Have the entry `path` in the cache: found `sound`, else made by one process at a time.

    `make` writes the entry's files, which differ in their suffixes, into the folder it is given,
    and names them in the order in which they take their places. A process killed on the way leaves
    that folder to the next one that makes the entry.

    Raises:
        OSError: nothing can be written there.
    """
    if sound():
        return
    with locked(path):
        if sound():
            return
        if os.path.lexists(path):
            _LOG.warning("%s is damaged: it is set aside and made again", path)
        building = path.with_suffix(".build")
        try:
            _remove(building)
            building.mkdir(mode=0o700)
            for file in make(building):
                place = path.with_suffix(file.suffix)
                if os.path.lexists(place):
                    set_aside(place)
                file.replace(place)
        finally:
            shutil.rmtree(building, ignore_errors=True)


@lru_cache(maxsize=1024)
def import_source(source: str) -> ModuleType:
    """The module of `source`; Triton's messages and profilers find it in a file of the cache."""
    text = source.encode()
    stem = f"kernels_{hashlib.blake2b(text, digest_size=10).hexdigest()}.py"
    file = stem

    def write(folder: Path) -> list[Path]:
        (folder / stem).write_bytes(text)
        return [folder / stem]

    try:
        path = own_folder("source") / stem
        keep(path, lambda: _holds(path, text), write)
        file = str(path)
    except OSError as why:
        do_without(why)
    return import_text(f"chunkwise_emitted_{stem[8:-3]}", source, file)


def _holds(path: Path, text: bytes) -> bool:
    try:
        return read_file(path, len(text)) == text
    except OSError:
        return False
