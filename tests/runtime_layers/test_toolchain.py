"""Whole models in torch's toolchain: exported for any number of tokens, packaged, their FLOPs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Dims
from chunkwise.codegen.plan import Hoist
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.nn import (
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    SwiGLU,
    flop_formulas,
)
from chunkwise.runtime.ops import REGISTRY
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

LENGTHS = (2, 7, 8, 9, 33)  # around the window and past it
_LOAD = """
import sys, torch, chunkwise
kind, program, cases = sys.argv[1:]
load = torch._inductor.aoti_load_package if kind == "aoti" else torch.export.load
run = load(program) if kind == "aoti" else load(program).module()
for tokens, want in torch.load(cases):
    torch.testing.assert_close(run(tokens), want, rtol=1e-4, atol=1e-5)
"""


def hybrid() -> LanguageModel:
    """A recurrence, and a window of eight tokens."""
    torch.manual_seed(0)
    delta = RecurrentConfig("gated_delta_rule", 2, 8, 8, gated=True)
    mixers = (delta, AttentionConfig(2, 8))
    return LanguageModel.from_config(ModelConfig(50, 16, mixers, width=32)).eval()


def exported(model: LanguageModel) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=2, max=64)
    tokens = torch.randint(50, (2, 24))
    return torch.export.export(model, (tokens,), dynamic_shapes=({1: length},))


@pytest.mark.parametrize("kind", ["export", pytest.param("aoti", marks=pytest.mark.long)])
def test_hybrids_load_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    """One program for every number of tokens; the compiled package of it too."""
    model, file, cases = hybrid(), tmp_path / "model.pt2", tmp_path / "cases.pt"
    with torch.no_grad():
        program = exported(model)
        drawn = [torch.randint(50, (2, length)) for length in LENGTHS]
        torch.save([(x, model(x)) for x in drawn], cases)
        if kind == "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        else:
            torch.export.save(program, file)
    load = [sys.executable, "-W", "ignore", "-c", _LOAD, kind, str(file), str(cases)]
    loaded = subprocess.run(load, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr


def test_a_dynamic_graph_is_for_every_length(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the window's length, a graph with a symbolic number of tokens is compiled once.

    The first step says so, once.
    """
    torch._dynamo.reset()
    monkeypatch.setattr("chunkwise.runtime.call._SAID", [])
    model, graphs = hybrid(), 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for length in (20, 33, 47, 64):
        tokens = torch.randint(50, (2, length))
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert graphs == 1
    (said,) = [r.getMessage() for r in caplog.records if "compiled once" in r.getMessage()]
    assert "a graph for any" in said


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_block_keeps_for_its_backward(compiled: bool) -> None:
    """Norms and SwiGLU's product are computed again, compiled too (12 units, not 16)."""
    B, T, hidden, width = 2, 64, 64, 176
    torch.manual_seed(0)
    mixer = RecurrentConfig("linear_attention", 2, 16, 16, conv_size=0)
    block = LanguageModel.from_config(ModelConfig(32, hidden, (mixer,), width=width)).blocks[0]
    again = (
        torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
        if compiled
        else block
    )
    x = torch.randn(B, T, hidden, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(y: Tensor) -> Tensor:
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes() // 4
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        again(x)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    units = sum(n for at, n in kept.items() if at not in weights) / (B * T * hidden)
    assert units <= 13.1, units


@pytest.mark.long
def test_a_compiled_backward_repeats_no_matrix_product() -> None:
    """It has two for each of the forward, whatever it computes again."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        counts.append(sum(name.startswith("aten.mm") for name in names))
        return make_boxed_func(graph.forward)

    mixer = RecurrentConfig("linear_attention", 2, 16, 16)
    block = LanguageModel.from_config(ModelConfig(32, 64, (mixer,), width=176)).blocks[0]
    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
    )
    made = torch.compile(block, backend=backend, fullgraph=True)
    made(torch.randn(2, 64, 64, requires_grad=True)).sum().backward()
    forward, backward = counts
    assert backward == 2 * forward, counts


def test_gradients_by_torch_func() -> None:
    """Those of each sequence by itself, of a layer with an MLP behind it."""
    block, x = hybrid().get_submodule("blocks.0"), torch.randn(3, 9, 16)
    own = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (x[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x)
    for n, row in enumerate(x):
        for name, want in zip(
            own, torch.autograd.grad(loss(own, row), [*own.values()]), strict=True
        ):
            torch.testing.assert_close(got[name][n], want, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_of_lent_parameters() -> None:
    """What a backward computes again is of the parameters that the call was given."""
    model, x = hybrid(), torch.randint(50, (2, 9))
    own = {n: (p.detach() * 1.5).requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, own, (x,)).square().sum()
    got = torch.autograd.grad(loss, [*own.values()])
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(own[n])
    want = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    for name, a, b in zip(own, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_program_traced_from_source_computes_nothing_again() -> None:
    mlp, x = SwiGLU(8, 12), torch.randn(2, 8)
    program = torch.export.export(mlp, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), mlp(x))


def test_flops_of_a_recurrence() -> None:
    """Linear attention's, by hand: scores and their values within a chunk, a write and a read."""
    op, K, V = cw.library.linear_attention, 16, 32
    C = default_config(
        chunk_program(op.declaration.normal_form()), Dims(K, V), wide_dtype=True
    ).chunk
    q, k = torch.randn(2, 2, 100, 3, K)
    v = torch.randn(2, 100, 3, V, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        o, _ = op(q, k, v)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == 2 * 100 * 3 * (2 * C * (K + V) + 4 * K * V)
    assert counter.get_total_flops() > 2.5 * forward


def test_flops_of_a_forward_that_keeps_tiles() -> None:
    """They are those of the call, less the inverse and scores that its backward finds stored."""
    ops = REGISTRY.of(cw.library.delta_rule.declaration)
    C, H, K = 64, 2, 16
    q, k, v, do = torch.randn(4, 1, C, H, K)
    given, keeping = (q, k, v, torch.rand(1, C, H), None, None, "eager"), Hoist.ALL.value

    def flops(op: Callable[..., object], *args: object) -> int:
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            op(*args)
        return counter.get_total_flops()

    forward = flops(ops.forward, *given, None)
    assert flops(ops.saving, *given, None, keeping, C) == forward > 0
    *_, kept = ops.saving(*given, None, keeping, C)
    again = flops(ops.backward, do, None, *given)
    again -= flops(ops.saved_backward, do, None, *given, keeping, kept)
    # two products each time that blocks are doubled: of 16 x 16 up to 16 rows, of C x C above
    inverse, scores = 3 * 2 * 2 * 16**2 * C + 2 * 2 * 2 * C**3, 2 * C * C * K
    assert again == H * (inverse + 2 * scores)
