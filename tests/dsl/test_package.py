"""What the folder may import, and that the surface types suit a type checker."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from chunkwise import dsl

FOLDER = Path(dsl.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports(path: Path) -> None:
    """No Triton, no compiler of torch, torch itself only in the oracle; no other folder.

    Arrays of symbols, and SymPy with them, are imported by the proof alone.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "dsl depends on no other folder"
            names = [node.module or ""] if node.level == 0 else []
        for name in names:
            top = name.partition(".")[0]
            assert top not in ("triton", "optuna")
            assert top != "numpy" or path.name in ("prove.py", "symbols.py")
            assert top != "torch" or path.name == "oracle.py"
            assert not name.startswith(("torch._dynamo", "torch._inductor", "torch.compiler"))


def test_not_imported_as_a_top_package() -> None:
    """A second copy of every class would make isinstance lie."""
    done = subprocess.run(
        [sys.executable, "-c", "import dsl"], cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "import chunkwise.dsl, not dsl" in done.stderr


def test_public_names_exist() -> None:
    assert all(hasattr(dsl, name) for name in dsl.__all__)
    assert sorted(dsl.__all__) == sorted(set(dsl.__all__))
