"""torch's transforms either give the right numbers or say that they cannot; none is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chunkwise as cw
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

NoTransform = cw.errors.NoTransform
# torch's own: when it imports, and of graphs that it makes
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]
Function = Callable[..., Tensor]


def _problem(
    kit: Any, engine: str, rule: str = "gated_delta_rule", **sizes: Any
) -> tuple[Function, list[Tensor]]:
    """A smooth scalar of output and final state, as a function of the leaves; and the leaves."""
    op = getattr(cw.library, rule)
    usual = {"B": 2, "T": 5, "K": 3, "V": 4, "initial": True, "dtype": torch.float32}
    inputs = kit.make_inputs(op, kit.Sizes(**{**usual, **sizes}))
    operands = len(op.declaration.operands)

    def loss(*leaves: Tensor, chosen: str = engine) -> Tensor:
        state = leaves[operands] if len(leaves) > operands else None
        o, end = op(*leaves[:operands], initial_state=state, output_final_state=True, engine=chosen)
        return o.square().sum((-1, -2, -3)) + end.square().sum((-1, -2, -3))

    leaves = [x.detach() for x in inputs.leaves.values()]
    return (lambda *x, **k: loss(*x, **k).sum()), leaves


def _alike(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def _gradients(f: Function, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    x = [t.clone().requires_grad_() for t in leaves]
    return torch.autograd.grad(f(*x), x)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "retention", "gated_delta_product"])
def test_grad_and_vjp(kit: Any, engine: str, rule: str) -> None:
    f, leaves = _problem(kit, engine, rule)
    want = _gradients(lambda *x: f(*x, chosen="reference"), leaves)
    every = tuple(range(len(leaves)))
    _alike(grad(f, argnums=every)(*leaves), want)
    value, pull = vjp(f, *leaves)
    _alike(value, f(*leaves))
    _alike(pull(torch.ones_like(value)), want)
    (only,) = grad(f, argnums=(1,))(*leaves)
    _alike(only, want[1])


# an operand per head of each item; of all items alike; micro-steps
@pytest.mark.parametrize("rule", ["gated_delta_rule", "retention", "gated_delta_product"])
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_and_its_gradients(kit: Any, engine: str, rule: str, shared: bool) -> None:
    f, leaves = _problem(kit, engine, rule)
    items = [torch.stack([x, 0.5 * x, 0.25 * x], dim=1) for x in leaves]
    dims = [1] * len(items)
    if shared:  # the last operand, per head if there is such a one, and the state
        items[-2:], dims[-2:] = leaves[-2:], [None, None]
    many = [
        [x if d is None else x.select(1, i) for x, d in zip(items, dims, strict=True)]
        for i in range(3)
    ]
    want = torch.stack([f(*x, chosen="reference") for x in many])
    _alike(vmap(f, in_dims=tuple(dims))(*items), want)
    every = tuple(range(len(leaves)))
    got = vmap(grad(f, argnums=every), in_dims=tuple(dims))(*items)
    rows = [_gradients(lambda *x: f(*x, chosen="reference"), x) for x in many]
    _alike(got, tuple(torch.stack(g) for g in zip(*rows, strict=True)))
    total = grad(lambda *x: vmap(f, in_dims=tuple(dims))(*x).sum(), argnums=0)(*items)
    _alike(total, torch.stack([g[0] for g in rows], dim=1))


def test_vmap_of_packed_sequences(kit: Any, engine: str) -> None:
    op = cw.library.simple_gla
    inputs = kit.make_inputs(op, kit.Sizes(K=3, V=4, dtype=torch.float32).packed(2, 0, 3))
    x = [t.detach() for t in inputs.operands.values()]

    def run(v: Tensor) -> Tensor:
        return op(x[0], x[1], v, x[3], cu_seqlens=inputs.cu_seqlens, engine=engine)[0]

    many = torch.stack([x[2], -x[2]])
    _alike(vmap(run)(many), torch.stack([run(v) for v in many]))


def test_jacrev(kit: Any, engine: str) -> None:
    op = cw.library.delta_rule
    sizes = kit.Sizes(B=1, T=3, H=1, HV=1, K=2, V=2, dtype=torch.float32)
    x = [t.detach() for t in kit.make_inputs(op, sizes).operands.values()]

    def run(k: Tensor, *, chosen: str = engine) -> Tensor:
        return op(x[0], k, *x[2:], engine=chosen)[0]

    want = torch.autograd.functional.jacobian(lambda k: run(k, chosen="reference"), x[1])
    _alike(jacrev(run)(x[1]), want)


def _forward_mode() -> dict[str, Callable[[Function, Tensor], Any]]:
    def dual(f: Function, x: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return {
        "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
        "jacfwd": lambda f, x: jacfwd(f)(x).sum(),
        "dual numbers": dual,
        "jvp of vmap": lambda f, x: jvp(
            lambda y: vmap(f)(y).sum(), (x[None],), (torch.ones_like(x)[None],)
        )[1],
        "vmap of jvp": lambda f, x: vmap(lambda y: jvp(f, (y,), (torch.ones_like(y),))[1])(x[None])[
            0
        ],
        "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
        "compiled": lambda f, x: torch.compile(
            lambda y: jvp(f, (y,), (torch.ones_like(y),))[1], backend="aot_eager"
        )(x),
    }


@pytest.mark.parametrize("how", _forward_mode())
def test_forward_mode(kit: Any, engine: str, how: str) -> None:
    """No engine's tangent is silently zero: the reference has the right one, kernels an error."""
    f, leaves = _problem(kit, engine, B=1, T=3)

    def of_keys(k: Tensor) -> Tensor:
        return f(leaves[0], k, *leaves[2:])

    run = _forward_mode()[how]
    torch._dynamo.reset()
    if engine == "reference":
        _alike(run(of_keys, leaves[1]), grad(of_keys)(leaves[1]).sum())
        return
    with pytest.raises(Exception, match="forward-mode") as raised:
        run(of_keys, leaves[1])
    if how == "compiled" and forward_ad._current_level >= 0:  # torch forgets to leave it
        forward_ad.exit_dual_level()
    assert how == "compiled" or raised.type is NoTransform  # the compiler quotes it


def test_a_level_without_tangents_is_no_forward_mode(kit: Any, engine: str) -> None:
    f, leaves = _problem(kit, engine)
    with forward_ad.dual_level():
        _alike(f(*leaves), f(*leaves, chosen="reference"))


def test_derivatives_of_derivatives(kit: Any, engine: str) -> None:
    f, leaves = _problem(kit, engine, B=1, T=2, K=2, V=2)

    def of_keys(k: Tensor) -> Tensor:
        return f(leaves[0], k, *leaves[2:])

    ways: dict[str, Callable[[], Any]] = {
        "grad of grad": lambda: grad(lambda k: grad(of_keys)(k).square().sum())(leaves[1]),
        "hessian": lambda: hessian(of_keys)(leaves[1]),
        "jacrev of jacrev": lambda: jacrev(jacrev(of_keys))(leaves[1]),
        "autograd": lambda: torch.autograd.functional.hessian(of_keys, leaves[1]),
    }
    if engine == "reference":
        f, leaves = _problem(kit, engine, B=1, T=2, K=2, V=2, dtype=torch.float64)
        want = torch.stack(
            [
                grad(lambda k, i=i: grad(of_keys)(k).flatten()[i])(leaves[1])
                for i in range(leaves[1].numel())
            ]
        )
        small = 1e-6 * torch.eye(leaves[1].numel(), dtype=torch.float64).to(leaves[1])
        steps = small.view(-1, *leaves[1].shape)
        pairs = [grad(of_keys)(leaves[1] + e) - grad(of_keys)(leaves[1] - e) for e in steps]
        torch.testing.assert_close(want, torch.stack(pairs) / 2e-6, rtol=1e-6, atol=1e-6)
        for way in ("jacrev of jacrev", "autograd", "hessian"):
            torch.testing.assert_close(ways[way]().view_as(want), want)
        # one operand twice, and one computed from another: each has its own gradient
        twice = [leaves[1], *leaves[1:]]
        assert torch.autograd.gradgradcheck(
            lambda k, v: f(k, 2.0 * k, v, *twice[3:]), [x.requires_grad_() for x in twice[1:3]]
        )
        return
    for run in ways.values():
        with pytest.raises((cw.errors.DoubleBackward, NoTransform)):
            run()


def test_batched_gradients_of_old_autograd(kit: Any, engine: str) -> None:
    f, leaves = _problem(kit, engine)
    x = leaves[1].requires_grad_()
    y = f(leaves[0], x, *leaves[2:])
    with pytest.raises(NoTransform, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(2), is_grads_batched=True)


class _Gate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, f: Function, leaves: list[Tensor]) -> Tensor:
        return f(leaves[0], self.scale * leaves[1], *leaves[2:])


def test_functional_call_and_checkpoint(kit: Any, engine: str) -> None:
    f, leaves = _problem(kit, engine)
    module = _Gate()
    (want,) = torch.autograd.grad(module(f, leaves), module.scale)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    got = grad(lambda p: functional_call(module, p, (f, leaves)))(parameters)
    _alike(got["scale"], want)
    loss = checkpoint(module, f, leaves, use_reentrant=False)
    _alike(torch.autograd.grad(loss, module.scale)[0], want)
    per_item = vmap(grad(lambda p, x: functional_call(module, p, (f, x))), in_dims=(None, 0))
    items = [torch.stack([x, x]) for x in leaves]
    _alike(per_item(parameters, items)["scale"], want.expand(2))


def test_compiled_gradients(kit: Any, engine: str) -> None:
    """torch.func inside torch.compile, without a graph break."""
    f, leaves = _problem(kit, engine)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: grad(f, argnums=(1, 2))(*x), fullgraph=True, backend="aot_eager"
    )
    _alike(compiled(*leaves), grad(f, argnums=(1, 2))(*leaves))
    items = [torch.stack([x, 0.5 * x]) for x in leaves]
    batched = torch.compile(vmap(grad(f)), fullgraph=True, backend="aot_eager")
    _alike(batched(*items), vmap(grad(f))(*items))


@pytest.mark.parametrize("engine", ["tvm"])
def test_steps(kit: Any, engine: str) -> None:
    """A step is torch's own under every transform, whatever the engine of steps."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(T=1, K=3, V=4, dtype=torch.float32))
    x = {n: t.detach()[:, 0] for n, t in inputs.operands.items()}

    def loss(k: Tensor) -> Tensor:
        return op.step(**{**x, "k": k})[0].square().sum()

    k = x["k"]
    want = _gradients(loss, [k])[0]
    ones = torch.ones_like(k)
    with torch.no_grad():
        _alike(grad(loss)(k), want)
        _alike(jvp(loss, (k,), (ones,))[1], want.sum())
        _alike(vmap(grad(loss))(torch.stack([k, k])), torch.stack([want, want]))
        _alike(jacrev(loss)(k), jacfwd(loss)(k))
        hessian(loss)(k)
        with forward_ad.dual_level():
            made = forward_ad.unpack_dual(loss(forward_ad.make_dual(k, ones)))
            _alike(made.tangent, want.sum())
