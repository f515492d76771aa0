"""Writes two pages of the reference from the product: the command line, environment variables.

`make docs` runs this; tests/test_reference.py compares without writing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from chunkwise.cli import COMMANDS, parser
from chunkwise.environment import VARIABLES

FOLDER = Path(__file__).resolve().parent / "reference"

_HEAD = """\
# Command line

`chunkwise COMMAND …` and `python -m chunkwise COMMAND …` are the same. `chunkwise COMMAND --help`
prints what this page says of a command, which is made from the same parser.

TARGET
: A name of the library (`chunkwise list`), or `FILE.py:NAME`; `FILE.py` alone is enough where it
  declares one recurrence.

DTYPE
: `bfloat16` (or `bf16`), `float16` (`fp16`), `float32` (`fp32`). Every command reads each spelling,
  and prints the first.

`--json`
: One JSON document on stdout instead of text.

Results go to stdout. A command that takes more than five seconds reports its progress on stderr:
a bar on a terminal, elsewhere a line every ten seconds. The exit status is 0 for success, 1 for a
failure (stderr says why), 2 for a command line that was not understood, and 130 after Ctrl-C;
`tune`, `verify`, `audit` and `emit --resources` then keep and print their results so far.
"""


def command_line() -> str:
    """The page on the command line."""
    pages = [_HEAD, "| command | |\n|---|---|"]
    pages[-1] += "".join(f"\n| [`{c.name}`](#{c.name}) | {_cell(c.help)} |" for c in COMMANDS)
    pages[-1] += "\n"
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command in COMMANDS:
        lines = [f"## {command.name}", "", command.help, "", "| argument | meaning |", "|---|---|"]
        own = _own(commands.choices[command.name])
        lines += [f"| {_name(a)} | {_cell(_meaning(a))} |" for a in own]
        if lines[-1] == "|---|---|":
            lines = lines[:-3]
        else:
            lines.append("")
        lines += ["```text", *(f"$ {line}" for line in command.examples), "```", ""]
        pages.append("\n".join(lines))
    return "\n".join(pages)


def _own(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    positional = [a for a in command._actions if not a.option_strings]
    optional = [a for a in command._actions if a.option_strings]
    return (a for a in (*positional, *optional) if not isinstance(a, argparse._HelpAction))


def _name(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None:
        value = "" if action.nargs == 0 else action.dest.upper()
    if not action.option_strings:
        several = {"+": f"`{value}` …", "*": f"[`{value}` …]", "?": f"[`{value}`]"}
        return several.get(str(action.nargs), f"`{value}`")
    names = ", ".join(f"`{o}`" for o in action.option_strings)
    named = f"{names} `{value}`" if value and action.choices is None else names
    return f"{named} (required)" if action.required else named


def _meaning(action: argparse.Action) -> str:
    """The help, with the choices where there are some."""
    if action.choices is None:
        return action.help or ""
    choices = ", ".join(f"`{c}`" for c in action.choices)
    return f"{action.help}: {choices}" if action.help else choices


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def environment() -> str:
    """The page on environment variables."""
    lines = [
        "# Environment variables",
        "",
        "Every variable that chunkwise itself reads; torch, Triton and TVM have others of their",
        "own. `chunkwise doctor` prints those that are set. An argument of a call wins over a",
        "variable.",
        "",
        "| variable | values | default | read | meaning |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{v.name}` | {_cell(v.values)} | {_cell(v.default)} | {v.read} | {_cell(v.meaning)} |"
        for v in VARIABLES
    ]
    return "\n".join([*lines, ""])


PAGES = {"command-line.md": command_line, "environment.md": environment}


def main() -> int:
    """Write the pages; 0."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
