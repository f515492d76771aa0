"""What commands make of the documents is up to date: tables of results, pictures, the gallery."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chunkwise.dsl.library import all_declarations

from docs import gallery, matrix, pictures, tables
from tests.browser import look, needs_chromium

RESULTS = sorted(tables.FOLDER.glob("*.json"))
PAGES = sorted(tables.FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tables_of_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.regenerated(text) == text, "run `python -m docs.tables`"


def test_every_result_has_a_page_a_command_and_a_date() -> None:
    shown = re.findall(r"<!-- results: (\S+) -->", "".join(p.read_text() for p in PAGES))
    assert sorted(shown) == [p.name for p in RESULTS]
    for path in RESULTS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["command"]
        assert re.match(r"\d{4}-\d\d-\d\d", result["machine"]["date"])
        assert result["machine"]["device"]


def test_gallery() -> None:
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.page() == page, "run `python -m docs.gallery`"
    assert page.count("\n## ") == len(all_declarations())


def test_matrix() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.page() == page, "run `python -m docs.matrix`"
    assert matrix._NOT_PROVED not in page, "run `python -m docs.matrix --prove`"
    rows = tables.load(matrix.PROOFS)["rows"]
    assert all(float(r["CPU seconds"]) <= 10 for r in rows)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures(name: str) -> None:
    path = pictures.FOLDER / f"{name}.svg"
    assert pictures.PICTURES[name]() == path.read_text(encoding="utf-8"), (
        "run `python -m docs.pictures`"
    )
    made = {p.stem for p in pictures.FOLDER.iterdir()} - {"mqar"}  # the demo writes that one
    assert made == set(pictures.PICTURES)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures_look_right(tmp_path: Path, dark: bool) -> None:
    page = tmp_path / "pictures.html"
    drawn = "\n".join(
        p.read_text(encoding="utf-8")
        for p in sorted(pictures.FOLDER.iterdir())
        if p.stem in pictures.PICTURES
    )
    style = "<style>:root { color-scheme: light dark; }</style>"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{style}<body>{drawn}</body>')
    seen = look(page, 1100, 5600, dark=dark)
    assert seen.faults == []
    assert (seen.background < 0.2) == dark
    assert 0.02 < seen.ink < 0.4
