"""Printed Gluon: what it computes (emulated), what it takes (compiled), what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
import triton
from chunkwise import Key, State, Value, library, outer
from chunkwise.codegen.config import Config, Dims, KernelConfig, Printer
from chunkwise.codegen.gluon.defaults import preferred
from chunkwise.codegen.gluon.emit import Emitted, emit, in_gluon
from chunkwise.codegen.gluon.offline import compile_kernel
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.modules import import_file
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.triton.emit import emit as emit_triton
from chunkwise.codegen.triton.fit import H100_SHARED, untuned_config
from chunkwise.codegen.triton.offline import signature_for
from chunkwise.codegen.triton.resources import Target
from chunkwise.dsl.ir import Per
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.call import Call as RuntimeCall
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.triton import descriptors, launch_plan
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton.launch_plan import LaunchSpec
from chunkwise.runtime.tuned.json import from_plain, to_plain
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.codegen.gluon_calls import GluonCall
from tests.codegen.test_numpy_printer import Numpy
from tests.harness import Sizes, engine_results, make_inputs, results
from tests.offline_driver import Driver
from tests.tolerances import assert_agree

SCANS = ["forward_scan", "backward_states", "backward_reverse"]
GRADIENT_SCANS = [f"backward_{n}" for n in ("forward_rows", "reverse_rows", "reverse_columns")]
GRADIENTS = Plan(Hoist.NOTHING, outputs_in_scan=True, scans_apart=True)
CHUNKS = [
    "forward_prep",
    *(f"backward_{n}" for n in ("prep", "sums", "values", "gradients")),
]
SIZES = Sizes(B=2, T=192, H=1, HV=2, K=64, V=128, initial=True, dtype=torch.float32)


def _form(name: str) -> NormalForm:
    declared = getattr(library, name).declaration
    form: NormalForm = declared.normal_form(declared.default_micro)
    return form


def _emitted(
    name: str,
    dims: Dims,
    v_tile: int,
    stages: int = 2,
    backward: Plan | None = None,
    chunks: dict[str, KernelConfig] | None = None,
) -> tuple[Emitted, Config]:
    form = _form(name)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    default = replace(default, backward=backward or default.backward)
    if chunks:
        default = replace(default, chunk=64)
    config = in_gluon(
        form, default, KernelConfig(v_tile, v_tile // 16, stages), chunks=chunks or {}
    )
    made = emit(form, signature, config)
    assert made is not None
    return made, config


@pytest.mark.parametrize(
    ("name", "v_tile", "stages", "backward", "warps", "lengths"),
    [
        ("linear_attention", 64, 3, None, None, None),
        ("linear_attention", 64, 2, GRADIENTS, None, (70, 0, 64, 3)),
        ("simple_gla", 64, 2, None, None, None),
        ("retention", 128, 2, None, 8, (65, 129)),
        ("delta_rule", 128, 1, None, 4, None),
        ("gated_delta_rule", 64, 2, None, 8, (1, 130)),
        ("gated_delta_rule", 64, 2, None, 8, None),
        ("kda", 64, 2, None, 8, None),
        ("kda", 128, 3, None, None, (33, 70)),
        ("gla", 64, 2, None, 8, (1, 130)),
        ("mamba2", 64, 2, None, 8, (1, 130)),  # softplus
    ],
)
def test_it_computes_what_eager_does(
    name: str,
    v_tile: int,
    stages: int,
    backward: Plan | None,
    warps: int | None,
    lengths: tuple[int, ...] | None,
) -> None:
    """States that are given, groups of heads, several chunks, fewer slots than chunks, tails.

    `warps`: of the kernel of gradients, which is parallel over chunks and persistent.
    """
    op, sizes, form = getattr(library, name), SIZES, _form(name)
    sequences = tuple((b, 0, sizes.T) for b in range(sizes.B))
    if lengths is not None:
        sizes = sizes.packed(*lengths)
        sequences = tuple((0, sum(lengths[:n]), length) for n, length in enumerate(lengths))
    inputs = make_inputs(op, sizes)
    dims = Dims(sizes.K, sizes.V)
    chunks = {n: KernelConfig(64, warps, 3) for n in CHUNKS} if warps else None
    emitted, config = _emitted(name, dims, v_tile, stages, backward, chunks)
    assert set(dict(emitted.refused).values()) <= {"it has no products"}
    assert ("backward_gradients" in {k.name for k in emitted.kernels}) is bool(warps)
    call = GluonCall(
        forward=forward_program(form, config.forward).kernels,
        backward=backward_program(form, config.backward).kernels,
        operands=tuple(o.name for o in form.operands),
        states=tuple(s.name for s in form.states),
        given=True,
        numbers={},
        heads=frozenset(o.name for o in form.operands if o.per is Per.HEAD),
        sizes={n: getattr(sizes, n) for n in ("B", "T", "HV", "K", "V")} | {"C": config.chunk},
        sequences=sequences,
        segment=0,
        emitted=emitted,
        packed=lengths is not None,
    )
    assert inputs.initial is not None
    o, *finals = Numpy.apply(call, *inputs.operands.values(), *inputs.initial)
    got = results(o, tuple(finals), inputs)
    assert_agree(got, engine_results(op, inputs, "eager"), torch.float32)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("simple_gla", ["forward_scan"]),
        pytest.param("linear_attention", [*SCANS, *GRADIENT_SCANS], marks=pytest.mark.long),
        pytest.param("gated_delta_rule", SCANS, marks=pytest.mark.long),
    ],
)
def test_no_register_is_spilled_and_no_product_serialised(
    name: str, kernels: list[str], tmp_path: Path
) -> None:
    dims, form = Dims(128, 128), _form(name)
    emitted, config = _emitted(name, dims, 64)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    beside = emit_triton(form, signature, config)
    file = tmp_path / "kernels.py"
    file.write_text(emitted.source)
    module = import_file(f"chunkwise_test_{name}", file)
    printed = {k.name: k for k in (*beside.forward, *beside.backward)}
    for kernel in (k for k in emitted.kernels if k.name in kernels):
        buffers = beside.buffers(printed[kernel.name])
        found = compile_kernel(module, kernel, buffers, signature)
        assert found.fits
        assert found.shared - kernel.shared < 1024  # barriers, and what aligns them
        assert found.spills == 0
        assert found.usage.instructions is not None
        assert found.usage.instructions.wgmma > 0
        assert not found.usage.is_serialised


@pytest.mark.long
@pytest.mark.parametrize(("name", "spills"), [("delta_rule", 0), ("gated_delta_rule", 300)])
def test_what_kernels_of_gradients_take(name: str, spills: int, tmp_path: Path) -> None:
    """Addresses that are the same for every chunk are all that is spilled."""
    dims, form, own = Dims(128, 128), _form(name), KernelConfig(64, 8, 3)
    emitted, config = _emitted(name, dims, 64, chunks={"backward_gradients": own})
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    beside = emit_triton(form, signature, config)
    file = tmp_path / "kernels.py"
    file.write_text(emitted.source)
    module = import_file(f"chunkwise_test_gradients_{name}", file)
    (kernel,) = (k for k in emitted.kernels if k.is_persistent)
    (printed,) = (k for k in beside.backward if k.name == kernel.name)
    found = compile_kernel(module, kernel, beside.buffers(printed), signature)
    assert found.fits
    assert found.spills <= spills
    assert not found.usage.is_serialised


def test_what_kernels_of_gradients_it_refuses() -> None:
    emitted, _ = _emitted(
        "comba", Dims(128, 128), 64, chunks={"backward_gradients": KernelConfig(64, 8, 3)}
    )
    assert dict(emitted.refused)["backward_gradients"].startswith("its tiles take")


@pytest.mark.parametrize(
    ("name", "tiles", "dims", "reason"),
    [
        ("mlstm", KernelConfig(64, 4), Dims(128, 128), "it carries several states"),
        ("longhorn", KernelConfig(64, 4), Dims(128, 128), "it computes a tile of keys"),
        ("delta_rule", KernelConfig(64, 8), Dims(128, 128), "its 8 warps take 128 rows of 64"),
        ("delta_rule", KernelConfig(64, 4), Dims(128, 72), "K or V is padded to its tiles"),
        ("delta_rule", KernelConfig(32, 4), Dims(128, 128), "its states' tiles are 128 x 32"),
    ],
)
def test_what_it_refuses(name: str, tiles: KernelConfig, dims: Dims, reason: str) -> None:
    assert _refused(name, tiles, dims).startswith(reason)


def test_it_refuses_chunks_of_16() -> None:
    tiles, dims = KernelConfig(64, 4), Dims(128, 128)
    assert _refused("kda", tiles, dims, chunk=16).startswith("its chunks have 16 tokens")


def _refused(name: str, tiles: KernelConfig, dims: Dims, chunk: int | None = None) -> str:
    """Why the forward scan is not printed."""
    form = _form(name)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    made = emit(
        form, signature, in_gluon(form, replace(default, chunk=chunk or default.chunk), tiles)
    )
    assert made is not None
    return dict(made.refused)["forward_scan"]


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "v_tile"),
    [
        ("gated_delta_rule", 64, 4096, 64),
        ("gated_delta_rule", 96, 8192, 128),
        ("gated_delta_rule", 64, 2048, None),  # shorter than what was measured
        ("simple_gla", 64, 4096, 0),  # nothing to gain but for gradients
        ("simple_gla", 96, 8192, 128),
        ("comba", 96, 8192, None),  # of a class that was not measured
    ],
)
def test_what_is_preferred(name: str, rows: int, tokens: int, v_tile: int | None) -> None:
    form, dims = _form(name), Dims(128, 128)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    made = preferred(form, default, signature, rows, tokens, 132)
    if v_tile is None:
        assert made is None
        return
    assert made is not None
    scan, gradients = made.of("forward_scan"), made.of("backward_gradients")
    assert gradients.printer is Printer.GLUON
    assert (scan.printer is Printer.GLUON) is bool(v_tile)
    assert v_tile in (0, scan.v_tile)
    assert made.of("forward_prep") == default.of("forward_prep")


def _preferred(name: str, gates: Dtype) -> tuple[Config, Config | None]:
    """The default at K = V = 128 under vector gates of a dtype, and what a Hopper GPU prefers."""
    form, dims = _form(name), Dims(128, 128)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    signature = replace(signature, dtypes=(("g", gates),))
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    return default, preferred(form, default, signature, 64, 4096, 132)


@pytest.mark.parametrize("gates", [Dtype.BFLOAT16, Dtype.FLOAT32])
def test_where_a_system_is_solved_under_a_vector_gate_scans_alone_are(gates: Dtype) -> None:
    default, made = _preferred("kda", gates)
    assert made is not None
    names = {n for n, k in made.kernels if k.printer is Printer.GLUON}
    assert (made.chunk, names) == (default.chunk, {*SCANS})


@pytest.mark.parametrize("gates", [Dtype.BFLOAT16, Dtype.FLOAT32])
def test_vector_gates_have_all_kernels_or_none(gates: Dtype) -> None:
    """Triton's kernels are slower in the chunks of Gluon's."""
    _, made = _preferred("gla", gates)
    assert (made is None) is (gates is Dtype.FLOAT32)
    if made is not None:
        assert made.chunk == 64
        assert all(k.printer is Printer.GLUON for _, k in made.kernels)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Has the Triton engine take the CPU for a Hopper GPU and launch nothing; whose turn it was."""
    found: list[str] = []

    def noted(spec: LaunchSpec, tensors: Any, *, aligned: bool) -> None:
        described = any(isinstance(x, TensorDescriptor) for x in spec.arguments(tensors))
        found.append(spec.loaded.kernel.name + " in Gluon" * described)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton_engine, "_no_device", lambda device: None)
    monkeypatch.setattr(triton_engine, "is_hopper", lambda device: True)
    monkeypatch.setattr(descriptors, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch_plan, "_compile", lambda *_: None)
    monkeypatch.setattr(LaunchSpec, "run", noted)
    Records.forget()
    yield found
    Records.forget()


def _in_gluon(call: RuntimeCall) -> Any:
    """Every scan of a call in Gluon where it can be."""
    dims = Dims(call.K, call.V)
    default = triton_engine.configuration(call.form, dims, call.dtype)
    config = in_gluon(call.form, default, KernelConfig(64, 4, 2))
    dtypes = tuple((n, x.dtype) for n, x in call.operands.items())
    return triton_engine.compile_with(call.form, dims, call.dtype, dtypes, config)


@pytest.mark.parametrize("T", [256, 200])
@torch.no_grad()
def test_launches(T: int, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls launch it, with tails or without; where addresses are odd, what Triton compiles."""

    monkeypatch.setattr(triton_engine, "_compiled_for", _in_gluon)
    room = torch.zeros(4, 1, T, 1, 128, dtype=torch.bfloat16)
    odd = torch.zeros(T * 128 + 1, dtype=torch.bfloat16)[1:].view(1, T, 1, 128)
    library.linear_attention(*room[:3], engine="triton")
    library.linear_attention(*room[:2], odd, engine="triton")
    assert launched == ["forward_scan in Gluon", "forward_scan"]


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_of_shared_heads_are_gluon_s_too(
    heads: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in float32, since several value heads add to them, and stored through pointers."""
    monkeypatch.setattr(triton_engine, "_compiled_for", _in_gluon)
    q, k = torch.zeros(2, 1, 128, heads, 64, dtype=torch.bfloat16, requires_grad=True)
    v = torch.zeros(1, 128, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    o, _ = library.linear_attention(q, k, v, engine="triton")
    launched.clear()
    torch.autograd.grad(o.sum(), (q, k, v))
    assert len(launched) == 3  # a scan for each gradient
    assert all(name.endswith(" in Gluon") for name in launched)


def test_what_is_stored_wide_is_not_written_by_tma() -> None:
    form, dims = _form("linear_attention"), Dims(64, 64)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    mixed = replace(signature, dtypes=(("v", Dtype.FLOAT32),))
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    made = emit(form, mixed, in_gluon(form, default, KernelConfig(64, 4, 2)))
    assert made is not None
    assert dict(made.refused)["backward_reverse_columns"] == "it stores d_v in float32"


@cw.recurrence
def named(S: State, q: Key, k: Key, v: Value, k_row: Key):
    S = S + outer(k, v) + outer(k_row, v)
    return S, q @ S


def test_operands_may_be_named_like_what_kernels_compute(tmp_path: Path) -> None:
    form, dims = named.declaration.normal_form(), Dims(128, 128)
    signature = signature_for(form, dims, Dtype.BFLOAT16, Target.SM90)
    default = untuned_config(form, dims, Dtype.BFLOAT16, H100_SHARED)
    made = emit(form, signature, in_gluon(form, default, KernelConfig(64, 4, 2)))
    assert made is not None
    file = tmp_path / "kernels.py"
    file.write_text(made.source)
    beside = emit_triton(form, signature, default)
    scan = next(k for k in beside.forward if k.name == "forward_scan")
    kernel = next(k for k in made.kernels if k.name == scan.name)
    module = import_file("chunkwise_test_named", file)
    assert compile_kernel(module, kernel, beside.buffers(scan), signature).fits


@torch.no_grad()
def test_a_call_gets_what_is_preferred(launched: list[str]) -> None:
    q, k, v = (torch.empty(4, 4096, 16, 128, dtype=torch.bfloat16) for _ in range(3))
    beta = torch.empty(4, 4096, 16)
    library.delta_rule(q, k, v, beta, engine="triton")
    library.delta_rule(*(x[:, :4032] for x in (q, k, v, beta)), engine="triton")  # too short
    assert launched[:2] == ["forward_prep", "forward_scan in Gluon"]
    assert launched[2:] == ["forward_prep", "forward_scan"]


@pytest.mark.parametrize(
    ("tokens", "heads", "gates", "served"),
    [
        (4096, 16, torch.bfloat16, True),
        (4128, 16, torch.bfloat16, False),  # whole chunks of 32, but not of 64
        (4096, 8, torch.bfloat16, False),  # gradients of shared heads are in float32
        (4096, 16, torch.float32, False),
    ],
)
@torch.no_grad()
def test_vector_gates_get_longer_chunks(
    tokens: int, heads: int, gates: torch.dtype, served: bool, launched: list[str]
) -> None:
    q, k = (torch.empty(4, tokens, heads, 128, dtype=torch.bfloat16) for _ in range(2))
    v, g = (torch.empty(4, tokens, 16, 128, dtype=d) for d in (torch.bfloat16, gates))
    library.gla(q, k, v, g, engine="triton")
    assert launched == [n + " in Gluon" * served for n in ("forward_prep", "forward_scan")]


@pytest.mark.parametrize("heads", [16, 4])
def test_what_a_forward_keeps(heads: int, launched: list[str]) -> None:
    """T: its backward has no prep. Gradients of shared heads are Triton's where nobody chose."""
    q, k = torch.empty(2, 4, 4096, heads, 128, dtype=torch.bfloat16, requires_grad=True)
    v = torch.empty(4, 4096, 16, 128, dtype=torch.bfloat16)
    o, _ = library.delta_rule(q, k, v, torch.empty(4, 4096, 16), engine="triton")
    launched.clear()
    torch.autograd.grad(o, (q, k), torch.empty_like(o))
    scans = [f"backward_{n} in Gluon" for n in ("states", "reverse")]
    assert launched == [*scans, "backward_gradients" + " in Gluon" * (heads == 16)]


def test_a_configuration_says_so_in_json() -> None:
    own = KernelConfig(64, 4, 3, printer=Printer.GLUON)
    assert from_plain(KernelConfig, to_plain(own)) == own
    older = {"v_tile": 64, "warps": 4, "stages": 3, "k_tile": 256}
    assert from_plain(KernelConfig, older).printer is None  # type: ignore[arg-type]
