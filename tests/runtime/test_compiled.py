"""Calls and steps in graphs of torch.compile, and in programs that torch.export saves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import chunkwise as cw
import pytest
import torch


def _agree_compiled(run: Any, *x: torch.Tensor) -> None:
    """`run`, compiled whole, gives the same numbers and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in x]
    results = []
    for f in (run, compiled):
        o, state = f(*leaves)
        results.append([o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_gla", "chunk_retention"]
)
def test_names_of_fla_under_fullgraph(kit: Any, name: str) -> None:
    """Each variant is declared once, be it while torch.compile traces; two of them in one graph."""
    sizes = kit.Sizes(B=1, T=5, K=4, V=4, dtype=torch.float32)
    x = kit.make_inputs(cw.library.kda, sizes).operands
    q, k, v, g, beta = x.values()
    operands = {
        "chunk_gated_delta_rule": (q, k, v, g[..., 0], beta),
        "chunk_kda": (q, k, v, g, beta),
        "fused_recurrent_gla": (q, k, v, g),
        "chunk_retention": (q, k, v),
    }[name]

    def run(*x: torch.Tensor) -> Any:
        o, state = getattr(cw.fla, name)(*x, output_final_state=True)
        again, _ = cw.fla.chunk_retention(x[0], x[1], o)
        return o + again, state

    _agree_compiled(run, *operands)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "rwkv6", "gated_delta_product", "oja"])
@pytest.mark.parametrize("keep_time", [False, True])
def test_steps_under_fullgraph(kit: Any, rule: str, keep_time: bool) -> None:
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(T=1, K=4, V=6, initial=True, dtype=torch.float32))
    per_token = {o.name for o in op.declaration.operands if o.per.value == "token"}
    x = [t[:, 0] if n in per_token and not keep_time else t for n, t in inputs.operands.items()]

    def run(*leaves: torch.Tensor) -> Any:
        *x, state = leaves
        return op.step(*x, state=state)

    _agree_compiled(run, *x, inputs.options["initial_state"])


@torch.no_grad()
def test_a_compiled_step_is_a_node_and_takes_the_kernel(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own; so does a call of one token."""
    from chunkwise.runtime import reference
    from chunkwise.runtime.tvm import engine as tvm_engine

    op, graphs, steps = cw.library.delta_rule, [], []
    x = kit.make_inputs(op, kit.Sizes(T=1, K=4, V=6, dtype=torch.float32)).operands
    token = [t[:, 0] for t in x.values()]
    want, _ = op.step(*token, engine="reference")

    class Token(tvm_engine._Token):
        def run(self, values: Any) -> list[torch.Tensor]:
            steps.append(self)
            return super().run(values)

    monkeypatch.setattr(tvm_engine, "_Token", Token)
    monkeypatch.setattr(reference, "forward", None)

    def backend(graph: Any, example: Any) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: op.step(*x)[0], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*token), want, rtol=1e-5, atol=1e-6)
    (targets,) = graphs
    assert [t for t in targets if t.endswith("_step.default")]
    assert len(steps) == 1
    torch.testing.assert_close(op(**x)[0][:, 0], want, rtol=1e-5, atol=1e-6)
    assert len(steps) == 2


def test_a_compiled_step_of_many_tokens_is_refused(kit: Any) -> None:
    op = cw.library.simple_gla
    x = kit.make_inputs(op, kit.Sizes(T=9, dtype=torch.float32)).operands
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: op.step(*x)[0], backend="eager")
    with pytest.raises(cw.errors.BadShape, match="1 to 8 tokens"):
        compiled(*x.values())


_LOAD = """
import sys, torch, chunkwise as cw
program = torch.export.load(sys.argv[1])
torch.manual_seed(0)
x, token, state = torch.randn(2, 9, 2, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3, 3)
print([y.sum().item() for y in program.module()(x, token, state)])
"""


class _Decays(torch.nn.Module):
    def forward(self, x: torch.Tensor, token: torch.Tensor, state: torch.Tensor) -> Any:
        o, _ = cw.library.simple_gla(x, x, x, -x[..., 0].abs())
        named, _ = cw.library.simple_gla(x, x, x, -x[..., 0].abs(), engine="eager")
        return (
            o,
            named,
            *cw.library.delta_rule.step(token, token, token, token[..., 0], state=state),
        )


def test_saved_programs_load_in_a_fresh_process(tmp_path: Any) -> None:
    """The module that declares a recurrence registers its ops; here it is chunkwise itself."""
    layer, file = _Decays(), tmp_path / "program.pt2"
    length = torch.export.Dim("length", min=2, max=64)
    torch.manual_seed(0)
    x, token, state = torch.randn(2, 9, 2, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 3, 3)
    program = torch.export.export(
        layer,
        (x[:, :6].clone(), token, state),
        dynamic_shapes={"x": {1: length}, "token": {}, "state": {}},
    )
    torch.export.save(program, file)
    load = [sys.executable, "-W", "ignore", "-c", _LOAD, str(file)]
    loaded = subprocess.run(load, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    want = [y.sum().item() for y in layer(x, token, state)]
    got = [float(y) for y in loaded.stdout.strip("[]\n").split(",")]
    assert got == pytest.approx(want, rel=1e-4)
