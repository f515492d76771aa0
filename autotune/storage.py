"""Opens the storage of studies: Optuna's journal file by default, or a database that Optuna knows.

The operating system locks the journal, so that a killed process leaves no lock behind. If a killed
process left an unfinished line, this line is removed before the next one is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import SQLAlchemyError

from ..runtime.cache import lock_of

JOURNAL = "journal://"


class NoStorage(Exception):
    """The storage for trials cannot be opened."""


class _Lock(JournalFileOpenLock):
    """An exclusive lock, held while an entry is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._lock = lock_of(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        _mend(self._path)
        return True

    def release(self) -> None:
        self._lock.release()


def _mend(path: Path) -> None:
    """Remove an unfinished last line."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def open_storage(url: str) -> BaseStorage:
    """The storage at `url`: a journal file (`journal:///path` or a path), else a database's URL.

    Raises:
        NoStorage: the driver is not installed, the database does not answer, or the file cannot
            be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in url and not url.startswith(JOURNAL):
        try:
            return RDBStorage(url)
        except ImportError as missing:
            driver = missing.__cause__ or missing
            what = f"{_place(url)} needs a driver that is not installed: {driver}"
            hint = 'for PostgreSQL: pip install "psycopg[binary]"'
            raise NoStorage(f"{what} ({hint})") from None
        except (SQLAlchemyError, ValueError) as why:
            first = str(why).strip().splitlines()[0]
            raise NoStorage(f"{_place(url)} does not answer: {first}") from None
    path = Path(url.removeprefix(JOURNAL)).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))
    except OSError as why:
        raise NoStorage(f"{_place(url)} cannot be written: {why}") from None


def close_storage(storage: BaseStorage) -> None:
    """Close the connections to a database; a journal has none."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _place(url: str) -> str:
    return f"storage {without_secrets(url)}"


def without_secrets(url: str) -> str:
    """The URL without user and password, for reports and artifacts."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
