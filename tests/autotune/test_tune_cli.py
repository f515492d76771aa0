"""The output, the files and the refusals of `chunkwise tune`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chunkwise import cli_doctor
from chunkwise.cli import main
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import from_text

SMALL = (
    *("--dims", "K=8,V=8", "--shape", "1,64,1", "--engine", "eager"),
    *("--chunk", "16,32", "--jobs", "1"),
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    for cached in (selection.find, selection._chosen):
        cached.cache_clear()


def test_tunes_prints_and_keeps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "study.svg"
    assert main(["tune", "delta_rule", *SMALL, "--budget", "60s", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "configurations of 1 parts measured" in printed
    assert "winner:" in printed
    (file,) = (tmp_path / "artifacts").glob("*/*.json")
    artifact = from_text(file.read_text(encoding="utf-8"), str(file))
    assert artifact.tuned[0].certificate.ok
    assert picture.exists()

    # the study goes on where it ended: nothing is measured anew
    assert main(["tune", "delta_rule", *SMALL, "--budget", "60", "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == str(file)
    assert document["artifact"]["tuned"][0]["study"]["trials"] == 2
    assert len(list((tmp_path / "studies").glob("*/*.journal"))) == 1


def test_a_database_is_a_storage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    assert main(["tune", "linear_attention", *SMALL, "--budget", "60", "--storage", url]) == 0
    assert main(["tune", "linear_attention", *SMALL, "--budget", "60", "--storage", url]) == 0
    assert "2 configurations of 1 parts measured (0 by this process)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune"],
        ["tune", "delta_rule", "--shape", "1,2"],
        ["tune", "delta_rule", "--shape", "0,2,3"],
        ["tune", "delta_rule", "--budget", "soon"],
        ["tune", "delta_rule", "--budget", "-1"],
        ["tune", "delta_rule", "--chunk", "48"],
        ["tune", "delta_rule", "--dtype", "int8"],
    ],
)
def test_what_is_not_understood(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_pictures_are_refused_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {"study.txt": "a picture ends in .png, .svg, .pdf", "no/x.svg": "no folder no"}
    for file, said in refusals.items():
        assert main(["tune", "delta_rule", *SMALL, "--plot", file]) == 2
        assert said in capsys.readouterr().err


def test_what_cannot_be_tuned_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "delta_rule", *SMALL[:4], "--engine", "reference"]) == 1
    assert "it has no configurations to choose from" in capsys.readouterr().err
    assert main(["tune", "no_such_rule"]) == 2


def test_the_cost_model_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "delta_rule", "--cost", "a100", "--dims", "K=64,V=64"]) == 0
    assert "waits for" in capsys.readouterr().out
    assert main(["explain", "delta_rule", "--cost", "abacus"]) == 2


def test_a_storage_that_is_not_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tune", "delta_rule", "--dims", "K=8,V=8", "--shape", "1,32,1", "--engine", "eager"]
    assert main([*asked, "--storage", "mysql+nothing://me:secret@nowhere/studies"]) == 2
    message = capsys.readouterr().err
    assert "mysql+nothing://nowhere/studies" in message
    assert "secret" not in message


@pytest.mark.parametrize("storage", [(), ("--storage", "sqlite://")])
def test_a_cache_that_cannot_be_written(
    storage: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command refuses it before it measures anything."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CHUNKWISE_CACHE", str(file))
    assert main(["tune", "delta_rule", *SMALL, "--budget", "600", *storage]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"BadCache: the cache folder {file} is not used" in printed.err
    assert f"{file} is no folder" in printed.err


def test_doctor_says_why_a_cache_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = ((b"file", "is no folder"), (b"x" * 300, "too long"), (b"\xff", "not UTF-8"))
    for name, fault in (*faults, (b"new", None)):
        path = os.fsencode(tmp_path) + b"/" + name
        if name == b"file":
            Path(os.fsdecode(path)).touch()
        monkeypatch.setenv("CHUNKWISE_CACHE", os.fsdecode(path))
        about = cli_doctor._cache()
        about["folder"].encode()
        assert about["bytes"] == 0
        assert (about["fault"] is None) if fault is None else fault in str(about["fault"])
