"""The message of a mistake: one sentence, the user's own line, the reason, and the remedy."""

from __future__ import annotations

import difflib
import linecache
import os
from collections.abc import Iterable

from .ir import Loc


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X or Y?` for the known words that resemble `word`; empty if none does."""
    lower = {k.lower(): k for k in known}
    typed = word.lower()
    near = difflib.get_close_matches(typed, lower, n=3, cutoff=0.72)
    near += [  # a beginning; a short word with letters exchanged, whose ratio is low
        k
        for k in lower
        if k not in near and len(word) > 2 and (k.startswith(typed) or sorted(k) == sorted(typed))
    ]
    return f"did you mean {' or '.join(lower[k] for k in near[:3])}?" if near else ""


class ChunkwiseError(Exception):
    """Base of every error of chunkwise.

    Attributes:
        headline (str): the mistake in one sentence, with what was got and what was expected.
        loc (Loc | None): the user's own line, where there is one.
        why (str): the reason, or nothing.
        help (str): the remedy, or nothing.
    """

    def __init_subclass__(cls) -> None:
        cls.__module__ = "chunkwise.errors"  # where users find it, and what tracebacks print

    def __init__(
        self, headline: str, *, loc: Loc | None = None, why: str = "", help: str = ""
    ) -> None:
        super().__init__(headline)
        self.headline = headline
        self.loc = loc
        self.why = why
        self.help = help

    def __str__(self) -> str:
        return "\n".join([self.headline, *self._details()])

    def render(self) -> str:
        """The message as the command line prints it.

        Returns:
            The name of the mistake, the sentence, the user's line, the reason, the remedy.
        """
        return "\n".join([f"{type(self).__name__}: {self.headline}", *self._details()])

    def _details(self) -> list[str]:
        lines = [] if self.loc is None else _snippet(self.loc)
        margin = "   " if self.loc is None else " " * (len(str(self.loc.line)) + 1)
        if self.why:
            lines.append(f"{margin}= why:  {self.why}")
        if self.help:
            lines.append(f"{margin}= help: {self.help}")
        return lines

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.headline, self.loc, self.why, self.help)


def _restore(
    cls: type[ChunkwiseError], headline: str, loc: Loc | None, why: str, help: str
) -> ChunkwiseError:
    """Unpickle: tuning workers send their errors to the parent process."""
    error = cls.__new__(cls, headline)
    ChunkwiseError.__init__(error, headline, loc=loc, why=why, help=help)
    return error


def _snippet(loc: Loc) -> list[str]:
    """The user's own line, with carets where Python gives columns."""
    path = os.path.relpath(loc.file) if os.path.isabs(loc.file) else loc.file
    if path.startswith(".."):
        path = loc.file
    number = str(loc.line)
    margin = " " * len(number)
    lines = [f"{margin}--> {path}:{number}, in {loc.function}"]
    text = linecache.getline(loc.file, loc.line).rstrip("\n")
    if not text:
        return lines
    lines += [f"{margin} |", f"{number} | {text}"]
    if loc.col is not None:
        raw = text.encode()  # Python counts columns in UTF-8 bytes
        start = len(raw[: loc.col].decode(errors="ignore"))
        end = len(text) if loc.end_col is None else len(raw[: loc.end_col].decode(errors="ignore"))
        lines.append(f"{margin} | {' ' * start}{'^' * max(end - start, 1)}")
    return lines
