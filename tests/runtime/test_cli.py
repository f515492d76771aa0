"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chunkwise import cli, library

RULES = """\
from __future__ import annotations
import chunkwise as cw
from chunkwise import Key, State, Value, outer, exp, Scalar

@cw.recurrence
def mine(S: State, q: Key, k: Key, v: Value, g: Scalar):
    S = exp(g) * S + outer(k, v)
    return S, q @ S
"""
SECOND = """
@cw.recurrence
def yours(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    return S, q @ S
"""
WRONG = """
@cw.recurrence
def wrong(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v + cw.tanh(k @ S))
    return S, q @ S
"""


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in library.names())
    assert cli.main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(library.names())
    kda = next(row for row in rows if row["name"] == "kda")
    assert "key channel" in kda["class"]
    assert "Kimi" in kda["about"]


def test_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "my_rules.py"
    file.write_text(RULES)
    for target in ("gated_delta_rule", f"{file}:mine", str(file)):
        assert cli.main(["explain", target]) == 0
        assert "step " in capsys.readouterr().out
    assert cli.main(["explain", "kda", "gla", "--json"]) == 0
    assert [x["name"] for x in json.loads(capsys.readouterr().out)] == ["kda", "gla"]


def test_prove(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prove", "simple_gla", "--chunk", "2"]) == 0
    assert "proved" in capsys.readouterr().out
    assert cli.main(["prove", "simple_gla", "--chunk", "2", "--json"]) == 0
    (proof,) = json.loads(capsys.readouterr().out)
    assert proof["name"] == "simple_gla"
    assert proof["seconds"] > 0


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_CHECK", "1")
    assert cli.main(["doctor"]) == 0
    assert "agrees with the oracle" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {"reference", "eager"} <= report["engines"].keys()
    assert report["environment"]["CHUNKWISE_CHECK"] == "1"


def test_targets_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 2 and a sentence on stderr that says what there is."""
    file = tmp_path / "two.py"
    file.write_text(RULES + SECOND)
    for target, hint in (
        ("delta", "chunkwise list"),
        (str(tmp_path / "none.py"), "no file"),
        (f"{file}:ours", "mine, yours"),
        (str(file), "which recurrence"),
    ):
        assert cli.main(["explain", target]) == 2
        captured = capsys.readouterr()
        assert hint in captured.err
        assert captured.out == ""


def test_a_mistake_in_the_users_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 1 and the user's own line on stderr."""
    file = tmp_path / "with_a_mistake.py"
    file.write_text(RULES + WRONG)
    assert cli.main(["explain", f"{file}:wrong"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("NotAffine: ")
    assert "S + outer(k, v + cw.tanh(k @ S))" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import chunkwise\nthis is no Python\n", ("SyntaxError", "2 | this is no Python")),
        ("import no_such_package\n", ("ModuleNotFoundError", "1 | import no_such_package")),
        ("x = {}\nx['rule']\n", ("KeyError: 'rule'", "2 | x['rule']")),
        ("import sys\nsys.exit(3)\n", ("SystemExit: 3", "2 | sys.exit(3)")),
        ("def half(x):\n    return 1 / 0\nhalf(1)\n", ("ZeroDivisionError", "return 1 / 0")),
    ],
)
def test_a_file_that_cannot_be_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    """The catalogue's error with the user's own line, and no traceback of ours."""
    file = tmp_path / "cannot_be_run.py"
    file.write_text(text)
    assert cli.main(["explain", f"{file}:rule"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("BadFile: cannot_be_run.py cannot be run: ")
    assert "Traceback" not in err
    for part in said:
        assert part in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("chunkwise ")


@pytest.mark.parametrize("budget", ["nan", "inf", "0", "-3", "soon"])
def test_budgets_are_seconds(capsys: pytest.CaptureFixture[str], budget: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "kda", f"--budget={budget}"])
    assert stopped.value.code == 2
    assert "seconds" in capsys.readouterr().err


def test_packages_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["export", "simple_gla", "-o", str(tmp_path / "file")]) == 2
    assert "file cannot be written: " in capsys.readouterr().err
    command = ["export", "simple_gla", "-o", str(tmp_path / "package"), "--name", "class"]
    assert cli.main(command) == 2
    assert "'class' cannot name the function" in capsys.readouterr().err


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chunkwise.cli_inspect.find", interrupt)
    assert cli.main(["explain", "kda"]) == 130
    assert capsys.readouterr().err == "chunkwise: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["tune"], ["explain"], ["prove", "kda", "--chunk", "9"]])
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: chunkwise" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([c.name] for c in cli.COMMANDS)], ids=str)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    assert f"chunkwise {' '.join(command)}" in capsys.readouterr().out
