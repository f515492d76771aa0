"""Imports emitted source: from files, or from memory where no file can be written."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import ModuleType


class _Emitted(ExecutionLoader):
    """A module's text, for Python and for all who ask Python for it (Triton, tracebacks).

    Nothing is taken from `__pycache__`: only the text that is given is run.
    """

    def __init__(self, source: str, file: str) -> None:
        self._source, self._file = source, file

    def get_source(self, fullname: str) -> str:
        """The text."""
        return self._source

    def get_filename(self, fullname: str) -> str:
        """The file that holds it, if one does."""
        return self._file


def import_text(name: str, source: str, file: str) -> ModuleType:
    """The module of `source`, run now and known to Python as `name`; `file` may not exist."""
    spec = importlib.util.spec_from_loader(name, _Emitted(source, file), origin=file)
    assert spec is not None
    assert spec.loader is not None
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def import_file(name: str, path: Path) -> ModuleType:
    """The module in the file `path`, run now and known to Python as `name`."""
    return import_text(name, path.read_text(encoding="utf-8"), str(path))
