"""The type of a command, the arguments that commands share, and the search for a TARGET."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import library
from .dsl.declaration import Declaration
from .dsl.errors import BadFile, ChunkwiseError
from .dsl.ir import Loc
from .runtime.recurrence import Recurrence


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand; `run` prints to stdout and returns the exit code."""

    name: str
    help: str
    examples: tuple[str, ...]
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class UsageError(Exception):
    """The command line was not understood (exit code 2)."""


def add_target(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The TARGET argument, `arguments.target` (a list where there may be several)."""
    parser.add_argument(
        "target",
        nargs="+" if several else None,
        metavar="TARGET",
        help="a recurrence of the library, or FILE.py:NAME",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The --json flag, `arguments.json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: object) -> None:
    """Print `value` as one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def find(target: str) -> Recurrence:
    """The recurrence that TARGET names.

    Raises:
        UsageError: there is no such file or name.
        DeclarationError: a declaration in the file has a mistake.
        BadFile: the file is not Python, or raises an exception.
    """
    file, colon, name = target.rpartition(":")
    if not colon and target.endswith(".py"):
        file, name = target, ""
    if not file:
        if name not in library.names():
            raise UsageError(
                f"no recurrence {name!r} in the library (chunkwise list shows them); "
                "one of your own is FILE.py:NAME"
            )
        found = getattr(library, name)
        assert isinstance(found, Recurrence)
        return found
    declared = _recurrences_of(Path(file))
    if not name and len(declared) == 1:
        return next(iter(declared.values()))
    if name not in declared:
        listed = ", ".join(declared) or "none"
        what = f"no recurrence {name!r} in {file}" if name else f"which recurrence of {file}?"
        raise UsageError(f"{what} It declares: {listed}. Write {file}:NAME")
    return declared[name]


def _recurrences_of(file: Path) -> dict[str, Recurrence]:
    if not file.is_file():
        raise UsageError(f"no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # annotations written as strings are resolved through the module's entry
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent.resolve()))  # as `python FILE.py` would
    try:
        spec.loader.exec_module(module)
    except ChunkwiseError:
        raise
    except (Exception, SystemExit) as raised:  # the user's own code may raise anything
        raise BadFile(file.name, raised, _line_of(raised, file)) from raised
    found: dict[str, Recurrence] = {}
    for name, value in vars(module).items():
        if isinstance(value, Recurrence):
            found[name] = value
        elif isinstance(value, Declaration):
            found[name] = Recurrence(value)
    return found


def _line_of(raised: BaseException, file: Path) -> Loc | None:
    """The last line of the user's file in the traceback of `raised`, if there is one."""
    path = str(file)
    if isinstance(raised, SyntaxError) and raised.filename == path and raised.lineno:
        return Loc(path, raised.lineno, file.name)
    frames = [f for f in traceback.extract_tb(raised.__traceback__) if f.filename == path]
    return Loc(path, frames[-1].lineno or 1, frames[-1].name) if frames else None
