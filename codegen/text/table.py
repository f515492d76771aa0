"""Aligns rows of text as tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

# a number, perhaps with a unit; a dash, or nothing, where there is none
_NUMBER = re.compile(r"-?|-?[\d.,]+( \w+)?")


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as aligned lines: columns of numbers flush right, the others flush left.

    The first row is a heading.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [all(map(_NUMBER.fullmatch, column[1:])) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, numbers, strict=True)
        lines.append("  ".join(x.rjust(w) if n else x.ljust(w) for x, w, n in cells).rstrip())
    return lines
