"""Rewrites the printed blocks of docs/architecture.md by running the command line again.

Between `<!-- printed: ARGUMENTS -->` and `<!-- end -->` is the output of the command line for
these arguments. `make docs` runs this; a test compares without writing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from chunkwise import cli

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER / "architecture.md",)
_BLOCK = re.compile(r"(<!-- printed: (.*?) -->\n).*?(<!-- end -->)", re.S)


@contextlib.contextmanager
def _from_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(FOLDER.parent)
    try:
        yield
    finally:
        os.chdir(before)


def printed(arguments: str) -> str:
    """The output of `chunkwise ARGUMENTS`, run from the repository's root."""
    out = io.StringIO()
    with _from_root(), contextlib.redirect_stdout(out):
        code = cli.main(shlex.split(arguments))
    if code:
        raise SystemExit(f"chunkwise {arguments} failed with {code}")
    return out.getvalue().strip("\n")


def regenerated(page: str) -> str:
    """`page` with every block printed anew."""

    def block(found: re.Match[str]) -> str:
        arguments = found[2]
        language = "python" if re.search(r"--stage (triton|eager)", arguments) else "text"
        text = printed(arguments)
        return f"{found[1]}```{language}\n$ chunkwise {arguments}\n{text}\n```\n{found[3]}"

    return _BLOCK.sub(block, page)


def main() -> int:
    """Rewrite the pages; 0."""
    for path in PAGES:
        path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
