"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chunkwise import cli, library
from chunkwise.codegen.interface import Dtype

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
    out = capsys.readouterr().out
    assert out.startswith("healthy: chunkwise ")
    assert "right on cpu" in out
    assert "--artifacts lists all" in out
    assert ".json" not in out
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
        ("kad", "did you mean kda?"),
        ("delta", "did you mean delta_rule or delta_product or"),
        ("gated_delta_ruel", "did you mean gated_delta_rule"),
        ("softmax", "`chunkwise list` shows"),
        (str(tmp_path / "none.py"), "no file"),
        ("kda.py", "the library has kda, which needs no file"),
        (f"{tmp_path}/two:mine", "two.py:NAME?"),
        (f"{file}:ours", "did you mean yours?"),
        (f"{file}:theirs", "it declares mine, yours"),
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
        ("import chunkwise\nthis is no Python\n", ("SyntaxError", "line 2", "this is no Python")),
        ("import no_such_package\n", ("ModuleNotFoundError", "import no_such_package")),
        ("x = {}\nx['rule']\n", ("KeyError: 'rule'", "line 2", "x['rule']")),
        ("import sys\nsys.exit(3)\n", ("SystemExit: 3", "sys.exit(3)")),
        ("def half(x):\n    return 1 / 0\nhalf(1)\n", ("ZeroDivisionError", "half(1)", "1 / 0")),
        (RULES.replace("exp(g) * S", "{}['decay'] * S"), ("KeyError: 'decay'", "in mine")),
    ],
)
def test_a_file_that_cannot_be_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    """The user's own traceback, without a frame of ours."""
    file = tmp_path / "cannot_be_run.py"
    file.write_text(text)
    assert cli.main(["explain", f"{file}:rule"]) == 1
    err = capsys.readouterr().err
    assert err.endswith("\nBadFile: cannot_be_run.py cannot be run\n")
    files = re.findall(r'File "([^"]+)"', err)
    assert files
    assert set(files) == {str(file)}
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


def test_no_command_prints_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert all(f"\n    {c.name}" in said for c in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [["tune"], ["explain"], ["prove", "kda", "--chunk", "9"]])
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


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["explian", "kda"], "did you mean explain?"),
        (["emit", "kda", "--stage", "chunks"], "did you mean chunk?"),
        (["emit", "kda", "--stgae", "chunk"], "did you mean --stage?"),
        (["emit", "kda", "--dtype", "bflota16"], "there are bfloat16 (bf16), float16 (fp16)"),
        (["emit", "kda", "--dims", "K=0,V=8"], "K and V, and no others, are 1 or more"),
        (["my_rules.py:rule"], "a command comes first: chunkwise explain my_rules.py:rule"),
        (["tune", "kda", "--dtype", "int8"], "there are bfloat16 (bf16), float16 (fp16)"),
        (["audit", "--dtype", "f64"], "no dtype 'f64'"),
        (["tune", "kda", "--shape", "1,2"], "is not B,T,H, as in 4,4096,16"),
        (["export", "kda", "-o", "x", "--lyaout", "hub"], "did you mean --layout?"),
    ],
)
def test_what_was_meant(capsys: pytest.CaptureFixture[str], command: list[str], meant: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "no_folder/x.py"), "no_folder/x.py cannot be written: No such file"),
        (("-o", "."), ". cannot be written: Is a directory"),
        (("--target", "sm90"), "--target applies to --resources"),
        (("--stage", "chunk", "--kernel", "forward_scan"), "--kernel applies to the stages plan"),
        (("--micro", "2"), "--micro applies to tuple operands, and kda has none"),
    ],
)
def test_options_that_would_be_ignored(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert cli.main(["emit", "kda", *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_module_is_told_of_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    for target, meant in (("rules", "rules.py"), ("rules.mine", "rules.py:mine")):
        assert cli.main(["explain", target]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["bf16", "bfloat16", "BF16", "torch.bfloat16"])
def test_spellings_of_dtypes(text: str) -> None:
    """Every command that takes a dtype reads all of them."""
    for command in ("emit", "explain", "crossover", "doctor", "tune"):
        assert cli.parser().parse_args([command, "kda", "--dtype", text]).dtype is Dtype.BFLOAT16
    arguments = cli.parser().parse_args(["export", "kda", "-o", "x", "--dtype", f"{text},fp32"])
    assert arguments.dtype == (Dtype.BFLOAT16, Dtype.FLOAT32)
    assert cli.parser().parse_args(["audit", "--dtype", text]).dtype == [Dtype.BFLOAT16]


def test_names_of_the_library_that_audit_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "delta_rul"]) == 2
    assert "did you mean delta_rule" in capsys.readouterr().err
