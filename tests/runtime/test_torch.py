"""The ops are good citizens of torch: opcheck, fullgraph, autograd, autocast, checkpointing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.runtime.ops import REGISTRY
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize(
    ("rule", "initial", "packed"),
    [
        ("gated_delta_rule", True, False),
        ("gated_delta_rule", False, True),
        ("retention", False, False),  # an operand per head
    ],
)
def test_opcheck(kit: Any, engine: str, rule: str, initial: bool, packed: bool) -> None:
    op = getattr(cw.library, rule)
    sizes = kit.Sizes(T=5, HV=4, K=3, V=4, initial=initial, dtype=torch.float32)
    inputs = kit.make_inputs(op, sizes.packed(2, 0, 3) if packed else sizes)
    states = inputs.initial or (None,) * len(op.declaration.states)
    args = (*inputs.operands.values(), *states, inputs.cu_seqlens, engine, None)
    torch.library.opcheck(REGISTRY.of(op.declaration).forward, args)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "gated_delta_product"])
def test_opcheck_of_steps(kit: Any, rule: str) -> None:
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(T=1, K=3, V=4, initial=True, dtype=torch.float32))
    statics = op.declaration.statics.values()
    args = (*inputs.operands.values(), *inputs.initial, None, *statics, None)
    torch.library.opcheck(REGISTRY.of(op.declaration).step, args)


def test_opcheck_of_several_states_and_parameters(kit: Any) -> None:
    op = cw.library.linear_attention_normalised
    inputs = kit.make_inputs(op, kit.Sizes(T=4, K=3, V=2, initial=True))
    args = (*inputs.operands.values(), *inputs.initial, None, 1e-6, "reference", None)
    torch.library.opcheck(REGISTRY.of(op.declaration).forward, args)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_fullgraph(kit: Any, engine: str, dynamic: bool | None) -> None:
    """No graph break, the same numbers, one compilation for every length when sizes are dynamic."""
    op = cw.library.gated_delta_rule
    compilations = []

    def backend(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return graph

    def model(x: dict[str, torch.Tensor], **options: Any) -> Any:
        o, state = op(**{n: 1.0 * t for n, t in x.items()}, output_final_state=True, **options)
        return o.square(), state

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in (7, 11, 13):
        inputs = kit.make_inputs(op, kit.Sizes(T=T, H=1, HV=2, K=3, V=5, initial=True))
        options = {"engine": engine, "initial_state": inputs.initial[0]}
        want = model(inputs.operands, **options)
        got = compiled(inputs.operands, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        leaves = list(inputs.leaves.values())
        grads = [torch.autograd.grad(x.sum() + s.sum(), leaves) for x, s in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(compilations) == (1 if dynamic else 2)


def test_fullgraph_through_aot_autograd_when_packed(kit: Any, engine: str) -> None:
    op = cw.library.simple_gla

    def loss(x: dict[str, torch.Tensor], cu_seqlens: torch.Tensor) -> torch.Tensor:
        o, _ = op(**x, cu_seqlens=cu_seqlens, engine=engine)
        return o.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = kit.make_inputs(op, kit.Sizes(K=3, V=4).packed(4, 0, 5))
    leaves = list(inputs.operands.values())
    got = torch.autograd.grad(compiled(inputs.operands, inputs.cu_seqlens), leaves)
    want = torch.autograd.grad(loss(inputs.operands, inputs.cu_seqlens), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_first_called_inside_a_compiled_function() -> None:
    """Ops are registered on first use, which may be while torch.compile is tracing."""

    @cw.recurrence
    def unseen(
        S: cw.State,
        q: cw.Key,
        k: tuple[cw.Key, ...],
        v: tuple[cw.Value, ...],
        *,
        scale: float = 0.7,
        twice: bool = False,
    ) -> tuple[cw.State, cw.Value]:
        for k_i, v_i in zip(k, v, strict=True):
            S = S + cw.outer(k_i, v_i)
        return S, (2.0 if twice else 1.0) * scale * (q @ S)

    def model(*x: torch.Tensor, **options: Any) -> torch.Tensor:
        return unseen(*x, engine="reference", **options)[0]

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 3):
        x = (torch.randn(1, 4, 1, 3), torch.randn(1, 4, n, 1, 3), torch.randn(1, 4, n, 1, 2))
        for options in ({}, {"twice": True}, {"scale": 0.25}):
            got = compiled(*x, **options)
            torch.testing.assert_close(got, model(*x, **options), rtol=0, atol=0)


def test_meta_tensors_have_shapes(kit: Any) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(HV=4, V=5, dtype=torch.bfloat16))
    x = {n: t.detach().to("meta") for n, t in inputs.operands.items()}
    o, state = op(**x, output_final_state=True)
    assert (o.shape, o.dtype, o.device.type) == ((2, 19, 4, 5), torch.bfloat16, "meta")
    assert (state.shape, state.dtype) == ((2, 4, 8, 5), torch.float32)


@pytest.mark.parametrize("engine", ["reference", "eager"])  # those that compute in float64
def test_numerical_gradients(kit: Any, engine: str) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(B=1, T=3, H=1, HV=1, K=2, V=2, initial=True))

    def both(*leaves: torch.Tensor) -> Any:
        *x, state = leaves
        return op(*x, initial_state=state, output_final_state=True, engine=engine)

    assert torch.autograd.gradcheck(both, list(inputs.leaves.values()))


def test_gradients_only_through_the_final_state(kit: Any, engine: str) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(initial=True))
    _, state = op(**inputs.operands, **inputs.options, engine=engine, output_final_state=True)
    names = ["q", *(n for n in inputs.leaves if n != "q")]
    grads = torch.autograd.grad(state.square().sum(), [inputs.leaves[n] for n in names])
    assert not grads[0].any()
    assert all(g.any() for g in grads[1:])


def test_gradients_of_some_operands(kit: Any, engine: str) -> None:
    """Operands without requires_grad get none, and the others the same as ever."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes())
    o, _ = op(**inputs.operands, engine=engine)
    (want,) = torch.autograd.grad(o.sum(), inputs.operands["k"])
    frozen = {n: x if n == "k" else x.detach() for n, x in inputs.operands.items()}
    o, _ = op(**frozen, engine=engine)
    (got,) = torch.autograd.grad(o.sum(), frozen["k"])
    assert torch.equal(got, want)


def test_double_backward_is_refused(kit: Any, engine: str) -> None:
    op = cw.library.gated_delta_rule
    x = kit.make_inputs(op, kit.Sizes(T=3)).operands
    o, _ = op(**x, engine=engine)
    (grad,) = torch.autograd.grad(o.square().sum(), x["q"], create_graph=True)
    if engine == "reference":  # tests/runtime/test_transforms.py has its numbers
        grad.sum().backward()
        return
    with pytest.raises(cw.errors.DoubleBackward, match="gated_delta_rule"):
        grad.sum().backward()


def test_autocast_leaves_dtypes_alone(kit: Any, engine: str) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(dtype=torch.float32))
    want, _ = op(**inputs.operands, engine=engine)
    with torch.autocast(kit.engine.device, dtype=torch.bfloat16):
        got, _ = op(**inputs.operands, engine=engine)
        grads = torch.autograd.grad(got.sum(), list(inputs.operands.values()))
    assert torch.equal(got, want)
    for a, b in zip(
        grads, torch.autograd.grad(want.sum(), list(inputs.operands.values())), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kit: Any, engine: str, reentrant: bool) -> None:
    op = cw.library.gated_delta_rule
    leaves = list(kit.make_inputs(op, kit.Sizes()).operands.values())

    def run(*x: torch.Tensor) -> torch.Tensor:
        return op(*x, engine=engine)[0]

    want = torch.autograd.grad(run(*leaves).sum(), leaves)
    o = checkpoint(run, *leaves, use_reentrant=reentrant)
    if reentrant:  # it only knows backward()
        o.sum().backward()
        got = [x.grad for x in leaves]
    else:
        got = torch.autograd.grad(o.sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_only_the_inputs_are_saved(kit: Any, engine: str) -> None:
    """What is saved for the backward never depends on an engine's plan."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(initial=True))
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op(**inputs.operands, **inputs.options, engine=engine)
    pointers = {x.data_ptr() for x in inputs.leaves.values()}
    assert {x.data_ptr() for x in saved} == pointers
    assert len(saved) == len(inputs.leaves)


def test_results_share_no_memory_with_the_inputs(kit: Any, engine: str) -> None:
    op = cw.library.linear_attention
    for sizes in (kit.Sizes(T=0, initial=True), kit.Sizes(initial=True).packed(0, 3)):
        inputs = kit.make_inputs(op, sizes)
        with torch.inference_mode():
            _, state = op(
                **inputs.operands, **inputs.options, engine=engine, output_final_state=True
            )
            before = inputs.initial[0].clone()
            state.add_(1.0)
            assert torch.equal(inputs.initial[0], before)


def test_two_runs_are_bit_identical(kit: Any, engine: str) -> None:
    op = cw.library.kda
    inputs = kit.make_inputs(op, kit.Sizes(initial=True, dtype=torch.float32))
    first, second = (kit.engine_results(op, inputs, engine) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_declarations_of_one_step_share_their_ops() -> None:
    def twin(
        S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value, g: cw.Scalar
    ) -> tuple[cw.State, cw.Value]:
        S = cw.exp(g) * S
        S = S + cw.outer(k, v)
        return S, q @ S

    ops = {REGISTRY.of(cw.recurrence(twin).declaration) for _ in range(2)}
    (of_twin,) = ops
    name = of_twin.forward._schema.name
    plain = REGISTRY.of(cw.library.simple_gla.declaration).forward._schema.name
    assert name.removeprefix("chunkwise::twin") == plain.removeprefix("chunkwise::simple_gla")


def test_steps_that_differ_under_static_numbers_have_ops_of_their_own() -> None:
    """Their names are of the default, where they are alike."""

    def declared(factor: float) -> cw.Recurrence:
        @cw.recurrence
        def scaled(
            S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value, *, much: bool = False
        ) -> tuple[cw.State, cw.Value]:
            S = S + cw.outer(k, v)
            return S, (factor if much else 1.0) * (q @ S)

        return scaled

    x = torch.randn(1, 3, 1, 2)
    twice, thrice = declared(2.0), declared(3.0)
    plain, _ = twice(x, x, x)
    for op, factor in ((twice, 2.0), (thrice, 3.0), (twice, 2.0)):
        torch.testing.assert_close(op(x, x, x, much=True)[0], factor * plain)
        torch.testing.assert_close(op(x, x, x)[0], plain)


def test_names_that_torch_would_not_allow() -> None:
    """Operands may be any Python identifier; schemas know ASCII and have words of their own."""

    @cw.recurrence
    def règle(
        S: cw.State, q: cw.Key, κ: cw.Key, Tensor: cw.Value, *, λ: float = 2.0
    ) -> tuple[cw.State, cw.Value]:
        S = S + cw.outer(κ, Tensor)
        return S, λ * (q @ S)

    x = torch.randn(1, 3, 1, 2)
    o, _ = règle(x, κ=x, Tensor=x, λ=1.0, engine="reference")
    want, _ = cw.library.linear_attention(x, x, x, engine="reference")
    torch.testing.assert_close(o, want)


def test_names_of_functions_that_kernels_call() -> None:
    """An operand may be called like one: its gate is not taken for a function of the engine's."""

    @cw.recurrence
    def rule(
        S: cw.State, q: cw.Key, flush: cw.Key, prefix_sum: cw.Value, exp: cw.Scalar, *, decay: float
    ) -> tuple[cw.State, cw.Value]:
        S = cw.within(decay, 0, 1) * cw.exp(exp) * S + cw.outer(flush, prefix_sum)
        return S, q @ S

    x = torch.randn(1, 3, 1, 2)
    given = (x, x, x, -torch.rand(1, 3, 1))
    want, _ = rule(*given, decay=0.5, engine="reference")
    torch.testing.assert_close(rule(*given, decay=0.5, engine="eager")[0], want)


def test_importing_is_light() -> None:
    """`import chunkwise`, declaring and calling on the CPU need none of the heavy machinery."""
    program = (
        "import sys, torch, chunkwise as cw\n"
        "x = torch.randn(1, 3, 1, 2)\n"
        "cw.library.linear_attention(x, x, x, engine='reference')\n"
        "heavy = {'triton', 'optuna', 'sympy', 'tvm', 'torch._dynamo', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rule = cw.library.simple_gla
        self.g = torch.nn.Parameter(torch.full((1, 1, 2), -0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(x, x, x, self.g.expand(*x.shape[:3]))[0]


def test_modules_that_hold_an_op_are_copied_and_pickled() -> None:
    """Pipelines deep-copy layers and data loaders pickle them; the op is found by its name."""
    layer = _Layer()
    x = torch.randn(1, 4, 2, 3)
    assert copy.deepcopy(layer).rule is cw.library.simple_gla
    assert pickle.loads(pickle.dumps(cw.library.simple_gla)) is cw.library.simple_gla
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_export() -> None:
    """torch.export keeps the op as one node, for any length."""
    layer, x = _Layer(), torch.randn(2, 6, 2, 3)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    calls = [n for n in program.graph.nodes if str(n.target).startswith("chunkwise.")]
    assert len(calls) == 1
    longer = torch.randn(2, 9, 2, 3)
    torch.testing.assert_close(program.module()(longer), layer(longer))


def test_version() -> None:
    assert cw.__version__.count(".") == 2


# torch's own, where it is asked for processes
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sharded_tensors(kit: Any, engine: str) -> None:
    """A call takes them, all or none; a step does not. On many ranks: tests/parallel."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(T=3, initial=True, dtype=torch.float32))
    x = {n: t.detach() for n, t in inputs.operands.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = {n: distribute_tensor(t.cpu(), mesh, [Replicate()]) for n, t in x.items()}
        o, _ = op(**sharded, engine=engine)
        assert torch.equal(
            o.full_tensor(), op(**{n: t.cpu() for n, t in x.items()}, engine=engine)[0]
        )
        with pytest.raises(cw.errors.BadLayout, match=r"'q' is a DTensor.*\n.*to_local"):
            op.step(**sharded, engine=engine)
        with pytest.raises(cw.errors.BadLayout, match=r"'k' is a plain tensor beside DTensors"):
            op(**{**sharded, "k": x["k"].cpu()}, engine=engine)
        with pytest.raises(cw.errors.UnknownOperand, match="'gate'"):
            op(**sharded, gate=sharded["g"], engine=engine)
        with pytest.raises(cw.errors.UnknownOperand, match="number 6"):
            op(*sharded.values(), sharded["g"], engine=engine)
        state = distribute_tensor(inputs.initial[0].detach().cpu(), mesh, [Replicate()])
        with pytest.raises(cw.errors.BadLayout, match=r"initial_state \(S\).*DTensor"):
            op(**x, initial_state=state, engine=engine)
    finally:
        dist.destroy_process_group()
