"""The training script: its text, its resumption, and that many processes train as one does."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chunkwise.nn import LanguageModel

from examples import evaluate_lm, token_file, train_lm

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--layers 2 --hidden 16 --heads 2 --tokens 16 --batch 4 --steps 6 --warmup 2 --window 8"
SMALL += " --log-every 1 --validate-every 3 --validate-rows 8 --save-every 2 --generate 5"
MIXERS = "--mixers delta_rule,window"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-five modules of Python's library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[h-p]*.py"))[:25]
    folder = tmp_path_factory.mktemp("text")
    token_file.build([str(p) for p in sources], 300, folder)
    return folder


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    return ["--text", str(text), "--out", str(out), *f"{SMALL} {MIXERS}".split(), *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return LanguageModel.from_pretrained(out / "model").state_dict()


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, len(rows) + 1))
    return [float(r["loss"]) for r in rows]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHUNKWISE_ENGINE", "eager")
        assert train_lm.main(arguments(text, out)) == 0
    return out


def test_the_text_is_what_was_read(text: Path) -> None:
    tokenizer = token_file.tokenizer_of(text)
    tokens = np.fromfile(text / "valid.bin", dtype=np.uint16)
    assert tokens[0] == 0
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[h-p]*.py"))[:25]
    kept = [paths[n].read_text() for n in range(19, 25, 20)]
    documents = np.split(tokens, np.flatnonzero(tokens == 0)[1:])
    assert [tokenizer.decode(d[1:].tolist()) for d in documents] == kept


def test_rows_come_once_an_epoch_and_are_packed(text: Path) -> None:
    rows = token_file.rows_of(text, "train", 1024)
    count = len(rows)
    steps = [rows.drawn(step, 1, seed=3) for step in range(2 * count)]
    assert sorted(r for (r,) in steps[:count]) == sorted(r for (r,) in steps[count:])
    assert steps[:count] != steps[count:]
    assert [r for step in steps[:4] for r in step] == rows.drawn(0, 4, seed=3)
    batch = torch.tensor([[5, 0, 7, 8, 9], [0, 1, 2, 0, 4]])
    tokens, targets, cu_seqlens = token_file.packed(batch, 6)
    assert tokens.tolist() == [[5, 0, 7, 8, 0, 1, 2, 0]]
    assert targets.tolist() == [[0, 7, 8, 9, 1, 2, 0, 4]]
    assert cu_seqlens.tolist() == [0, 1, 4, 7, 8, 8, 8]


def test_a_run_learns_and_writes_what_it_made(
    whole: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = losses(whole)
    assert len(found) == 6
    assert found[-1] < found[0]
    assert not list(whole.glob("*.new"))
    assert train_lm.main(arguments(text, whole)) == 0  # nothing is left to train
    printed = capsys.readouterr().out
    assert "continues at step 6" in printed
    assert "loss by quarters of a row" in printed


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_lm.Trainer.train

    def dies(self: train_lm.Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        if self.step == 5:
            raise Killed
        return train(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_lm.Trainer, "train", dies)
        with pytest.raises(Killed):
            train_lm.main(arguments(text, tmp_path))
    assert len(losses(tmp_path)) == 5
    train_lm.main(arguments(text, tmp_path))  # from step 4
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    for name, w in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path)[name], w, rtol=1e-6, atol=1e-7)


_ONE = "from examples import train_lm; train_lm.main()"
# both ways in one process, which spares an import of torch; a port each
_BOTH = """
import os, sys
from examples import train_lm
*arguments, out, first, second = sys.argv[1:]
for name, port in (("ddp", first), ("fsdp", second)):
    os.environ["MASTER_PORT"] = port
    train_lm.main([*arguments, "--out", f"{out}/{name}", "--parallel", name])
"""


def _started(program: str, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_train_as_one(whole: Path, text: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 by gloo, with two micro-batches a step."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    given = arguments(text, tmp_path, "--accumulate", "2")
    processes = [
        _started(
            _BOTH,
            [*given, str(tmp_path), *ports],
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
        )
        for rank in range(2)
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    for name in ("ddp", "fsdp"):
        assert losses(tmp_path / name) == pytest.approx(losses(whole), rel=1e-5)
        for key, w in weights(whole).items():
            found = weights(tmp_path / name)[key]
            assert (found - w).norm() <= 1e-5 * w.norm(), (name, key)


@pytest.mark.long
def test_a_killed_process_loses_no_more_than_the_interval(text: Path, tmp_path: Path) -> None:
    given = arguments(text, tmp_path, "--steps", "400")
    process = _started(_ONE, given)
    while not (tmp_path / "checkpoint.pt").exists() or len(losses(tmp_path)) < 9:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = len(losses(tmp_path))
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert reached - 2 <= step <= reached
    assert train_lm.main([*given, "--steps", str(step + 3)]) == 0
    assert len(losses(tmp_path)) == step + 3


def test_a_text_is_drawn_as_a_vector(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "p.svg"
    options = ["--tokens", "16", "--rows", "4", "--out", str(picture)]
    models = [x for _ in range(2) for x in ("--model", str(whole / "model"))]
    assert evaluate_lm.main(["--text", str(text), *options, *models]) == 0
    drawn = picture.read_text(encoding="utf-8")
    assert "perplexity relative to the text's" in drawn.replace("&#x27;", "'")
    assert "perplexity" in capsys.readouterr().out
