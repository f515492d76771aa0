"""Runs every block of the documents, and rewrites what they print.

A page is a program: its blocks run in order, in one folder that starts empty, and share one set of
Python names. A comment on the line before a block says what else it is:

`<!-- file: NAME -->`       the block is written to that file, which later blocks use;
`<!-- printed: ARGS -->`    the output of `chunkwise ARGS`, rewritten;
`<!-- output -->`           what the blocks since the last such mark printed, rewritten;
`<!-- output: varies -->`   the same, in which numbers may differ from run to run;
`<!-- raises: ERROR -->`    the Python block ends in this error, whose text counts as printed;
`<!-- run as: COMMAND -->`  a shell block of minutes; this shorter command runs in its place;
`<!-- not run: REASON -->`  the block needs a GPU, a network or many minutes, as the reason says.

Unmarked blocks of ```python and ```sh run; others are text. `make docs` rewrites the pages, and
tests/test_docs.py compares without writing. `python docs/regenerate.py --times FILE` notes how
long each command took, and all Python blocks of a page together.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chunkwise import cli, errors

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
PAGES = (ROOT / "README.md", *sorted(FOLDER.rglob("*.md")))
_LINKED = ("docs", "examples", "runtime")  # of the checkout, which commands of the pages name
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[a-z ]+)(?:: (?P<detail>.*?))? -->\n)?"
    r"^```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
_MARKS = ("file", "printed", "output", "raises", "run as", "not run")
_NUMBER = re.compile(r"[-−+]?\d[\d.,]*(?:e[-+]?\d+)?")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, path, modules = Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    sys.path.append(str(folder))  # a page may be called like a package
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in set(sys.modules) - modules:  # the next page may have a file of the same name
            file = Path(getattr(sys.modules[name], "__file__", None) or sys.executable).resolve()
            if file.is_relative_to(folder.resolve()) or file.is_relative_to(FOLDER):
                del sys.modules[name]


def _named(error: str | None) -> type[Exception] | tuple[()]:
    """The class of errors of that name; nothing to catch where there is no name."""
    if error is None:
        return ()
    found: type[Exception] = getattr(errors, error, None) or getattr(builtins, error)
    return found


@dataclass
class _Run:
    """One run of a page: its folder, its Python names, and what was printed since the last mark."""

    page: Path
    folder: Path
    names: dict[str, object] = field(default_factory=lambda: {"__name__": "page"})
    printed: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # by command

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def block(self, found: re.Match[str]) -> str:
        """Run one block; its text, with its output anew."""
        mark, detail, language, code = found.group("mark", "detail", "language", "code")
        if mark and mark not in _MARKS:
            raise ValueError(f"{self.page.name}: unknown mark {mark!r}")
        if mark in ("file", "printed", "raises", "run as", "not run") and not detail:
            raise ValueError(f"{self.page.name}: {mark!r} needs a word more")
        if mark == "file":
            path = self.folder / detail
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code, encoding="utf-8")
        elif mark == "printed":
            prompt = "# $" if language == "python" else "$"
            return self._rewritten(found, f"{prompt} chunkwise {detail}\n{self._command(detail)}")
        elif mark == "output":
            text, self.printed = self.printed, ""
            if detail == "varies" and _NUMBER.sub("#", text) == _NUMBER.sub("#", code):
                return found[0]
            return self._rewritten(found, text)
        elif mark == "run as":
            self._shell(detail)
        elif mark != "not run" and language == "python":
            self._python(code, detail if mark == "raises" else None)
        elif mark != "not run" and language == "sh":
            self._shell(code)
        return found[0]

    def _rewritten(self, found: re.Match[str], text: str) -> str:
        start, end = found.start("code") - found.start(), found.end("code") - found.start()
        lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        return f"{found[0][:start]}{lines}\n{found[0][end:]}"

    def _python(self, code: str, raises: str | None) -> None:
        path = self.folder / f"{self.page.stem}.py"  # declarations read their lines from there
        path.write_text(code, encoding="utf-8")
        linecache.clearcache()
        out = io.StringIO()
        with contextlib.redirect_stdout(out), self._timed("its Python"):
            try:
                exec(compile(code, str(path), "exec"), self.names)
            except _named(raises) as error:
                out.write("".join(traceback.format_exception_only(error)))
                raises = None
        if raises:
            raise AssertionError(f"{self.page.name}: no {raises} where the page shows one")
        self.printed += out.getvalue().replace(f"{self.folder}/", "")

    def _shell(self, code: str) -> None:
        lines = [
            shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()
        ]
        lines = [line for line in lines if line]
        if all(line[0] == "chunkwise" for line in lines) and not re.search(r"[|<>;&$`*]", code):
            for line in lines:  # a process of its own would spend seconds on importing torch
                self.printed += self._command(shlex.join(line[1:])) + "\n"
            return
        tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        with self._timed(f"`{'; '.join(shlex.join(line) for line in lines)}`"):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=self.folder,
                env={**os.environ, "PATH": tools},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise AssertionError(f"{self.page.name}: {code}{done.stdout}{done.stderr}")
        self.printed += done.stdout

    def _command(self, arguments: str) -> str:
        """The output of `chunkwise ARGUMENTS`."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), self._timed(f"`chunkwise {arguments}`"):
            code = cli.main(shlex.split(arguments))
        if code:
            raise AssertionError(f"{self.page.name}: chunkwise {arguments} ended with {code}")
        return out.getvalue().strip("\n")


def run(page: Path, folder: Path) -> tuple[str, dict[str, float]]:
    """Run the blocks of `page` in `folder`.

    Returns:
        Its text with every output anew, and the seconds that each command took.
    """
    for name in _LINKED:
        (folder / name).symlink_to(ROOT / name)
    running = _Run(page, folder)
    with _inside(folder):
        text = _BLOCK.sub(running.block, page.read_text(encoding="utf-8"))
    return text, running.seconds


def regenerated(page: Path, folder: Path) -> str:
    """The text of `page` with every output anew, after its blocks have run in `folder`."""
    return run(page, folder)[0]


def _note(file: Path, rows: list[dict[str, str]]) -> None:
    """Write rows with the machine, for docs/tables.py."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import machine, report

    described = machine.describe(torch.device("cpu"))
    described["device"] = f"{described['processor']}, {os.cpu_count()} cores"
    report.write(file, ("python", "docs/regenerate.py", "--times", str(file)), described, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages; 0."""
    parser = argparse.ArgumentParser(description="Run the documents and rewrite what they print.")
    parser.add_argument("--times", type=Path, metavar="FILE", help="write what took how long there")
    arguments = parser.parse_args(argv)
    rows = []
    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder:
            text, seconds = run(page, Path(folder))
        page.write_text(text, encoding="utf-8")
        name = str(page.relative_to(ROOT))
        rows += [{"page": name, "command": c, "seconds": f"{s:.1f}"} for c, s in seconds.items()]
    if arguments.times is not None:
        _note(arguments.times, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
