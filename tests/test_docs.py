"""The documents' blocks run and print what the pages show; links, paths and targets exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def _regenerate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regenerate", ROOT / "docs" / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


regenerate = _regenerate()
PAGES = regenerate.PAGES
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run_and_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    needs = {"transformers.md": "transformers", "export.md": "kernels"}  # of the extra hf
    if page.name in needs:
        pytest.importorskip(needs[page.name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = regenerate.regenerated(page, tmp_path)
    if pytestconfig.getoption("--update-golden"):
        page.write_text(text, encoding="utf-8")
    shown = page.read_text(encoding="utf-8")
    if sys.version_info < (3, 11):  # which knows no columns, so that most errors have no carets
        text, shown = (re.sub(r"^ +\| +\^+\n", "", t, flags=re.M) for t in (text, shown))
    assert text == shown, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []
    folders = "docs|dsl|codegen|runtime|autotune|api|tests|examples|benchmarks"
    paths = re.findall(rf"`((?:{folders})/[\w./]+)`", text)
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page: Path) -> None:
    for target in re.findall(r"`make ([\w-]+)", page.read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_the_citation_names_the_version() -> None:
    stated = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert stated
    assert f"\nversion: {stated[1]}\n" in (ROOT / "CITATION.cff").read_text()


def _page(folder: Path, text: str) -> str:
    page = folder / "page.md"
    page.write_text(text)
    inside = folder / "inside"
    inside.mkdir()
    regenerated = regenerate.regenerated(page, inside)
    assert isinstance(regenerated, str)
    return regenerated


def test_marks(tmp_path: Path) -> None:
    given = """\
<!-- file: rule.py -->
```python
answer = 42
```
```python
import rule
print(rule.answer, 0.25)
```
<!-- output -->
```text
```
```python
print("took 1.5 s")
```
<!-- output: varies -->
```text
took 22.75 s
```
<!-- raises: KeyError -->
```python
{}["key"]
```
<!-- output -->
```text
```
<!-- run as: echo few > steps -->
```sh
echo many > steps
```
```sh
cat steps
```
<!-- output -->
```text
```
<!-- not run: would take a year -->
```sh
exit 1
```
"""
    anew = _page(tmp_path, given)
    outputs = re.findall(r"<!-- output.*?-->\n```text\n(.*?)```", anew, re.S)
    assert outputs == ["42 0.25\n", "took 22.75 s\n", "KeyError: 'key'\n", "few\n"]


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfalse\n```\n",
        "```python\n1 / 0\n```\n",
        "<!-- raises: KeyError -->\n```python\n1 / 0\n```\n",
        "<!-- raises: KeyError -->\n```python\n1 / 1\n```\n",
        "<!-- no mark -->\n```python\n1 / 1\n```\n",
        "<!-- not run -->\n```python\n1 / 1\n```\n",
        "```sh\nchunkwise explain no_such_rule\n```\n",
    ],
)
def test_blocks_that_fail(text: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError, ValueError)):
        _page(tmp_path, text)
