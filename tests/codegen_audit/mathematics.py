"""Evaluates printed mathematics with torch, by a small parser, so that tests can check it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_AXES = "ijklvt"
_LINE = re.compile(r"^\s+(?P<name>\w+)(\[(?P<axes>[a-z,]+)\])?\s+= (?P<right>.*?)(\s{2,}.*)?$")
_TOKEN = re.compile(
    r"\s*(?:(?P<where> ?\[[ijt] [≥>=<] [jn]\])|"
    r"(?P<inverse>\(1 \+ (?:(?P<scale>\w+)·)?(?P<matrix>\w+)\)⁻¹\[(?P<entry>\w,\w)\])"
    r"|Σ_(?P<sum>\{[^}]*\}|\w)|(?P<number>\d[\d.]*(?:e-?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)(?:\[(?P<axes>[a-z,]+)\])?(?P<call>\()?|(?P<sign>[+−·/(),]))"
)
_FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "abs": torch.abs,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "at_least": torch.maximum,
    "at_most": torch.minimum,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": torch.nn.functional.softplus,
    "step": lambda x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype)),
}


def evaluate(page: str, leaves: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Every value that an assignment of `page` names, with its axes in the printed order."""
    env = dict(leaves)
    for line in page.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        value = _Parser(found["right"], env, tokens).whole()
        axes = (found["axes"] or "").replace(",", "")
        env[found["name"]] = _taken(value, axes, env)
    return env


def _taken(value: Tensor, axes: str, env: Mapping[str, Tensor]) -> Tensor:
    """`value`, which has every axis, reduced to `axes`; the other axes must have size 1."""
    extra = [n for n, a in enumerate(_AXES) if a not in axes]
    assert all(value.shape[n] == 1 for n in extra), "an index on the right that the left lacks"
    kept = value.squeeze(tuple(extra)) if extra else value
    order = sorted(axes, key=_AXES.index)
    return kept.permute([order.index(a) for a in axes])


class _Parser:
    def __init__(self, text: str, env: Mapping[str, Tensor], tokens: int) -> None:
        self._tokens: list[re.Match[str]] = []
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            assert token, f"cannot read {text[at:]!r}"
            self._tokens.append(token)
            at = token.end()
        self._at = 0
        self._env = env
        self._n = tokens

    def whole(self) -> Tensor:
        value = self._sum()
        assert self._at == len(self._tokens), f"left over: {self._tokens[self._at][0]!r}"
        return value

    def _peek(self, group: str) -> str | None:
        return self._tokens[self._at][group] if self._at < len(self._tokens) else None

    def _sum(self) -> Tensor:
        value = self._term()
        while (sign := self._peek("sign")) in ("+", "−"):
            self._at += 1
            right = self._product()
            value = value + right if sign == "+" else value - right
        return value

    def _term(self) -> Tensor:
        if self._peek("sign") == "−":
            self._at += 1
            return -self._product()
        return self._product()

    def _product(self) -> Tensor:
        if self._peek("sum") is not None:
            return self._big_sum()
        value = self._atom()
        while self._at < len(self._tokens):
            if self._peek("where") is not None:
                value = value * self._where()
            elif (sign := self._peek("sign")) in ("·", "/"):
                self._at += 1
                right = self._atom()
                value = value * right if sign == "·" else value / right
            else:
                break
        return value

    def _big_sum(self) -> Tensor:
        over = str(self._peek("sum")).strip("{}")
        self._at += 1
        value = self._product()
        if not re.search("[<≤≥>]", over):
            return value.sum([_AXES.index(a) for a in over.split(",")], keepdim=True)
        letters, signs = re.split("[<≤≥>]", over), re.findall("[<≤≥>]", over)
        for left, sign, right in zip(letters, signs, letters[1:], strict=False):
            i, j = self._index(left), self._index(right)
            value = value * {"≤": i <= j, "<": i < j, "≥": i >= j, ">": i > j}[sign]
        # of t ≥ i > j both ends are summed over, else t alone
        bound = "t" if len(letters) == 2 or letters[1] == "t" else "tj"
        return value.sum([_AXES.index(a) for a in bound], keepdim=True)

    def _where(self) -> Tensor:
        text = str(self._peek("where")).strip(" []")
        self._at += 1
        left, sign, right = text.split(" ")
        i, j = self._index(left), self._n if right == "n" else self._index(right)
        return {"≥": i >= j, ">": i > j, "=": i == j, "<": i < j}[sign]

    def _index(self, letter: str) -> Tensor:
        shape = [self._n if a == letter else 1 for a in _AXES]
        return torch.arange(self._n).reshape(shape)

    def _atom(self) -> Tensor:
        token = self._tokens[self._at]
        self._at += 1
        if token["inverse"]:
            lower, entry = self._env[token["matrix"]], token["entry"].replace(",", "")
            if token["scale"] is None:
                return self._placed(torch.linalg.inv(torch.eye(self._n) + lower), entry)
            scaled = self._env[token["scale"]].mT[..., None] * lower  # of each column
            return self._placed(torch.linalg.inv(torch.eye(self._n) + scaled), f"v{entry}")
        if token["number"]:
            return self._placed(torch.tensor(float(token["number"]), dtype=torch.float64), "")
        if token["call"]:
            arguments = [self._sum()]
            while self._peek("sign") == ",":
                self._at += 1
                arguments.append(self._sum())
            self._close()
            return _FUNCTIONS[token["name"]](*arguments)
        if token["name"]:
            axes = (token["axes"] or "").replace(",", "")
            return self._placed(self._env[token["name"]], axes)
        assert token["sign"] == "(", f"unexpected {token[0]!r}"
        value = self._sum()
        self._close()
        return value

    def _close(self) -> None:
        assert self._peek("sign") == ")"
        self._at += 1

    def _placed(self, value: Tensor, axes: str) -> Tensor:
        order = sorted(range(len(axes)), key=lambda n: _AXES.index(axes[n]))
        sizes = iter(value.permute(order).shape)
        return value.permute(order).reshape([next(sizes) if a in axes else 1 for a in _AXES])
