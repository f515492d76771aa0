"""Every class of kernels compiles for every target and fits; the audit says what does not."""

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
    Subject,
    as_json,
    fits,
    lowered_forms,
    one_per_class,
    quick_subjects,
    report,
)
from chunkwise.cli import main
from chunkwise.codegen.config import Dims
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
    outcome = compile_job(subject.jobs()["backward_gradients"])
    assert outcome.fits, outcome.error


def test_what_does_not_fit_or_compile_is_reported() -> None:
    jobs = _SUBJECT.jobs()
    found = {name: _outcome(job, 50 * 1024) for name, job in jobs.items()}
    assert fits(found)
    large = {**found, "backward_reverse": _outcome(jobs["backward_reverse"], 200 * 1024)}
    assert "DOES NOT FIT: backward_reverse\n" in report({_SUBJECT: large})
    broken = {**found, "forward_scan": Outcome(None, "no", 0.0)}
    said = report({_SUBJECT: broken})
    assert f"ERROR {_SUBJECT.label} forward_scan: no\n" in said
    assert said.endswith(f"1 audited, 1 with findings (Triton {triton.__version__})")
    assert not fits(large)
    assert not fits(broken)
    assert as_json(_SUBJECT, broken)["triton"] == triton.__version__


def test_equal_kernels_are_one_job() -> None:
    """The two directions begin with the same kernel under different names."""
    subject = replace(_SUBJECT, target=Target.SM90)
    config = subject.default
    alike = subject.jobs(replace(config, kernels=()))
    assert len({job.key for n, job in alike.items() if n.endswith("_prep")}) == 1
    jobs = subject.jobs(config)
    assert len({job.key for job in jobs.values()}) >= 4
    older = replace(subject, target=Target.SM80).jobs(config)
    assert jobs["forward_scan"].key != older["forward_scan"].key


def test_quick_mode_has_every_class_on_every_target() -> None:
    forms = {f.name for f in one_per_class(lowered_forms())}
    subjects = quick_subjects()
    assert {(s.form.name, s.target) for s in subjects} == {(n, t) for n in forms for t in Target}
    assert len(forms) >= 9


def test_every_class_compiles_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each class in both directions for one of two targets, every second forward for another."""
    names = sorted({s.form.name for s in quick_subjects()})
    both, forward = (Target.SM90, Target.GFX942), (Target.SM80, Target.SM100, Target.SM120)
    mine = {(n, both[i % 2]) for i, n in enumerate(names)}
    mine |= {(n, forward[i % 3]) for i, n in enumerate(names[::2])}
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
