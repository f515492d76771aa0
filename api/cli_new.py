"""The command `chunkwise new`: a folder with a recurrence, its test, a layer and a benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
from pathlib import Path

from .cli_command import Command, UsageError

_STARTER = Path(__file__).resolve().parent / "starter"
_NAME = "my_rule"  # of the recurrence in the folder `starter`


def starter(name: str) -> dict[str, str]:
    """The files of a starter whose recurrence is called `name`: names and texts."""
    files = (f for f in sorted(_STARTER.iterdir()) if f.suffix in (".py", ".md"))
    return {
        f.name.replace(_NAME, name): f.read_text(encoding="utf-8").replace(_NAME, name)
        for f in files
    }


def _new(arguments: argparse.Namespace) -> int:
    name, folder = arguments.name, arguments.output or Path(arguments.name)
    files = starter(name)
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot name a recurrence: it must be a name in Python")
    if list(files).count(f"{name}.py") != 1 or len(files) != len(starter(_NAME)):
        raise UsageError(f"{name}.py is another file of the starter; choose another name")
    if folder.exists():
        raise UsageError(f"{folder} exists: nothing was written; -o names another")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:  # None: a folder here that is no package
        raise UsageError(f"a module {name!r} is installed, which {name}.py would hide")
    try:
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as why:
        raise UsageError(f"{folder} cannot be written: {why.strerror or why}") from None
    for file in files:
        print(folder / file)
    print(f"\nnext: cd {folder} && python -m pytest && python layer.py && python benchmark.py")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the recurrence's name, as in Python")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="the folder to make (default: NAME)"
    )


NEW = Command(
    "new",
    "Write a folder to start from: a recurrence with its test, a layer and a benchmark.",
    ("chunkwise new my_rule", "chunkwise new my_rule -o work/my_rule"),
    _arguments,
    _new,
)
