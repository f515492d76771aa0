"""The printed blocks of docs/architecture.md are up to date (`make docs` rewrites them)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_printed_blocks_are_current(pytestconfig: pytest.Config) -> None:
    spec = importlib.util.spec_from_file_location("regenerate", ROOT / "docs" / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    if pytestconfig.getoption("--update-golden"):
        regenerate.main()
    for path in regenerate.PAGES:
        page = path.read_text(encoding="utf-8")
        assert page.count("<!-- printed:") == page.count("<!-- end -->") >= 8
        assert regenerate.regenerated(page) == page, "run `make docs`"
