"""Equations in LaTeX, and in MathML, which browsers typeset without a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ir import Kind, Node, Op
from .notation import Level, Notation, Text

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi"),
    *("omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"),
)
_LETTERS = {name: rf"\{name}" for name in _GREEK} | {"eps": r"\varepsilon", "lam": r"\lambda"}
_BEGIN, _NEXT, _END = "\\begin{aligned}\n", " \\\\\n", "\n\\end{aligned}"
_LEFT = 'style="text-align: left"'
_ACCENTS = {name: rf"\{name}" for name in ("hat", "bar", "tilde")}
_RELATIONS = {"≤": r"\le ", "≥": r"\ge ", " mod ": r" \bmod "}
# %s: an argument that needs no parentheses there; a function without a row is its name in roman
_FUNCTIONS = {
    Op.EXPM1: (r"e^{%s} - 1", Level.SUM),
    Op.LOG: (r"\log(%s)", Level.ATOM),
    Op.LOG1P: (r"\log(1 + %s)", Level.ATOM),
    Op.SIGMOID: (r"\sigma(%s)", Level.ATOM),
    Op.LOGSIGMOID: (r"\log\sigma(%s)", Level.ATOM),
    Op.TANH: (r"\tanh(%s)", Level.ATOM),
    Op.COS: (r"\cos(%s)", Level.ATOM),
    Op.SIN: (r"\sin(%s)", Level.ATOM),
    Op.SQRT: (r"\sqrt{%s}", Level.ATOM),
    Op.RSQRT: (r"\frac{1}{\sqrt{%s}}", Level.PRODUCT),
    Op.ABS: (r"|%s|", Level.ATOM),
    Op.MAXIMUM: (r"\max(%s, %s)", Level.ATOM),
    Op.MINIMUM: (r"\min(%s, %s)", Level.ATOM),
    Op.AT_LEAST: (r"\max(%s, %s)", Level.ATOM),
    Op.AT_MOST: (r"\min(%s, %s)", Level.ATOM),
}


@dataclass(frozen=True, slots=True)
class Equation:
    """One row `left = right` of LaTeX, with a note in plain text."""

    left: str
    right: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.left} = {self.right}"


class Latex(Notation):
    """The notation of papers: vectors are columns, products are juxtaposed."""

    def binary(self, op: Op, left: Text, right: Text) -> Text:
        if op is Op.DIV:
            return Text(rf"\frac{{{left.text}}}{{{right.text}}}", Level.PRODUCT)
        return super().binary(op, left, right)

    def number(self, value: float) -> Text:
        if value == 2.0**-126:
            return Text("2^{-126}")
        text = super().number(value)
        mantissa, e, exponent = text.text.partition("e")
        if not e:
            return text
        power = f"10^{{{int(exponent)}}}"
        factor = {"1": "", "-1": "-"}.get(mantissa, rf"{mantissa} \cdot ")
        return Text(factor + power, min(text.level, Level.PRODUCT if factor else Level.ATOM))

    def symbol(self, name: str, indices: Sequence[str] = ()) -> str:
        """`x_2[i,j]` is x with 2 above and ij below; `k_hat` has its hat, `d_S` is a gradient."""
        base, *labels = name.strip("_").split("_")
        if base in ("d", "log") and labels:
            before, (base, *labels) = (rf"\text{{{base}}}\,"), labels
        else:
            before = ""
        text = _word(base)
        for accent in labels:
            text = f"{_ACCENTS[accent]}{{{text}}}" if accent in _ACCENTS else text
        labels = [x for x in labels if x not in _ACCENTS]
        above = ",".join(f"({x})" if x.isdigit() else _word(x) for x in labels)
        below = "".join(indices) if all(len(x) == 1 for x in indices) else ",".join(indices)
        text += f"_{{{below}}}" if below else ""
        return before + text + (f"^{{{above}}}" if above else "")

    def function(self, op: Op, args: Sequence[Text]) -> Text:
        if op is Op.WITHIN:
            return args[0]
        inner = tuple(a.text for a in args)
        if op is Op.EXP:
            return Text(f"\\exp({inner[0]})" if _tall(inner[0]) else f"e^{{{inner[0]}}}")
        if op not in _FUNCTIONS:
            return Text(rf"\text{{{op.name.lower()}}}({', '.join(inner)})")
        template, level = _FUNCTIONS[op]
        return Text(template % inner, level)

    def elementwise(self, node: Node, args: Sequence[Text]) -> Text:
        vectors = all(a.kind is not Kind.SCALAR for a in node.args)
        if node.op is Op.MUL and vectors:
            left, right = (a.at(Level.ATOM) for a in args)
            return Text(rf"{left} \odot {right}", Level.QUOTIENT)
        if node.op is Op.MUL and node.args[1].kind is Kind.SCALAR is not node.args[0].kind:
            args = args[::-1]  # a scalar stands first
        return self.binary(node.op, *args)

    def algebra(self, node: Node, args: Sequence[Text]) -> Text:
        first, second = args[0], args[-1]
        if node.op is Op.SUM:
            left = _transposed(first) if len(args) == 2 else r"\mathbf{1}^{\top}"
            return Text(rf"{left} {second.after(Level.PRODUCT)}", Level.PRODUCT)
        if node.op is Op.READ:
            return Text(rf"{_transposed(second)} {first.after(Level.PRODUCT)}", Level.PRODUCT)
        if node.op is Op.READ_VALUE:
            left, right = first.at(Level.PRODUCT), second.after(Level.PRODUCT)
            return Text(rf"{left} {right}", Level.PRODUCT)
        kinds = tuple(a.kind for a in node.args)
        if node.op is Op.OUTER and kinds[1] is not Kind.SCALAR:
            return Text(rf"{first.at(Level.PRODUCT)}\,{_transposed(second)}", Level.PRODUCT)
        if kinds[1] is Kind.SCALAR:
            if node.args[1].op is Op.CONST and node.args[1].attrs[0] == 1.0:  # a Key as a KeyState
                return first
            return self.binary(Op.MUL, second, first)
        if kinds[0] is Kind.KEY_STATE:
            return Text(rf"{second.at(Level.ATOM)} \odot {first.at(Level.ATOM)}", Level.QUOTIENT)
        diagonal = rf"\text{{Diag}}({second.text})"
        factors = [diagonal, first.at(Level.PRODUCT)]
        return Text(self.product(factors[:: -1 if kinds[1] is Kind.VALUE else 1]), Level.PRODUCT)

    def series(self, bound: str, term: str) -> Text:
        return Text(rf"\sum_{{{_related(bound)}}} {term}", Level.SERIES)

    def where(self, factor: str, condition: str) -> Text:
        return Text(rf"{factor}\,[{_related(condition)}]", Level.PRODUCT)

    def positive(self, x: Text) -> Text:
        return Text(rf"[{x.text} > 0]")

    def nearest(self, x: Text) -> Text:
        return Text(rf"\operatorname{{round}}({x.text})")

    def unit_inverse(self, lower: str, indices: Sequence[str]) -> Text:
        return Text(rf"(1 + {lower})^{{-1}}_{{{''.join(indices)}}}")


def _transposed(x: Text) -> str:
    text = x.at(Level.ATOM)
    return f"{{{text}}}^{{\\top}}" if "^" in text and text[-1] != ")" else f"{text}^{{\\top}}"


def _word(name: str) -> str:
    """A name: a letter as it is, a Greek one by its name, another in roman."""
    found = re.fullmatch(r"([A-Za-z]+)(\d*)", name)
    word, digits = found.groups() if found else (name, "")
    roman = word if len(word) == 1 else rf"\text{{{word}}}"
    return _LETTERS.get(word, roman) + (f"^{{({digits})}}" if digits else "")


def _related(condition: str) -> str:
    for sign, command in _RELATIONS.items():
        condition = condition.replace(sign, command)
    return condition


LATEX = Latex({Op.ADD: " + ", Op.SUB: " - ", Op.MUL: r"\,", Op.DIV: "/"}, negatives=Level.PRODUCT)


def _tall(latex: str) -> bool:
    return r"\sum" in latex or r"\frac" in latex


def _stretched(latex: str) -> str:
    """Parentheses as high as the sums and fractions within them."""
    opened: list[int] = []
    parts = list(latex)
    for n, c in enumerate(latex):
        if c == "(":
            opened.append(n)
        elif c == ")":
            start = opened.pop()
            if _tall(latex[start:n]):
                parts[start], parts[n] = r"\left(", r"\right)"
    return "".join(parts)


def aligned(equations: Iterable[Equation]) -> str:
    """Equations below one another, aligned at their signs: one display in LaTeX."""
    rows = [f"{e.left} &= {_stretched(e.right)}" for e in equations]
    return _BEGIN + _NEXT.join(rows) + _END


def mathml(latex: str, *, display: bool = True) -> str:
    """LaTeX, perhaps of `aligned`, as a <math> element: a block, or within a line of text."""
    if not latex.startswith(_BEGIN):
        return _converted(latex, display=display)
    rows = ""
    for row in latex.removeprefix(_BEGIN).removesuffix(_END).split(_NEXT):
        left, right = (_inner(_converted(x, display=False)) for x in row.split(" &= "))
        cells = (left, f"<mrow><mo>=</mo>{right}</mrow>")
        rows += f"<mtr>{''.join(f'<mtd {_LEFT}>{x}</mtd>' for x in cells)}</mtr>"
    table = f'<mtable displaystyle="true">{rows}</mtable>'
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">{table}</math>'


def _converted(latex: str, *, display: bool) -> str:
    from latex2mathml.converter import convert

    return str(convert(latex, display="block" if display else "inline"))


def _inner(element: str) -> str:
    return element[element.index(">") + 1 : element.rindex("<")]
