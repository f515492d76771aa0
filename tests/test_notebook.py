"""The notebook of the tutorial runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its own assertions say that gradients agree, that a rule is learnt, that steps are calls."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    kept = [len(c.outputs) for c in notebook.cells if c.cell_type == "code"]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [c.outputs for c in notebook.cells if c.cell_type == "code"]
    assert [len(o) for o in outputs] == kept, "run it and save it with its outputs"
    kinds = {kind for o in outputs for x in o for kind in x.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
