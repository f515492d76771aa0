"""Infix notation with few parentheses: the one place that knows how tightly operators bind.

`Notation` is plain text; `dsl/latex.py` overrides its methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from .ir import Node, Op


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


@dataclass(frozen=True)
class Notation:
    """The signs of operators, with the spaces around them; the sign and the level of a negative.

    The methods print one construct each, of arguments that are printed already.
    """

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

    def product(self, factors: Sequence[str]) -> str:
        """Factors, each printed so that it needs no more parentheses."""
        return self.signs[Op.MUL].join(factors)

    def number(self, value: float) -> Text:
        """A number; a negative one binds as a negative does."""
        text = Text(f"{abs(value):g}")
        return text if value >= 0 else self.negative(text)

    def symbol(self, name: str, indices: Sequence[str] = ()) -> str:
        """A named value, or its entry at `indices`."""
        return f"{name}[{','.join(indices)}]" if indices else name

    def function(self, op: Op, args: Sequence[Text]) -> Text:
        """An elementwise function of the language."""
        return Text(f"{op.name.lower()}({', '.join(a.text for a in args)})")

    def elementwise(self, node: Node, args: Sequence[Text]) -> Text:
        """ADD, SUB, MUL or DIV of a step."""
        return self.binary(node.op, *args)

    def algebra(self, node: Node, args: Sequence[Text]) -> Text:
        """SCALE, OUTER, READ, READ_VALUE, or SUM of one vector or of the product of two."""
        if node.op is Op.SCALE:
            return self.binary(Op.MUL, args[1], args[0])
        if node.op is Op.SUM and len(args) == 2:
            return Text(f"dot({', '.join(a.text for a in args)})")
        return (
            self.binary(node.op, *args) if node.op in self.signs else self.function(node.op, args)
        )

    def series(self, bound: str, term: str) -> Text:
        """The sum of `term` over an index, or over those that satisfy `bound`."""
        return Text(f"Σ_{bound if len(bound) == 1 else f'{{{bound}}}'} {term}", Level.SERIES)

    def where(self, factor: str, condition: str) -> Text:
        """`factor` where `condition` holds, and 0 elsewhere (Iverson's brackets)."""
        return Text(f"{factor} [{condition}]", Level.PRODUCT)

    def positive(self, x: Text) -> Text:
        """1 where x > 0, and 0 elsewhere."""
        return Text(f"step({x.text})")

    def nearest(self, x: Text) -> Text:
        """The nearest whole number."""
        return Text(f"round({x.text})")

    def unit_inverse(self, lower: str, indices: Sequence[str]) -> Text:
        """An entry of the inverse of 1 + `lower`."""
        return Text(f"(1 + {lower})⁻¹[{','.join(indices)}]")


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
