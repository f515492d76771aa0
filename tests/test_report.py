"""`chunkwise report` writes a page that is complete, needs no network, and looks right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chunkwise import cli, library
from chunkwise.runtime.tuned import selection

from tests.browser import look, needs_chromium
from tests.classes import NOT_LOWERED

RULE = '''\
import chunkwise as cw
from chunkwise import Key, Scalar, State, Value, exp, outer, tanh


@cw.recurrence
def mine(S: State, q: Key, k: Key, v: Value, g: Scalar):
    """A <gate> & a write: café."""
    S = exp(g) * S + outer(k, v)
    return S, q @ S


@cw.recurrence(engine="reference")
def bent(S: State, q: Key, k: Key, v: Value):
    S = tanh(S + outer(k, v))
    return S, q @ S
'''


def report(target: str, folder: Path) -> Path:
    page = folder / "report.html"
    assert cli.main(["report", target, "-o", str(page), "--quick"]) == 0
    return page


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page.read_text(encoding="utf-8"))


EVERY = [
    *("Declared step", "Features", "Normal form", "Chunk form", "Proof", "Plan"),
    *("Resources per target", "Tuned configurations", "Agreement of engines"),
]


def _shipped() -> str:
    """A recurrence that has an artifact of an H100."""
    file = min(selection.SHIPPED.glob("*/triton-*K128*H100*.json"))
    return str(json.loads(file.read_text(encoding="utf-8"))["recurrence"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "folders", lambda: (selection.SHIPPED,))
        return report(_shipped(), tmp_path_factory.mktemp("report"))


def test_every_section_and_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert headings(page) == EVERY
    for address in re.findall(r'(?:src|href)="([^"]*)', text):
        assert address.startswith(("#", "data:")), address
    assert "url(" not in text
    assert "@import" not in text
    assert "proved for chunks" in text
    assert "NVIDIA H100 80GB HBM3 (sm_90)" in text  # a shipped artifact
    assert 'class="bad"' not in text
    assert "right" in text


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    rule = tmp_path / "rules.py"
    rule.write_text(RULE, encoding="utf-8")
    page = report(f"{rule}:mine", tmp_path)
    assert headings(page) == EVERY
    assert "A &lt;gate&gt; &amp; a write: café." in page.read_text(encoding="utf-8")
    assert headings(report(f"{rule}:bent", tmp_path)) == ["Declared step", "Features"]


def test_a_recurrence_without_chunks(tmp_path: Path) -> None:
    rule = tmp_path / "rules.py"
    rule.write_text(NOT_LOWERED, encoding="utf-8")
    text = report(f"{rule}:fading_mix", tmp_path).read_text(encoding="utf-8")
    assert "states that mix carry a gate per channel" in text
    assert "<h2" in text


def test_the_folder_must_exist(tmp_path: Path) -> None:
    assert cli.main(["report", "oja", "-o", str(tmp_path / "no" / "x.html")]) == 2


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_looks_right(page: Path, dark: bool) -> None:
    seen = look(page, dark=dark)
    assert seen.faults == []
    assert (seen.background < 0.2) == dark
    assert 0.02 < seen.ink < 0.4


@needs_chromium
def test_the_page_fits_a_telephone(page: Path) -> None:
    assert look(page, width=500).faults == []


def test_every_recurrence_has_features() -> None:
    from chunkwise.report.facts import features

    assert all(len(features(getattr(library, n).declaration)) >= 7 for n in library.names())


@needs_chromium
def test_the_look_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    texts = "".join(f'<text x="{x}" y="20">overlapping</text>' for x in (0, 20, 290))
    bad.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><body><div style="width:3000px">\ue123</div>'
        f'<svg width="300" height="30">{texts}</svg><script>console.error("oh")</script></body>',
        encoding="utf-8",
    )
    found = "\n".join(look(bad).faults)
    for what in ("wider", "overlap:", "outside its picture", "no font has \ue123", "oh"):
        assert what in found, found
