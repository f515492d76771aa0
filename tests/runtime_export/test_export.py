"""Exported packages: what they hold, that they stand alone, train, refuse, and never vary."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import chunkwise as cw
import pytest
import torch
import triton
from chunkwise import (
    HeadScalar,
    Key,
    Scalar,
    State,
    Value,
    cli,
    dot,
    exp,
    maximum,
    outer,
    softplus,
    sqrt,
    tanh,
)
from chunkwise.autotune.store import save
from chunkwise.cli_command import find
from chunkwise.codegen.config import Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.dsl import oracle
from chunkwise.dsl.declaration import Declaration
from chunkwise.runtime.engines import EngineName
from chunkwise.runtime.export.package import Layout, Request, export, write
from chunkwise.runtime.tuned.artifact import Artifact
from chunkwise.runtime.tuned.artifact import Key as ArtifactKey

from tests.autotune.artifacts import H100, tuned
from tests.classes import NOT_LOWERED
from tests.interpreted import small
from tests.offline_driver import Driver
from tests.runtime_export import training


@cw.recurrence
def leaky_writes(
    S: State, q: Key, k: Key, v: Value, a: HeadScalar, g: Scalar, *, gain: float = 0.5
):
    """Forgets at a learnt rate, writes less where `g` is low."""
    S = exp(-softplus(a)) * S + gain * outer(k, exp(g) * v)
    return S, q @ S


@cw.recurrence
def first_of_two(S: State, q: Key, k: tuple[Key, ...], v: Value):
    """Takes no notice of a tuple's second entry."""
    S = S + 0.5 * outer(k[0], v - k[0] @ S)
    return S, q @ S


@cw.recurrence
def functions_of_numbers(S: State, q: Key, k: Key, v: Value, *, rate: float = 0.5):
    """Decays, scales and adds by what is made from numbers alone."""
    S = exp(-rate) * S + rate / 3 * outer(k * tanh(sqrt(rate)), v)
    return S, (q * maximum(rate, 0.3)) @ S + tanh(0.1) * rate


@cw.recurrence
def slots(S: State, s: Key, g: Key, k: Value, q: Value):
    """Keeps keys in slots; its output has a channel for each."""
    S = exp(g) * S + outer(s, k)
    return S, S @ q


@cw.recurrence
def window(S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], b: Scalar):
    """A gradient step on several tokens at once."""
    old = S
    for k_i, v_i in zip(k, v, strict=True):
        S = S - b * outer(k_i, k_i @ old - v_i)
    return S, q @ S


@cw.recurrence
def three_outputs(S: State, q: Key, k: Key, v: Value, g: Scalar):
    """A Value, a Key and a Scalar."""
    S = exp(g) * S
    S = S + 0.5 * outer(k, v - k @ S)
    return S, (q @ S, S @ v, dot(k, q))


OPS = {
    "window": window,
    "three_outputs": three_outputs,
    "oja": cw.library.oja,
    "slots": slots,
    "gated_delta_rule": cw.library.gated_delta_rule,
    "delta_product": cw.library.delta_product,
    "mamba2": cw.library.mamba2,
    "leaky_writes": leaky_writes,
    "one_householder": cw.library.gated_delta_product,
    "first_of_two": first_of_two,
    "functions_of_numbers": functions_of_numbers,
}
TRAINED = ("gated_delta_rule", "mamba2", "leaky_writes")
TESTED = (
    "oja",
    "slots",
    "gated_delta_rule",
    "delta_product",
    "one_householder",
    "first_of_two",
    "functions_of_numbers",
    "window",
    "three_outputs",
)
SIZES = {"B": 1, "T": 7, "H": 1, "HV": 1, "K": 8, "V": 6, "1": 1, "2": 2}
DIMS = Dims(8, 6)
_MICRO = {"delta_product": 2, "first_of_two": 2, "window": 2}


def request_of(recurrence: str, **options: Any) -> Request:
    micro = _MICRO.get(recurrence, 1)
    form = OPS[recurrence].declaration.normal_form(micro)
    plain = {"dims": (DIMS,), "dtypes": (Dtype.FLOAT32,), "config": small(form)}
    return Request(recurrence, **{"name": recurrence, "micro": micro, **plain, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, side by side."""
    folder = tmp_path_factory.mktemp("exported")
    for name, op in OPS.items():
        write(folder / name, export(op.declaration, request_of(name)))
    return folder


@pytest.fixture
def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The exported gated delta rule."""
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("gated_delta_rule")


def operands(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 5, 1, 8), "k": (1, 5, 1, 8), "v": (1, 5, 2, 6), "g": (1, 5, 2)}
    made = {n: 0.3 * torch.randn(s, generator=random) for n, s in shapes.items()}
    return {n: x.to(dtype) for n, x in {**made, "g": -made["g"].abs(), "beta": made["g"]}.items()}


def test_nothing_but_torch_and_triton_is_imported(folder: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for file in folder.glob("*/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert {n.partition(".")[0] for n in names} <= allowed, file


def test_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """By the command that the header names, in another process with other hashes."""
    rules = Path(__file__).with_name("rules.py")
    arguments = ["--dims", "K=16,V=16", "--dims", "K=16,V=24", "--dtype", "bf16,fp32"]
    first = tmp_path / "first"
    assert cli.main(["export", f"{rules}:slow_decay", "-o", str(first), *arguments]) == 0
    header = ast.get_docstring(ast.parse((first / "op.py").read_text()))
    assert header is not None
    command = header.rpartition("regenerate")[2].split()
    second = tmp_path / "second"
    command[command.index("FOLDER")] = str(second)
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=rules.parent,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    assert len([f for f in files if f.startswith("kernels_")]) == 8  # half of them of segments
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert f"normal form {find(f'{rules}:slow_decay').declaration.normal_form().digest}" in header


@pytest.mark.interpreter
def test_trains_without_chunkwise(folder: Path) -> None:
    """Twenty steps and the packages' own tests, in a process that cannot import chunkwise."""
    _train_alone(folder, 1e-5, TESTED)


@pytest.mark.gpu
def test_trains_without_chunkwise_on_a_gpu(folder: Path) -> None:
    request = Request("gated_delta_rule", name="as_models_use_it")
    write(folder / "as_models_use_it", export(OPS["gated_delta_rule"].declaration, request))
    _train_alone(folder, 1e-3, (*TESTED, "as_models_use_it"))


def _train_alone(folder: Path, tolerance: float, tested: tuple[str, ...]) -> None:
    script = [
        training.__file__,
        str(folder),
        json.dumps(SIZES),
        ",".join(TRAINED),
        ",".join(TESTED),
    ]
    done = subprocess.run(
        [sys.executable, "-I", *script],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for name in TRAINED:
        losses = report[name]
        assert len(losses) == 20
        assert losses[-1] < 0.9 * losses[0], name
        eager = functools.partial(OPS[name], engine="eager")
        own = training.train(eager, axes_of(folder / name), SIZES)
        assert losses == pytest.approx(own, rel=tolerance, abs=tolerance * own[0]), name


def axes_of(package: Path) -> dict[str, str]:
    """The table of operands of a package, read without importing it."""
    for node in ast.parse((package / "op.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AXES":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("no AXES")


def test_the_reference_is_the_declared_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    for name, op in OPS.items():
        random = torch.Generator().manual_seed(0)
        given = {
            n: torch.randn([SIZES[a] for a in letters.split()], generator=random).double()
            for n, letters in axes_of(folder / name).items()
        }
        step = op.declaration.step(_MICRO.get(name, 1))
        params = {p.name: 0.25 for p in op.declaration.params}
        cu_seqlens = torch.tensor([0, 0, 3, 7])
        states = torch.randn(3, 1, 8, 6, generator=random).double()
        want, ends = oracle.run(step, given, params, [states], cu_seqlens)
        reference = importlib.import_module(f"{name}.reference")
        call = getattr(reference, name)
        got, end = call(**given, **params, initial_state=states, cu_seqlens=cu_seqlens)
        got = oracle.joined(got, step) if isinstance(got, tuple) else got
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(end, ends[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (1, 5, 8)}, ValueError, r"q has shape \[1, 5, 8\], expected \[B,T,H\|HV,K\]"),
        ({"k": (1, 4, 1, 8)}, ValueError, r"k has shape .* with T = 5, as in operand 'q'"),
        ({"k": (1, 5, 3, 8)}, ValueError, "k has 3 heads, expected 1 as .* or 2 as"),
        ({"q": torch.float16}, TypeError, "q is torch.float16, expected torch.float32"),
        ({"g": torch.float64}, TypeError, "g is torch.float64, expected float32"),
        ({"initial_state": (1, 2, 8, 8)}, ValueError, r"initial_state \(S\) has shape"),
        ({"cu_seqlens": [0, 4]}, ValueError, r"cu_seqlens is 4 at \[1\], expected T = 5"),
        ({"v": (1, 5, 2, 7)}, RuntimeError, "no kernels for K=8, V=7"),
    ],
)
def test_mistakes_are_named(
    package: ModuleType, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    call: dict[str, Any] = operands()
    for name, what in change.items():
        if isinstance(what, torch.dtype):
            call[name] = call[name].to(what)
        elif isinstance(what, list):
            call[name] = torch.tensor(what)
        else:
            call[name] = torch.zeros(what)
    with pytest.raises(error, match=message):
        package.gated_delta_rule(**call)


def test_layouts_and_places_are_named(package: ModuleType) -> None:
    x = operands()
    with pytest.raises(TypeError, match=r"q has layout torch\.sparse_coo"):
        package.gated_delta_rule(**{**x, "q": x["q"].to_sparse()})
    state = torch.zeros(1, 2, 8, 6).to_sparse()
    with pytest.raises(TypeError, match=r"initial_state \(S\) has layout torch\.sparse_coo"):
        package.gated_delta_rule(**x, initial_state=state)
    elsewhere = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="cu_seqlens is on meta, expected cpu"):
        package.gated_delta_rule(**x, cu_seqlens=elsewhere)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_are_refused(package: ModuleType) -> None:
    """No tangent is lost without a word; the package's reference has it."""
    reference = importlib.import_module("gated_delta_rule.reference")
    x = operands()

    def loss(k: torch.Tensor, run: Any = package.gated_delta_rule) -> torch.Tensor:
        return run(**{**x, "k": k})[0].square().sum()

    ones = torch.ones_like(x["k"])
    for transform in (
        lambda f: torch.func.jvp(f, (x["k"],), (ones,))[1],
        lambda f: torch.func.grad(f)(x["k"]).sum(),
        lambda f: torch.func.vmap(torch.func.grad(f))(x["k"][None]).sum(),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func.*reference\.gated_delta_rule"):
            transform(loss)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"Observed exception|cannot be called under"):
            torch.compile(transform, fullgraph=True, backend="eager")(loss)
        slow = functools.partial(loss, run=reference.gated_delta_rule)
        plain = x["k"].clone().requires_grad_()
        (want,) = torch.autograd.grad(slow(plain), plain)
        torch.testing.assert_close(transform(slow).to(want), want.sum())
    torch._dynamo.reset()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="forward-mode"),
    ):
        loss(torch.autograd.forward_ad.make_dual(x["k"], ones))


@pytest.mark.interpreter
def test_tensors_as_they_lie(package: ModuleType) -> None:
    """Boundaries in a column of a table, a turned state, negated Keys, expanded cotangents."""
    state = torch.randn(2, 2, 8, 6, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[0, 77], [2, 77], [5, 77]], dtype=torch.int32)
    plain = {**operands(), "initial_state": state}
    laid = {
        **{n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in plain.items()},
        "k": torch._neg_view(-plain["k"]),
    }
    results = []
    for given, cu_seqlens in ((plain, table[:, 0].contiguous()), (laid, table[:, 0])):
        given = {n: x.detach().requires_grad_() for n, x in given.items()}
        o, end = package.gated_delta_rule(**given, cu_seqlens=cu_seqlens, output_final_state=True)
        grads = torch.autograd.grad(o.sum() + end.sum(), list(given.values()))
        results.append([o, end, *grads])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)
    reference = importlib.import_module("gated_delta_rule.reference")
    want, _ = reference.gated_delta_rule(**plain, cu_seqlens=table[:, 0])
    torch.testing.assert_close(results[1][0].double(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calls_of_a_known_layout_launch_machine_code(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for a GPU that is not there: all kernels at the first call, none at the second."""
    support = importlib.import_module("gated_delta_rule.support")
    op = importlib.import_module("gated_delta_rule.op")
    driver = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(support._Call, "check_device", lambda call: None)
    (kernels,) = op.RECURRENCE.kernels.values()
    compiled: list[object] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **_: compiled.append(None)
        for calls in (1, 2):
            o, end = package.gated_delta_rule(**operands(), output_final_state=True)
            assert (o.shape, end.shape) == ((1, 5, 2, 6), (1, 2, 8, 6))
            assert driver.launches == calls * len(kernels.forward)
            assert len(compiled) == len(kernels.forward)


def test_without_a_gpu_the_reference_is_offered(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"need a GPU.*\n?.*reference\.gated_delta_rule"):
        package.gated_delta_rule(**operands())


@pytest.mark.interpreter
def test_torch_sees_one_op(package: ModuleType) -> None:
    """Schemas and fake tensors are right; compiled whole, gradients included; once only."""
    op = importlib.import_module("gated_delta_rule.op")
    given = {n: x.requires_grad_() for n, x in operands().items()}
    state = torch.zeros(1, 2, 8, 6, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.OPS.forward.default, (*given.values(), state, None), test_utils=tests)
    layer = package.layers.GatedDeltaRule()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        o, end = call(**given, initial_state=state, output_final_state=True)
        loss = o.square().sum() + end.square().sum()
        results.append(torch.autograd.grad(loss, [*given.values(), state], create_graph=True))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="differentiated again"):
        results[0][0].sum().backward()


@pytest.mark.interpreter
def test_no_token_passes_the_state_on(package: ModuleType) -> None:
    given = {n: x[:, :0].requires_grad_() for n, x in operands().items()}
    state = torch.randn(1, 2, 8, 6, requires_grad=True)
    o, end = package.gated_delta_rule(**given, initial_state=state, output_final_state=True)
    assert o.shape == (1, 0, 2, 6)
    torch.testing.assert_close(end, state)
    (gradient,) = torch.autograd.grad(end.sum(), state)
    assert bool((gradient == 1).all())


def test_a_tuned_configuration_and_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    declaration: Declaration = OPS["gated_delta_rule"].declaration
    form = declaration.normal_form()
    key = ArtifactKey(form.digest, EngineName.TRITON, "float32", DIMS, H100)
    save(Artifact(form.name, key, (tuned(64, 4096, small(form)),)))
    files = export(declaration, request_of("gated_delta_rule", config=None))
    (kernels,) = json.loads(files["configs.json"])["kernels"]
    assert kernels["config"]["chunk"] == small(form).chunk
    assert kernels["source"] == f"tuned on {H100} for 64 rows of 4096 tokens"
    assert kernels["certificate"]["errors"]["o"]["rms"] == 0.001
    assert "relative RMS errors up to 1.0e-03" in files["README.md"]
    files = export(declaration, request_of("gated_delta_rule", config=None, dims=(Dims(16, 6),)))
    (kernels,) = json.loads(files["configs.json"])["kernels"]
    assert kernels["source"].startswith("default for sm_90")
    assert kernels["certificate"].startswith("none")


def test_the_hub_layout(tmp_path: Path) -> None:
    """As its loader reads it: metadata beside `__init__`, loaded from anywhere, in two versions."""
    declaration = OPS["gated_delta_rule"].declaration
    spaces = []
    for name, dims in (("one", DIMS), ("two", Dims(8, 8))):
        request = request_of("gated_delta_rule", dims=(dims,), layout=Layout.HUB)
        write(tmp_path / name, export(declaration, request))
        variant = tmp_path / name / "build" / "torch-cuda"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["name"] == "gated-delta-rule"
        assert metadata["backend"] == {"type": "cuda"}
        file = variant / "__init__.py"
        spec = importlib.util.spec_from_file_location(metadata["id"], file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[metadata["id"]] = module
        spec.loader.exec_module(module)
        spaces.append(importlib.import_module(f"{metadata['id']}.op").NAMESPACE)
        layer = module.layers.GatedDeltaRule
        assert "__init__" not in vars(layer)
        members = set(dir(layer)) - set(dir(torch.nn.Module))
        assert members <= {"can_torch_compile", "has_backward"}
        sources = tmp_path / name / "torch-ext" / "gated_delta_rule"
        assert (sources / "op.py").read_bytes() == (variant / "op.py").read_bytes()
        assert 'name = "gated-delta-rule"' in (tmp_path / name / "build.toml").read_text()
    assert len(set(spaces)) == 2
    assert (
        'get_kernel("OWNER/gated-delta-rule", version=1)'
        in (tmp_path / "one" / "README.md").read_text()
    )


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "out")
    unlowered = tmp_path / "unlowered.py"
    unlowered.write_text(NOT_LOWERED, encoding="utf-8")
    assert cli.main(["export", str(unlowered), "-o", folder]) == 1
    assert "states that mix carry a gate per channel" in capsys.readouterr().err
    assert cli.main(["export", "simple_gla", "-o", folder, "--name", "op"]) == 2
    assert "'op' cannot name the function" in capsys.readouterr().err
    with pytest.raises(ValueError, match="makes no name for the hub"):
        export(
            OPS["leaky_writes"].declaration,
            request_of("leaky_writes", name="Leaky", layout=Layout.HUB),
        )

    @cw.recurrence
    def shadowing(S: State, q: Key, step: Key, v: Value):
        return S + outer(step, v), q @ S

    with pytest.raises(ValueError, match="'step' cannot name an operand"):
        export(shadowing.declaration, Request("shadowing"))

    assert not (tmp_path / "out").exists()
