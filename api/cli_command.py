"""The type of a command, the arguments that commands share, and the search for a TARGET."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import library
from .dsl.declaration import Declaration
from .dsl.diagnostic import did_you_mean
from .dsl.errors import BadFile, ChunkwiseError
from .runtime.recurrence import Recurrence

TARGET = "TARGET"  # in usages: a name of the library, or FILE.py:NAME


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
        metavar=TARGET,
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
            raise UsageError(unknown_name(name))
        found = getattr(library, name)
        assert isinstance(found, Recurrence)
        return found
    declared = _recurrences_of(_existing(Path(file)))
    if not name and len(declared) == 1:
        return next(iter(declared.values()))
    if name not in declared:
        if not declared:
            raise UsageError(f"{file} declares no recurrence (a function under @recurrence)")
        listed = ", ".join(declared)
        if not name:
            raise UsageError(f"which recurrence of {file}? It declares {listed}: {file}:NAME")
        near = did_you_mean(name, declared) or f"it declares {listed}"
        raise UsageError(f"no recurrence {name!r} in {file}; {near}")
    return declared[name]


def write(path: Path, text: str) -> None:
    """Write a result where the command line says.

    Raises:
        UsageError: nothing can be written there.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as why:  # no such folder, a folder of that name, no room, no permission
        raise UsageError(f"{path} cannot be written: {why.strerror or why}") from None


def no_such(what: str, word: str, known: Iterable[str]) -> str:
    """The message for a word that is none of the known ones."""
    near = did_you_mean(word, known) or f"there are {', '.join(known)}"
    return f"no {what} {word!r}; {near}"


def unknown_name(name: str) -> str:
    """The message for a name that the library does not have."""
    if name.endswith(".json"):
        return f"{name} is no recurrence: `chunkwise verify {name}` takes an artifact"
    near = did_you_mean(name, library.names()) or "`chunkwise list` shows what there is"
    first, dot, rest = name.partition(".")
    if Path(f"{first}.py").is_file():
        return f"no recurrence {name!r}; did you mean {first}.py{dot and ':'}{rest}?"
    return f"no recurrence {name!r} in the library; {near} (one of your own is FILE.py:NAME)"


def _existing(file: Path) -> Path:
    """`file`, if it is one."""
    if file.is_file():
        return file
    near = ""
    if file.stem in library.names():
        near = f"; the library has {file.stem}, which needs no file"
    elif file.with_suffix(".py").is_file():
        near = f"; did you mean {file.with_suffix('.py')}:NAME?"
    raise UsageError(f"no file {file}{near}")


def _recurrences_of(file: Path) -> dict[str, Recurrence]:
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
        raise BadFile(file.name, _users_traceback(raised)) from raised
    found: dict[str, Recurrence] = {}
    for name, value in vars(module).items():
        if isinstance(value, Recurrence):
            found[name] = value
        elif isinstance(value, Declaration):
            found[name] = Recurrence(value)
    return found


def _users_traceback(raised: BaseException) -> str:
    """The traceback as Python prints it, without frames of chunkwise and of the import."""
    ours = {
        os.path.dirname(module.__file__ or "")
        for name, module in list(sys.modules.items())
        if f"{name}.".startswith(f"{__package__}.") and hasattr(module, "__file__")
    }
    whole = traceback.TracebackException.from_exception(raised)
    pending: list[traceback.TracebackException | None] = [whole]
    while pending:
        part = pending.pop()
        if part is not None:
            part.stack[:] = [
                f
                for f in part.stack
                if not f.filename.startswith("<frozen importlib")
                and os.path.dirname(f.filename) not in ours
            ]
            pending += [part.__cause__, part.__context__]
    return "".join(whole.format())
