"""`chunkwise emit`, and the sections of `explain` on the compiled recurrence."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chunkwise import cli

from tests.classes import NOT_LOWERED

RULES = """\
import chunkwise as cw
from chunkwise import Key, State, Value, outer, exp, Scalar

@cw.recurrence
def mine(S: State, q: Key, k: Key, v: Value, g: Scalar):
    S = exp(g) * S + outer(k, v)
    return S, q @ S
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    """A recurrence that the library does not have."""
    file = tmp_path / "my_rules.py"
    file.write_text(RULES)
    return f"{file}:mine"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("step", "%1 = exp g"),
        ("normal", "decay   e^g"),
        ("chunk", "S_next[k,v] = exp(Σ_i g[i])·S[k,v] + Σ_i k[i,k]·exp(H[i])·v[i,v]"),
        ("adjoint", "→ output"),
        ("plan", "forward_scan: a scan from the first chunk to the last"),
        ("eager", "def forward_scan("),
        ("triton", "def forward_scan("),
        ("gluon", "def backward_gradients("),
        ("tir", "def forward_scan"),  # with its type parameters on Python 3.12
    ],
)
def test_stages(rules: str, stage: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["emit", rules, "--stage", stage]) == 0
    printed = capsys.readouterr().out
    assert expected in printed
    if stage in ("eager", "triton", "gluon", "tir"):
        ast.parse(printed)


def test_triton_by_default_into_a_file(
    rules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels.py"
    arguments = ["emit", rules, "--dims", "K=100,V=64", "--dtype", "float16", "-o", str(file)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == ""
    source = file.read_text()
    assert "K=100 V=64, products in float16" in source
    assert cli.main(arguments) == 0
    assert file.read_text() == source  # byte-identical


def test_one_kernel(rules: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["emit", rules, "--stage", "plan", "--kernel", "backward_reverse"]) == 0
    out = capsys.readouterr().out
    assert "backward_reverse: a scan from the last chunk to the first" in out
    assert "forward" not in out
    assert cli.main(["emit", rules, "--stage", "plan", "--kernel", "none"]) == 2
    assert "there are forward_" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        *[(x, "not like K=128,V=128") for x in ("K=128", "128,128", "K=a,V=2")],
        *[(x, "K and V, and no others, are 1 or more") for x in ("K=0,V=2", "K=1,V=2,C=3")],
    ],
)
def test_bad_dims(rules: str, sizes: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["emit", rules, "--dims", sizes])
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


def test_what_is_not_lowered_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(NOT_LOWERED, encoding="utf-8")
    assert cli.main(["emit", str(rule), "--stage", "normal"]) == 0
    assert cli.main(["emit", str(rule), "--stage", "chunk"]) == 1
    assert capsys.readouterr().err.startswith(
        "NotLowered: fading_mix: states that mix carry a gate"
    )


def test_resources(rules: str, tmp_path: Path) -> None:
    """The command runs in its own process, with a cache of its own and without the interpreter."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "chunkwise", "emit", rules, "--dims", "K=16,V=16"]
    command += ["--resources", "--target", "sm90", "--jobs", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    named = ["kernel", "target", "shared", "limit", "registers", "spills"]
    assert head.split() == [*named, "wgmma", "local", "barriers", "lines"]
    kernels = [row.split() for row in rows]
    assert {k[0] for k in kernels} >= {"forward_scan", "backward_gradients"}
    for kernel in kernels:
        assert kernel[1] == "sm90"
        assert 0 <= float(kernel[2]) <= 227
        assert 16 <= int(kernel[6]) <= 255


def test_resources_of_what_is_no_target(
    rules: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["emit", rules, "--resources", "--target", "sm75"]) == 2
    assert "no target 'sm75'; there are sm80" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["emit", rules, "--resources"]) == 2


def test_explain_says_what_was_compiled(
    rules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", rules]) == 0
    out = capsys.readouterr().out
    for section in ("chunkwise form", "compulsory", "engines  reference, eager, triton, tvm"):
        assert section in out
    unlowered = tmp_path / "unlowered.py"
    unlowered.write_text(NOT_LOWERED, encoding="utf-8")
    assert cli.main(["explain", str(unlowered)]) == 0
    refusal = "engines  reference only: fading_mix: states that mix carry a gate per channel:"
    assert refusal in capsys.readouterr().out
    assert cli.main(["explain", "delta_rule", "--section", "costs"]) == 0
    assert capsys.readouterr().out.startswith("kernels by default")
    assert cli.main(["explain", "delta_rule", "--json"]) == 0
    (page,) = json.loads(capsys.readouterr().out)
    assert page.keys() == {"name", "explanation", "chunk", "costs", "engines"}


def test_importing_is_light() -> None:
    """Commands import by themselves the modules that only they need, each half a second or more."""
    heavy = ("sympy", "triton", "optuna", "tvm")
    code = f"import sys, chunkwise, chunkwise.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
