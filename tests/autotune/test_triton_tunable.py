"""The Triton engine's kernels as parts: a run finds what another process has compiled."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import triton
from chunkwise.autotune.capture import TritonJob
from chunkwise.autotune.deadline import NEVER, Deadline
from chunkwise.autotune.gpu import GPUS
from chunkwise.autotune.space import points
from chunkwise.autotune.subject import Size, example
from chunkwise.autotune.triton_tunable import TritonTunable
from chunkwise.autotune.tunable import Alternative
from chunkwise.autotune.validation import ValidationSuite, validation_suite
from chunkwise.codegen.config import Config, Dims
from chunkwise.codegen.plan import Hoist
from chunkwise.dsl.library import by_name
from chunkwise.runtime.triton import engine as triton_engine

from tests.offline_driver import Driver

CPU = torch.device("cpu")
H100 = GPUS["h100"]


def tunable(name: str, dtype: torch.dtype, size: Size, *chunks: int) -> TritonTunable:
    declaration, dims = by_name(name), Dims(16, 16)
    call = example(declaration, dims, dtype, size, CPU)

    def suite(deadline: Deadline) -> ValidationSuite:
        return validation_suite(declaration, dims, dtype, CPU, tokens=48, deadline=deadline)

    return TritonTunable(call, H100, suite, chunks=chunks)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path / "chunkwise"))
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    return made


def compilations() -> list[bool]:
    """A list that notes, for each compilation from now on, whether Triton's cache had it."""
    hits: list[bool] = []

    def note(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    triton.knobs.compilation.listener = note
    return hits


def test_a_run_finds_what_was_compiled_for_it(driver: Driver) -> None:
    subject = tunable("linear_attention", torch.bfloat16, Size(1, 64, 2), 16)
    forward = next(a for a in subject.alternatives if a.kernels == ("forward_scan",))
    part = subject.part(forward.parts[0])
    point = part.first[0]
    with triton.knobs.compilation.scope():
        hits = compilations()
        (job,) = subject.jobs(part, point)
        assert hits == []  # it was found without compiling
        assert driver.launches == 0
        assert isinstance(job, TritonJob)
        built = job()
        assert hits == [False]
        subject.run(part, point)()
        assert hits == [False, True]
    assert driver.launches == 1
    assert built.error is None
    assert built.code is not None
    report = built.report
    assert report.registers is not None
    assert report.shared is not None
    assert 0 < report.shared <= H100.shared_program


def test_a_first_call_compiles_each_kernel_once_in_threads(driver: Driver) -> None:
    declaration = by_name("gated_delta_rule")
    call = example(declaration, Dims(16, 16), torch.bfloat16, Size(1, 64, 2), CPU)
    kernels = len(triton_engine._compiled_for(call).forward)
    assert kernels > 1
    threads: list[int] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **_: threads.append(threading.get_ident())
        triton_engine.ENGINE.forward(call)
        assert driver.launches == len(threads) == kernels
        assert set(threads) != {threading.get_ident()}
        triton_engine.ENGINE.forward(call)
        assert len(threads) == kernels
    assert driver.launches == 2 * kernels


def test_what_asks_for_too_much_is_an_error(driver: Driver) -> None:
    subject = tunable("simple_gla", torch.bfloat16, Size(1, 64, 2), 16)
    part = subject.part(subject.alternatives[0].parts[0])
    (job,) = subject.jobs(part, part.first[0])
    assert isinstance(job, TritonJob)
    poor = TritonJob(
        job.file, job.kernel, job.signature, job.constants, job.attributes, job.options,
        job.target, shared=16,
    )  # fmt: skip
    assert poor().error == "more shared memory than a program may use"
    broken = TritonJob(
        job.file, job.kernel, {}, job.constants, job.attributes, job.options, job.target, 0
    )
    assert broken().error is not None


def test_a_kernel_of_several_plans_is_one_part() -> None:
    subject = tunable("gated_delta_rule", torch.bfloat16, Size(1, 64, 2), 16, 32)
    parts = [key for a in subject.alternatives for key in a.parts]
    assert len(set(parts)) < len(parts) / 2
    groups = {a.group.split(",")[0] for a in subject.alternatives}
    assert groups == {"C=16", "C=32", "C=64"}  # 64: the default
    assert {(a.role, a.group) for a in subject.alternatives if a.known} == {
        ("forward", "C=64"),
        ("backward", "C=64"),
    }
    prep = {n: k for a in subject.alternatives for n, k in zip(a.kernels, a.parts, strict=True)}
    assert prep["forward_prep"].split("/")[1].startswith("forward_prep")


def test_parts_add_up_to_the_configuration_that_they_came_from() -> None:
    subject = tunable("gated_delta_rule", torch.bfloat16, Size(1, 64, 2), 64)
    default = subject.default
    chosen = {a.role: a for a in subject.alternatives if a.known}
    keys = {key for a in chosen.values() for key in a.parts}
    first = {key: subject.part(key).first[0] for key in keys}
    made = subject.configuration(chosen, first)
    assert (made.chunk, made.forward, made.backward) == (64, default.forward, default.backward)
    assert {name for name, _ in made.kernels} == {n for a in chosen.values() for n in a.kernels}


def test_what_a_forward_keeps_is_an_axis_of_whole_configurations(driver: Driver) -> None:
    """Both directions keep the same, and the parts that fill or read it run by themselves."""
    subject = tunable("delta_rule", torch.bfloat16, Size(1, 64, 2), 64)
    groups = dict.fromkeys(a.group for a in subject.alternatives)
    assert list(groups) == ["C=64", "C=64, keeping T", "C=64, keeping T, A"]
    saving = [a for a in subject.alternatives if a.group.endswith("T, A")]
    chosen = {role: next(a for a in saving if a.role == role) for role in ("forward", "backward")}
    points = {}
    for key in dict.fromkeys(key for a in chosen.values() for key in a.parts):
        part = subject.part(key)
        points[key] = tuple((axis.name, axis.choices[0]) for axis in part.axes)
        assert len(subject.jobs(part, points[key])) == 1
    assert "backward_prep" not in chosen["backward"].kernels
    config = subject.configuration(chosen, points)
    assert config.forward.saves is config.backward.saves is Hoist.SOLVES | Hoist.PRODUCTS
    assert len(subject.whole_jobs(config)) == sum(len(a.kernels) for a in chosen.values())


def test_long_calls_with_few_heads_are_tuned_in_segments(driver: Driver) -> None:
    """Scans of segments' ends have tiles and compilations of their own, like all other kernels."""
    subject = tunable("gated_delta_rule", torch.bfloat16, Size(1, 4096, 1), 64)
    known = {a.role: a for a in subject.alternatives if a.known}
    assert {"forward_scan_ends", "forward_scan_matrices"} <= set(known["forward"].kernels)
    assert {"backward_reverse_ends"} <= set(known["backward"].kernels)
    parts = [subject.part(key) for a in known.values() for key in a.parts]
    picked = {}
    for part in parts:
        picked[part.key] = part.first[0]
        assert len(subject.jobs(part, part.first[0])) == 1
        assert subject.predicted_us(part, part.first[0]) > 0
    config = subject.configuration(known, picked)
    assert config.of("forward_scan_ends") == dict(config.kernels)["forward_scan_ends"]
    assert len(subject.whole_jobs(config)) == sum(len(a.kernels) for a in known.values())
    short = tunable("gated_delta_rule", torch.bfloat16, Size(1, 512, 1), 64)
    assert not any("ends" in name for a in short.alternatives for name in a.kernels)


@pytest.mark.interpreter
def test_every_part_runs_alone_and_any_choice_is_right() -> None:
    subject = tunable("simple_gla", torch.float32, Size(1, 32, 1), 16)
    alternatives = [a for a in subject.alternatives if a.group == "C=16"]
    chosen: dict[str, Alternative] = {}
    for a in alternatives:
        chosen.setdefault(a.role, a)
    picked = {}
    for key in dict.fromkeys(key for a in alternatives for key in a.parts):
        part = subject.part(key)
        legal = [p for p in points(part.axes) if not subject.excess(part, p)]
        picked[key] = legal[-1]
        assert subject.jobs(part, legal[-1]) == ()  # nothing is compiled in the interpreter
        subject.run(part, legal[-1])()
    config = subject.configuration(chosen, picked)
    assert isinstance(config, Config)
    assert config != subject.default
    subject.whole(config)()
    assert subject.validate(config, NEVER).ok
