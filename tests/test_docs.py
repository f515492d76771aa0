"""The Python of the documents runs, and their links and paths exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()


def _blocks() -> list[tuple[str, str]]:
    """Every ```python block of the README, which users copy."""
    text = (ROOT / "README.md").read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(f"line {text[: m.start()].count(chr(10)) + 1}", m[1]) for m in found]


@pytest.mark.parametrize(("where", "code"), _blocks(), ids=[w for w, _ in _blocks()])
def test_python_blocks_run(where: str, code: str, tmp_path: Path) -> None:
    # a file: a declaration reports its own line, and reads it from there
    path = tmp_path / "block.py"
    path.write_text(code)
    names: dict[str, object] = {"__name__": "block"}
    exec(compile(code, str(path), "exec"), names)
    assert len(names) > 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_paths_exist(path: Path) -> None:
    text = path.read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    folders = "docs|dsl|codegen|runtime|tests|examples|benchmarks"
    targets += re.findall(rf"`((?:{folders})/[\w./]+)`", text)
    missing = [t for t in targets if not any((base / t).exists() for base in (path.parent, ROOT))]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    for target in re.findall(r"`make ([\w-]+)", path.read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target
