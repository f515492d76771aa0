"""The command line on a terminal, in a pipe and under Ctrl-C, and the folder that `new` writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from chunkwise import cli, cli_progress
from chunkwise.cli_new import starter

COMMAND = [sys.executable, "-m", "chunkwise"]


# ---- progress ------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_progress, "FIRST_S", 0.01)
    monkeypatch.setattr(cli_progress, "EVERY_S", 0.01)
    with cli_progress.Progress("compiling", 3, "kernel") as progress:
        progress.step("the first fits")
        time.sleep(0.1)
        progress.tell("another stage")
    lines = capsys.readouterr().err.splitlines()
    assert "compiling: 0 s, 1 of 3 kernels, the first fits" in lines
    assert "compiling: another stage" in lines
    with cli_progress.Progress("tuning", seconds=60.0, quiet=True) as progress:
        progress.step()
        progress.tell("another stage")
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cli_progress.watched("abc", "reading", 3, "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


# ---- on a terminal -------------------------------------------------------------------------------


def _spawn(cache: Path, *arguments: str) -> pexpect.spawn[str]:
    environment = {**os.environ, "CHUNKWISE_CACHE": str(cache), "TERM": "xterm"}
    return pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], *arguments], env=environment, timeout=240, encoding="utf-8"
    )


def test_ctrl_c_in_a_tuning_keeps_its_result(tmp_path: Path) -> None:
    asked = ["tune", "delta_rule", "--engine", "eager", "--dims", "K=64,V=64", "--jobs", "1"]
    child = _spawn(tmp_path, *asked, "--shape", "2,1024,4", "--budget", "200")
    child.expect("tuning delta_rule")  # the bar
    child.expect("best [0-9]+ us")
    child.sendintr()
    child.expect("winner: ")
    child.expect("artifact: ")
    child.expect("chunkwise: interrupted: the result above is kept")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert list((tmp_path / "artifacts").glob("*/*.json"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees by /proc what is loaded")
def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    child = _spawn(tmp_path, "doctor")
    while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text(encoding="utf-8"):
        time.sleep(0.01)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.before or "").strip().splitlines()[-1].removeprefix("^C") == (
        "chunkwise: interrupted"
    )
    assert "Traceback" not in (child.before or "")
    assert child.exitstatus == 130


def test_ctrl_c_in_compilations(tmp_path: Path) -> None:
    """One line, and no traceback of a worker."""
    pytest.importorskip("triton")
    child = _spawn(tmp_path, "emit", "kda", "--resources", "--jobs", "2")
    child.expect("compiling")
    time.sleep(1.0)
    child.sendintr()
    child.expect("kernel +target")  # the table of what was compiled by then
    child.expect("chunkwise: interrupted\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in (child.before or "")


def test_a_reader_that_closes_the_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{COMMAND[0]}' -m chunkwise list | head -1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("linear_attention: ")
    assert done.stderr == ""


# ---- the starter ---------------------------------------------------------------------------------


def _runs(folder: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_starter_tests_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "somewhere" / "tiny"
    assert cli.main(["new", "tiny_rule", "-o", str(folder)]) == 0
    assert f"cd {folder} && python -m pytest" in capsys.readouterr().out
    assert "my_rule" not in "".join(f.read_text(encoding="utf-8") for f in folder.iterdir())
    assert cli.main(["explain", str(folder / "tiny_rule.py")]) == 0
    assert "scalar decay, rank 1" in capsys.readouterr().out
    assert "4 passed" in _runs(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.long
def test_a_starter_trains_and_is_timed(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert cli.main(["new", "tiny_rule", "-o", str(folder)]) == 0
    losses = [float(line.split()[-1]) for line in _runs(folder, "layer.py").splitlines()]
    assert losses[-1] < 0.6 * losses[0]
    assert _runs(folder, "benchmark.py").startswith("tiny_rule  B=4 T=1024 ")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("my-rule", "must be a name in Python"),
        ("class", "must be a name in Python"),
        ("layer", "is another file of the starter"),
        ("json", "would hide"),
    ],
)
def test_names_that_a_starter_cannot_have(
    name: str, why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["new", name, "-o", str(tmp_path / "new")]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_starter_overwrites_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["new", "another_rule", "-o", str(tmp_path)]) == 2
    assert "exists: nothing was written" in capsys.readouterr().err
    assert starter("tiny_rule").keys() >= {"tiny_rule.py", "test_tiny_rule.py", "README.md"}
