"""The cache folder: its place, the checks of its safety, and the writing of its entries.

Files in the cache are executed, or decide which kernels run. So a folder that another user could
write to is refused, entries are written atomically, and damaged ones are set aside and made again.
Where nothing can be kept, the process compiles into memory and logs this once.
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
_PATIENCE_S = 600.0  # the longest wait for another process that makes an entry, or was stopped


def cache_folder() -> Path:
    """`$CHUNKWISE_CACHE`, else `chunkwise` under the XDG cache folder; it may not exist."""
    return _folder(os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=64)  # every call needs it, and making paths is slow
def _folder(chosen: str | None, xdg: str | None) -> Path:
    path = os.path.expanduser(chosen or os.path.join(xdg or "~/.cache", "chunkwise"))
    return Path(path if path.startswith("~") else os.path.abspath(path))


def own_folder(*names: str) -> Path:
    """The folder of those names below the cache's, made with mode 0700 if it does not exist.

    Raises:
        BadCache: the folder cannot be made, or other users could change its contents.
    """
    top = cache_folder()
    if not top.is_absolute():
        raise errors.BadCache(str(top), "this user has no home folder")
    below = list(itertools.accumulate(names, lambda folder, name: folder / name, initial=top))
    try:
        os.fspath(top).encode()  # LLVM and linkers take paths as text
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            below[-1].lstat()  # raises for a name that is too long, before any folder is made
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
    """Why other users could change the contents of a cache folder; empty if they cannot."""
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
    """Log, once per process and cache folder, that the cache is not used, and why."""
    if next(_times_said(cache_folder(), os.getpid())) == 0:
        text = " ".join(str(why).split())
        _LOG.warning("kernels are compiled into memory, by every process again: %s", text)


@lru_cache(maxsize=64)
def _times_said(folder: Path, process: int) -> Iterator[int]:
    del folder, process
    return itertools.count()


def read_file(path: Path, limit: int) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: it cannot be read, is not a regular file, or holds more than `limit` bytes.
    """
    # without O_NONBLOCK, opening a pipe would wait
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
    """Write `text` to `path` atomically: a temporary file in the same folder is renamed."""
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
    """The lock, across processes, under which the entry `path` is written.

    Anything but a regular file in the lock file's place is set aside.
    """
    lock = path.with_suffix(".lock")
    if os.path.lexists(lock) and not stat.S_ISREG(lock.lstat().st_mode):
        set_aside(lock)
    return FileLock(lock, timeout=_PATIENCE_S, mode=0o600)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the entry `path`.

    Raises:
        OSError: the lock cannot be taken: the folder is not writable, or another process was
            stopped while it held the lock.
    """
    held = lock_of(path)
    try:
        held.acquire()
    except NotImplementedError as why:  # filelock's word for a file system without locks
        raise OSError(errno.ENOLCK, str(why), str(path)) from None
    try:
        for left in path.parent.glob(f"{path.name}.*.tmp"):  # left by a killed process
            left.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def set_aside(path: Path) -> Path:
    """Rename a damaged entry to `<name>.damaged`, which is replaced; returns the new path."""
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
    """Make the entry `path` of the cache unless it is `sound`, by one process at a time.

    `make` writes the entry's files, which differ in their suffixes, into the folder it is given,
    and returns them in the order in which they are moved to their places. If the process is killed,
    the next process that makes the entry removes that folder.

    Raises:
        OSError: the entry cannot be written.
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
    """The module of `source`, kept in a file of the cache for Triton's messages and profilers."""
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
