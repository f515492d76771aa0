"""Infix notation with few parentheses: the one place that knows how tightly operators bind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from .ir import Op


class Level(IntEnum):
    """How tightly an expression binds, by its weakest operator."""

    SUM = 1
    SERIES = 2  # Σ_k and the product behind it
    QUOTIENT = 3
    PRODUCT = 4
    ATOM = 5


class Text(NamedTuple):
    """A printed expression."""

    text: str
    level: Level = Level.ATOM

    def at(self, least: Level) -> str:
        """The expression where only those that bind at least so tightly need no parentheses."""
        return self.text if self.level >= least else f"({self.text})"

    def after(self, least: Level) -> str:
        """The same behind an operator, which no sign follows."""
        return f"({self.text})" if self.text[0] in "-−" else self.at(least)


# op -> its level, and those that its left and right argument need: a * (b / c) is not a * b / c
_LEVELS = {
    Op.ADD: (Level.SUM, Level.SUM, Level.SUM),
    Op.SUB: (Level.SUM, Level.SUM, Level.SERIES),
    Op.MUL: (Level.PRODUCT, Level.QUOTIENT, Level.PRODUCT),
    Op.DIV: (Level.QUOTIENT, Level.QUOTIENT, Level.ATOM),
    Op.READ: (Level.PRODUCT, Level.QUOTIENT, Level.ATOM),
    Op.READ_VALUE: (Level.PRODUCT, Level.QUOTIENT, Level.ATOM),
}


@dataclass(frozen=True, slots=True)
class Notation:
    """The signs of operators, with the spaces around them; the sign and the level of a negative."""

    signs: Mapping[Op, str]
    minus: str = "-"
    negatives: Level = Level.SUM

    def binary(self, op: Op, left: Text, right: Text) -> Text:
        """`op` of two expressions."""
        level, before, behind = _LEVELS[op]
        if left.level >= before:  # a / b * c binds as a / b does
            level = min(level, left.level)
        return Text(f"{left.at(before)}{self.signs[op]}{right.after(behind)}", level)

    def negative(self, x: Text) -> Text:
        """-x."""
        return Text(f"{self.minus}{x.after(Level.QUOTIENT)}", self.negatives)


PYTHON = Notation({Op.ADD: " + ", Op.SUB: " - ", Op.MUL: " * ", Op.DIV: " / "})


def read(text: str) -> Text:
    """A text in Python's notation, with the level of its weakest operator outside brackets."""
    level, depth = Level.ATOM, 0
    for n, c in enumerate(text):
        if c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        elif depth == 0 and not (c.isalnum() or c in "_."):
            plus = c == "+" or (c == "-" and text[:n][-1:] in ("", " "))  # not the sign in 1e-5
            level = min(level, Level.SUM if plus else Level.QUOTIENT if c == "/" else Level.PRODUCT)
    return Text(text, level)
