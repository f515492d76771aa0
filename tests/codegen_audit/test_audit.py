"""Every class of kernels compiles for every target and fits it, and the audit's search works."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chunkwise.audit
import pytest
from chunkwise import library

pytest.importorskip("triton")

import triton
from chunkwise.audit import (
    Search,
    Subject,
    as_json,
    chunks_below,
    ladder,
    lowered_forms,
    one_per_class,
    quick_subjects,
    report,
)
from chunkwise.cli import main
from chunkwise.codegen.config import Dims, KernelConfig
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.triton.offline import Job, Outcome, compile_job
from chunkwise.codegen.triton.resources import Resources, Target, Usage

_FORM = library.gated_delta_rule.declaration.normal_form()
_SUBJECT = Subject(_FORM, Dims(64, 64), Dtype.BFLOAT16, Target.SM120, packed=False)


def _outcome(job: Job, shared: int) -> Outcome:
    return Outcome(Resources(job.kernel.name, job.target, shared, Usage(128, 0)), "", 0.0)


def test_gradients_of_numbers_per_head_compile_for_blackwell() -> None:
    """Triton 3.7 had no layout on sm_100 for sums over tokens of row sums of products."""
    form = library.mamba2.declaration.normal_form()
    backward = ("backward",)
    subject = Subject(form, Dims(128, 128), Dtype.BFLOAT16, Target.SM100, False, backward)
    outcome = compile_job(subject.job("backward_gradients", subject.default))
    assert outcome.fits, outcome.error


def test_the_first_configuration_that_fits_is_found() -> None:
    """One kernel needs too much memory until it has one stage; the others fit by default."""
    search = Search(_SUBJECT)
    while pending := list(search.pending()):
        for name, job in pending:
            greedy = name == "backward_reverse" and job.kernel.config.stages > 1
            search.learn(name, _outcome(job, 100 * 1024 if greedy else 50 * 1024))
    assert not search.failed
    default = _SUBJECT.default
    assert search.config.chunk == default.chunk
    expected = default.of("backward_reverse")
    if expected.stages > 1:
        assert search.config.of("backward_reverse") == replace(expected, stages=1)
        assert [c.split(":")[0] for c in search.changes] == ["backward_reverse"]
    assert search.config.of("forward_scan") == default.of("forward_scan")
    assert search.passed == (expected.stages == 1)
    assert "TOO MUCH AS CHOSEN" in report([search])


def test_a_shorter_chunk_when_no_tile_fits() -> None:
    search = Search(_SUBJECT)
    while pending := list(search.pending()):
        for name, job in pending:
            chunk = dict(job.kernel.constants)["C"]
            search.learn(name, _outcome(job, 90 * 1024 if chunk <= 32 else 100 * 1024))
    assert search.config.chunk == 32
    assert search.changes[0] == "chunk=32"


def test_what_never_fits_or_does_not_compile_is_reported() -> None:
    search = Search(_SUBJECT)
    while pending := list(search.pending()):
        for name, job in pending:
            search.learn(name, _outcome(job, 200 * 1024))
    assert search.failed
    assert "DOES NOT FIT" in report([search])
    search = Search(_SUBJECT)
    while pending := list(search.pending()):
        for name, job in pending:
            broken = name == "forward_scan" and job.kernel.config == _SUBJECT.default.of(name)
            search.learn(name, Outcome(None, "no", 0.0) if broken else _outcome(job, 1024))
    assert search.errors == {"forward_scan": "no"}
    assert not search.passed
    told = f"1 audited, 1 with findings (Triton {triton.__version__})"
    assert report([search]).endswith(told)
    assert as_json(search)["triton"] == triton.__version__


def test_the_ladder_descends() -> None:
    rungs = ladder(KernelConfig(64, 8, 3))
    assert rungs[0] == KernelConfig(64, 8, 3)
    assert rungs[1] == KernelConfig(64, 8, 1)
    sizes = [(r.stages, r.v_tile, r.k_tile) for r in rungs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(rungs)) == len(rungs)
    assert chunks_below(64) == (64, 32, 16)
    assert chunks_below(32) == (32, 16)


def test_equal_kernels_are_one_job() -> None:
    """The two directions begin with the same kernel under different names."""
    subject = replace(_SUBJECT, target=Target.SM90)
    config = subject.default
    names = [n for n in subject.kernels(config) if n.endswith("_prep")]
    prep = {subject.job(n, replace(config, kernels=())).key for n in names}
    others = {subject.job(n, config).key for n in subject.kernels(config)}
    assert len(prep) == 1
    assert len(others) >= 4
    assert subject.job("forward_scan", config).key != (
        replace(subject, target=Target.SM80).job("forward_scan", config).key
    )


def test_quick_mode_has_every_class_on_every_target() -> None:
    forms = {f.name for f in one_per_class(lowered_forms())}
    subjects = quick_subjects()
    assert {(s.form.name, s.target) for s in subjects} == {(n, t) for n in forms for t in Target}
    assert len(forms) >= 9


def test_every_class_compiles_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each class in both directions for one of two targets, and forward for one of the others."""
    names = sorted({s.form.name for s in quick_subjects()})
    both, forward = (Target.SM90, Target.GFX942), (Target.SM80, Target.SM100, Target.SM120)
    mine = {(n, both[i % 2]) for i, n in enumerate(names)}
    mine |= {(n, forward[i % 3]) for i, n in enumerate(names)}
    subjects = [s for s in quick_subjects() if (s.form.name, s.target) in mine]
    assert {s.target for s in subjects} == set(Target)
    monkeypatch.setattr(chunkwise.audit, "quick_subjects", lambda: subjects)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["audit", "--quick", "--jobs", "2"]) == 0, capsys.readouterr().out
    told = f"{len(subjects)} audited, 0 with findings (Triton {triton.__version__})\n"
    assert told in capsys.readouterr().out


@pytest.mark.long
def test_quick_audit(tmp_path: Path) -> None:
    """The audit runs in its own process, with a cache of its own and without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "chunkwise", "audit", "--quick", "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" audited, 0 with findings (Triton {triton.__version__})\n" in done.stdout
