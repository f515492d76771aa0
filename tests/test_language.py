"""Every word of the language has a paragraph and an example in docs/reference, every refusal too.

That the examples run, and print what the pages show, is tested with all documents.
"""

from __future__ import annotations

import re
from pathlib import Path

import chunkwise as cw
import pytest
from chunkwise.dsl import functions, kinds

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
NUMBERS = ("float", "int", "bool")
OPERATORS = ("*", "/", "+", "-", "@", "**")
WORDS = ("recurrence", "tuple", *NUMBERS, *OPERATORS, *kinds._ALIASES, *functions.__all__)
REFUSALS = [
    error.__name__
    for error in vars(cw.errors).values()
    if isinstance(error, type)
    and issubclass(error, (cw.errors.DeclarationError, cw.errors.CallError))
    and error not in (cw.errors.DeclarationError, cw.errors.CallError)
    and error is not cw.errors.RankMismatch  # of several processes: docs/howto/many-gpus.md
]


def _sections(page: str) -> dict[str, str]:
    """The text below every heading, by the words in code that the heading names."""
    parts = re.split(r"^#{2,3} (.*)$", (FOLDER / page).read_text(encoding="utf-8"), flags=re.M)[1:]
    found: dict[str, str] = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", heading), text)
    return found


LANGUAGE, REFUSED = _sections("language.md"), _sections("refusals.md")
_FENCE = re.compile(r"^(<!-- .*? -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)


def _prose(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text)).strip()


def _examples(text: str) -> list[tuple[str, str]]:
    """The Python blocks that run, each with its mark."""
    blocks = [(mark, code) for mark, language, code in _FENCE.findall(text) if language == "python"]
    return [(mark, code) for mark, code in blocks if "not run" not in mark]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_has_a_paragraph_and_an_example(word: str) -> None:
    assert word in LANGUAGE, f"docs/reference/language.md has no heading `{word}`"
    assert len(_prose(LANGUAGE[word]).split()) >= 4
    used = re.escape(word) if word in OPERATORS else rf"\b{word}\b"
    assert any(re.search(used, code) for _, code in _examples(LANGUAGE[word]))


@pytest.mark.parametrize("error", REFUSALS)
def test_a_refusal_has_a_reason_and_an_example(error: str) -> None:
    assert error in REFUSED, f"docs/reference/refusals.md has no heading `{error}`"
    assert len(_prose(REFUSED[error]).split()) >= 4
    assert any(mark == f"<!-- raises: {error} -->\n" for mark, _ in _examples(REFUSED[error]))


def test_the_pages_have_no_word_that_the_language_lacks() -> None:
    others = {"EngineUnavailable", "NotLowered"}
    assert set(LANGUAGE) == set(WORDS)
    assert set(REFUSED) == {*REFUSALS, *others}
