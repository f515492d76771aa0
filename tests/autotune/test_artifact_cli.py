"""`chunkwise verify`, and the report of `chunkwise doctor` on artifacts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chunkwise import cli
from chunkwise.autotune import store
from chunkwise.cli_command import find
from chunkwise.codegen.config import Dims, EagerConfig
from chunkwise.dsl.library import by_name
from chunkwise.runtime import eager as eager_engine
from chunkwise.runtime.call import Call
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.tuned import machine, selection
from chunkwise.runtime.tuned.artifact import Artifact, Key, Rejected
from torch import Tensor

from tests.autotune.artifacts import ARTIFACT, VERSIONS, tuned

DIMS = Dims(4, 6)
SHIPPED_FOR = "simple_gla"


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Key:
    """The key of simple_gla on this machine; artifacts lie in a folder of the test's own."""
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")
    form = by_name(SHIPPED_FOR).normal_form()
    return selection.key_here(form, EngineName.EAGER, torch.float32, DIMS, torch.device("cpu"))


def _artifact(key: Key) -> Artifact:
    entries = (tuned(4, 64, EagerConfig(16)), tuned(4, 512, EagerConfig(32)))
    return Artifact(SHIPPED_FOR, key, (*entries, tuned(64, 64, EagerConfig(16))))


def test_verify_passes_what_is_right(key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    path = store.save(_artifact(key))
    before = path.read_text()
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert f"{SHIPPED_FOR}: eager, float32, K=4 V=6" in out
    assert "ok    4 x 64, 64 x 64: worst error" in out
    assert out.count("ok ") == 2
    assert path.read_text() == before
    assert cli.main(["verify", SHIPPED_FOR, "--json"]) == 0
    (page,) = json.loads(capsys.readouterr().out)
    assert page["refused"] is None
    assert [c["serves"] for c in page["configurations"]] == [["4 x 64", "64 x 64"], ["4 x 512"]]
    assert cli.main(["verify", "kda"]) == 0
    assert "no artifact is for this machine" in capsys.readouterr().out


def test_verify_puts_what_is_wrong_into_quarantine(
    key: Key, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration that computes wrong results here serves no more; the others still serve."""
    path = store.save(_artifact(key))
    original = eager_engine.ENGINE.forward

    def miscompiled(
        call: Call, config: EagerConfig | None = None, segment: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, finals = original(call, config, segment)
        return (o * 1.01 if config == EagerConfig(32) else o), finals

    monkeypatch.setattr(eager_engine.ENGINE, "forward", miscompiled)
    assert cli.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "WRONG 4 x 512" in out
    assert "o (ordinary): relative RMS error" in out
    assert "put into quarantine" in out
    after = selection.read(path)
    assert {t.config for t in after.tuned} == {EagerConfig(16)}
    (rejected,) = after.quarantine
    assert rejected.config == EagerConfig(32)
    assert "o (ordinary)" in rejected.reason


def test_verify_refuses_what_it_cannot_check(
    key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = store.save(ARTIFACT, tmp_path / "elsewhere")
    assert cli.main(["verify", str(foreign)]) == 1
    assert "it was tuned on NVIDIA H200 (sm_90), and this machine has" in capsys.readouterr().out
    unknown = store.save(replace(_artifact(key), key=replace(key, form="0" * 12)))
    assert cli.main(["verify", str(unknown)]) == 1
    assert "--recurrence FILE.py:NAME" in capsys.readouterr().out
    assert cli.main(["verify", "nothing.json"]) == 2
    assert "no file nothing.json" in capsys.readouterr().err
    foreign.write_text("{")
    assert cli.main(["verify", str(foreign)]) == 1
    assert capsys.readouterr().err.startswith("BadArtifact: the artifact ")


def test_verify_checks_a_recurrence_of_the_user(
    key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import chunkwise as cw\n"
        "from chunkwise import Key, State, Value, outer\n"
        "@cw.recurrence\n"
        "def mine(S: State, q: Key, k: Key, v: Value):\n"
        "    S = S + 0.5 * outer(k, v)\n"
        "    return S, q @ S\n"
    )
    own = find(f"{file}:mine").declaration.normal_form().digest
    path = store.save(replace(_artifact(key), recurrence="mine", key=replace(key, form=own)))
    assert cli.main(["verify", str(path)]) == 1
    capsys.readouterr()
    assert cli.main(["verify", str(path), "--recurrence", f"{file}:mine"]) == 0
    assert "mine: eager" in capsys.readouterr().out


def test_doctor_says_what_there_is(key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    good = store.save(_artifact(key))
    wrong = Rejected(EagerConfig(64), VERSIONS, "two runs differ")
    store.save(Artifact(SHIPPED_FOR, key, quarantine=(wrong,)))
    bad = good.with_name("other.json")
    bad.write_text(good.read_text())
    asked = ["doctor", SHIPPED_FOR, "--dims", "K=4,V=6", "--dtype", "float32", "--artifacts"]
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert cli.main(asked) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^artifact +{re.escape(str(good))}$", out, re.M)
    assert f"{key}; 3 sizes tuned, 1 in quarantine" in out
    assert "REFUSED: it is for" in out
    assert "MiB" in out
    assert selection.Nearness.MACHINE.value in out
    assert "tuned under other versions" in out


def test_known_bad_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.known_bad() == ()
    (pair,) = machine.KNOWN_BAD
    installed: dict[str, str] = dict(pair.packages)
    look_up: Callable[[str], str | None] = installed.get
    monkeypatch.setattr(machine, "version", look_up)
    assert machine.known_bad() == (pair,)
    assert "tvm.ir.save_json crashes" in str(pair)
