"""Validation passes right configurations and finds every kind of fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from chunkwise.autotune.inputs import Family, draw
from chunkwise.autotune.validation import (
    ConfiguredEngine,
    ValidationSuite,
    validate,
    validation_suite,
)
from chunkwise.codegen.config import Dims, EagerConfig
from chunkwise.codegen.tir.config import TvmConfig
from chunkwise.dsl import Key, Scalar, State, Value, errors, exp, l2norm, outer, within
from chunkwise.dsl.declaration import declaration
from chunkwise.dsl.library import all_declarations, by_name
from chunkwise.runtime.call import Call
from chunkwise.runtime.check import check_contents
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.inputs import ANY, NEGATIVE, POSITIVE, UNIT, Range, ranges
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.classes import costly, lowered
from tests.interpreted import small
from tests.random_rules import Rule, rules

CPU = torch.device("cpu")
EAGER = ConfiguredEngine(EngineName.EAGER, EagerConfig(8))
LOWERED = [d.name for d in all_declarations() if lowered(d)]


def _suite(name: str, dtype: torch.dtype = torch.float64) -> ValidationSuite:
    return validation_suite(by_name(name), Dims(8, 12), dtype, CPU, tokens=20)


@pytest.mark.parametrize("name", costly(LOWERED))
def test_the_library_passes(name: str) -> None:
    certificate = validate(_suite(name), EAGER)
    assert certificate.ok, certificate.faults
    assert certificate.inputs == ("ordinary", "hard", "ragged")
    form = by_name(name).normal_form(by_name(name).default_micro)
    states = [s.name for s in form.states]
    results = {"o", *(f"final {s}" for s in states), *(f"d initial {s}" for s in states)}
    assert {n for n, _ in certificate.errors} == results | {f"d {o.name}" for o in form.operands}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    suite = _suite("kda", dtype)
    operands = suite.cases[0].call.operands
    assert {n for n, x in operands.items() if x.dtype is dtype} >= {"q", "k", "v", "g"}
    assert operands["beta"].dtype is torch.float32
    assert validate(suite, EAGER).ok


@pytest.mark.interpreter
def test_kernels_in_the_interpreter() -> None:
    """The small configuration is printed as for a GPU; the engine's own one would be too slow."""
    declared = by_name("gated_delta_rule")
    suite = validation_suite(
        declared, Dims(16, 16), torch.float16, CPU, tokens=20, families=[Family.RAGGED]
    )
    certificate = validate(
        suite, ConfiguredEngine(EngineName.TRITON, small(declared.normal_form()))
    )
    assert certificate.ok, certificate.faults


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", costly(LOWERED))
def test_defaults_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    from chunkwise.runtime.triton import engine as triton_engine

    dims, gpu = Dims(128, 128), torch.device("cuda")
    form = by_name(name).normal_form(by_name(name).default_micro)
    config = triton_engine.configuration(form, dims, dtype, triton_engine.shared_memory(gpu))
    suite = validation_suite(by_name(name), dims, dtype, gpu)
    certificate = validate(suite, ConfiguredEngine(EngineName.TRITON, config))
    assert certificate.ok, certificate.faults


@dataclass(frozen=True)
class _Broken:
    """The eager engine, whose results are passed through `spoil`."""

    spoil: Callable[[str, Tensor, Call], Tensor]

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, finals = EAGER.forward(call)
        return self.spoil("o", o, call), tuple(self.spoil("final", x, call) for x in finals)

    def backward(
        self, call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        grads, dinitials = EAGER.backward(call, do, dfinals)
        return {n: self.spoil(f"d {n}", x, call) for n, x in grads.items()}, dinitials


def _faults(spoil: Callable[[str, Tensor, Call], Tensor]) -> str:
    certificate = validate(_suite("gated_delta_rule", torch.float32), _Broken(spoil))
    assert not certificate.ok
    return "\n".join(certificate.faults)


def test_a_wrong_entry_is_found() -> None:
    """One entry of one gradient is wrong, in packed batches only, as by a miscompiled kernel."""

    def miscompiled(name: str, x: Tensor, call: Call) -> Tensor:
        if name == "d k" and call.cu_seqlens is not None:
            x = x.clone()
            x.view(-1)[5] += 0.1
        return x

    faults = _faults(miscompiled)
    assert faults.startswith("d k (ragged): relative RMS error")
    assert "\n" not in faults


def test_runs_that_differ_are_found() -> None:
    """Two runs differ in the last bit, as with a data race."""
    turn = iter(range(1000))

    def racing(name: str, x: Tensor, call: Call) -> Tensor:
        return torch.nextafter(x, x + 1) if name == "final" and next(turn) % 2 else x

    assert set(_faults(racing).splitlines()) == {
        f"final S ({family.name.lower()}): two runs differ" for family in Family
    }


def test_what_nobody_wrote_is_found() -> None:
    """Without the fill, an unwritten buffer whose memory happens to be right would pass."""

    def unwritten(name: str, x: Tensor, call: Call) -> Tensor:
        if name != "o":
            return x
        out = torch.empty_like(x)
        out[:, 1:] = x[:, 1:]
        return out

    faults = _faults(unwritten)
    assert "o (ordinary) is not finite" in faults
    assert "o (ordinary): two runs differ" in faults


@settings(max_examples=25)
@given(rules(), st.sampled_from(Family))
def test_inputs_keep_the_promises_of_any_declaration(rule: Rule, family: Family) -> None:
    """CHUNKWISE_CHECK finds no fault: log-decays are at most 0, `within` holds, all is finite."""
    try:
        declared = rule.declare()
        micro = declared.default_micro
        form = declared.normal_form(micro)
        call = draw(declared, form, family, Dims(4, 4), torch.float64, CPU, tokens=9, micro=micro)
    except errors.ChunkwiseError:
        reject()
    check_contents(call, True)


def test_the_usual_gates_are_where_models_have_them() -> None:
    named = {}
    for d in all_declarations():
        form = d.normal_form(d.default_micro)
        params = {p.name: p.default or 1.0 for p in d.params}
        named[d.name] = dict(ranges(form, params).gates)
    assert named["gated_delta_rule"] == {"g": NEGATIVE}
    assert named["lightning_attention"] == {"slope": POSITIVE}
    assert named["hgrn2"] == {"f": UNIT}
    assert named["mamba2"] == dict.fromkeys(("dt", "A_log", "dt_bias"), ANY)
    assert named["linear_attention"] == {}


@declaration
def _bounded(S: State, q: Key, k: Key, v: Value, g: Key) -> tuple[State, Value]:
    S = exp(within(g, -5.0, -1.0)) * S + outer(k, v)
    return S, q @ S


def test_declared_bounds_are_kept() -> None:
    assert ranges(_bounded.normal_form(), {}).gates == (("g", Range(-5.0, -1.0)),)
    suite = validation_suite(_bounded, Dims(8, 8), torch.float16, CPU, tokens=20)
    for case in suite.cases:
        check_contents(case.call, True)
    assert validate(suite, EAGER).ok


@declaration
def _only_for_small_gates(S: State, q: Key, k: Key, v: Value, g: Scalar) -> tuple[State, Value]:
    S = exp(g * g - 0.01) * S + outer(k, v)
    return S, q @ S


def test_gates_without_a_legal_range_are_refused() -> None:
    with pytest.raises(errors.NotLowered, match="cannot be checked") as refused:
        validation_suite(_only_for_small_gates, Dims(4, 4), torch.float64, CPU)
    assert "no signs of g" in refused.value.why
    assert "within" in refused.value.help


@declaration
def _growing(S: State, q: Key, k: Key, v: Value) -> tuple[State, Value]:
    S = S + 0.5 * outer(l2norm(k), l2norm(k) @ S) + outer(k, v)
    return S, q @ S


def test_states_that_grow_are_refused() -> None:
    with pytest.raises(errors.NotLowered, match="cannot be checked") as refused:
        validation_suite(_growing, Dims(4, 4), torch.float64, CPU, tokens=100)
    assert "makes it grow" in refused.value.why


def test_what_is_wrong_only_for_calls_of_few_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, calls of few rows are cut along the value axis; validation runs them as well."""
    from chunkwise.runtime.tvm import engine as tvm_engine

    config = tvm_engine.configuration()
    suite = validation_suite(by_name("delta_rule"), Dims(8, 32), torch.float32, CPU, tokens=20)
    assert validate(suite, ConfiguredEngine(EngineName.TVM, config)).ok
    forward = tvm_engine.ENGINE.forward

    def spoilt(call: Call, under: TvmConfig, _: None) -> tuple[Tensor, tuple[Tensor, ...]]:
        o, finals = forward(call, under)
        return (o if under == config else 2 * o), finals

    monkeypatch.setattr(tvm_engine.ENGINE, "forward", spoilt)
    certificate = validate(suite, ConfiguredEngine(EngineName.TVM, config))
    assert {f.split(":")[0] for f in certificate.faults} == {
        f"o ({family}, in parts)" for family in certificate.inputs
    }
