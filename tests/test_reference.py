"""The pages on the command line and on environment variables say what the product has."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest
from chunkwise.environment import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("api", "dsl", "codegen", "runtime", "autotune", "report")


def _pages():
    path = ROOT / "docs" / "commands.py"
    spec = importlib.util.spec_from_file_location("commands", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["command-line.md", "environment.md"])
def test_pages_are_up_to_date(name: str) -> None:
    page = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert page == _pages().PAGES[name](), "make docs writes it anew"


def _read_variables(path: Path) -> set[str]:
    """The names in `os.environ.get(NAME)`, `os.environ[NAME]` and sets that it is compared with."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    top = "chunkwise" if module.startswith("api.") else f"chunkwise.{module.partition('.')[0]}"
    dotted = f"{top}.{module.partition('.')[2]}".removesuffix(".__init__")
    found: set[str] = set()
    for node in ast.walk(tree):
        argument: ast.expr | None = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "os.environ.get",
            "os.getenv",
        ):
            argument = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            argument = node.slice
        elif isinstance(node, ast.BinOp) and "os.environ.keys()" in ast.unparse(node.left):
            argument = node.right
        if isinstance(argument, ast.Constant):
            found.add(str(argument.value))
        elif isinstance(argument, ast.Name):
            value = getattr(importlib.import_module(dotted), argument.id, ())
            found |= {value} if isinstance(value, str) else set(value)
    return found


def test_every_variable_that_is_read_is_in_the_table() -> None:
    read: set[str] = set()
    for path in (p for folder in PRODUCT for p in (ROOT / folder).rglob("*.py")):
        if "environ" in path.read_text(encoding="utf-8"):
            read |= _read_variables(path)
    assert read == {v.name for v in VARIABLES}
