"""The table of language models: a run that was stopped continues, and results are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chunkwise.nn import LanguageModel

from benchmarks import paper_table
from examples import token_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--hidden 16 --dim 8 --layers 2 --window 8 --tokens 32 --batch 2 --log-every 1 --warmup 2"
SMALL += " --validate-rows 5 --parameters 20000 --steps 4 --models deltanet-window"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of the layers."""
    folder = tmp_path_factory.mktemp("text")
    token_file.build([str(ROOT / "runtime/nn"), str(ROOT / "examples")], 300, folder)
    return folder


def row(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "deltanet-window.json").read_text())
    return found


def test_a_stopped_run_continues(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")
    monkeypatch.chdir(tmp_path)
    whole, stopped = (
        ["--text", str(text), "--out", str(tmp_path / name), *SMALL.split()]
        for name in ("whole", "stopped")
    )
    assert paper_table.main(whole) == 0
    with monkeypatch.context() as patch:
        interval = paper_table.Run.interval

        def last(run: paper_table.Run, steps: int) -> None:
            interval(run, steps)
            run.args.until = 0.0 if run.step == 3 else run.args.until

        patch.setattr(paper_table.Run, "interval", last)
        assert paper_table.main(stopped) == 0
    assert not paper_table.whole(tmp_path / "stopped/deltanet-window.json")
    assert paper_table.main(stopped) == 0
    a, b = row(tmp_path / "whole"), row(tmp_path / "stopped")
    for key in ("curve", "perplexity", "recalled", "others", "positions", "parameters"):
        assert a[key] == b[key], key
    models = [
        LanguageModel.from_pretrained(tmp_path / name / "deltanet-window/model").state_dict()
        for name in ("whole", "stopped")
    ]
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], rtol=0, atol=0)
    file = tmp_path / "language.json"
    collect = ["--out", str(tmp_path / "whole"), "--collect", str(file)]
    for _ in range(2):  # rows that are there stay
        assert paper_table.main(collect) == 0
        rows = json.loads(file.read_text())["rows"]
        assert [r["model"] for r in rows] == list(paper_table.MODELS)
        assert [r["model"] for r in rows if "perplexity" in r] == ["deltanet-window"]
        collect[1] = str(tmp_path / "empty")


@pytest.mark.parametrize("name", paper_table.MODELS)
def test_models_are_alike(name: str) -> None:
    """About as many parameters each, by the widths of the MLPs."""
    size = paper_table.Size(hidden=128, dim=32, blocks=4, window=16)
    shape = paper_table.shape_of(name, size, 512, 1_200_000)
    assert len(shape.mixers) == (8 if name == "mamba2" else 4)
    if shape.width:
        model = LanguageModel.from_config(shape)
        assert abs(sum(p.numel() for p in model.parameters()) / 1_200_000 - 1) < 0.05
    with pytest.raises(SystemExit, match="expected names of transformer"):
        paper_table.main(["--models", "other"])
