"""Steps on pools of states are the steps on the states themselves, read and written in place."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, State, Value, outer
from chunkwise.dsl.ir import Per

KERNELS = [
    pytest.param("tvm", "cpu", id="tvm"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
Tensors = dict[str, torch.Tensor]


def _inputs(kit: Any, op: cw.Recurrence, **sizes: Any) -> Tensors:
    made = kit.make_inputs(op, kit.Sizes(**{"HV": 4, "dtype": torch.float32, **sizes}))
    return {n: x.detach() for n, x in made.operands.items()}


def _token(op: cw.Recurrence, operands: Tensors, t: int) -> Tensors:
    tokens = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    return {n: x[:, t] if n in tokens else x for n, x in operands.items()}


def _pools(op: cw.Recurrence, slots: int, K: int, V: int, **options: Any) -> tuple[Any, ...]:
    """Of every state, with gaps between slots and heads."""
    made = []
    for n, state in enumerate(op.declaration.states):
        channels = {"K": (K,), "V": (V,), "KV": (K, V)}["".join(state.kind.axes)]
        torch.manual_seed(n)
        room = torch.randn(2 * slots, 5, *channels).abs().to(**options)
        made.append(room[::2, :4])
    return tuple(made)


def _given(states: tuple[Any, ...]) -> Any:
    return states[0] if len(states) == 1 else states


@pytest.mark.parametrize(("engine", "device"), KERNELS)
@pytest.mark.parametrize(
    "rule", ["gated_delta_rule", "mlstm", "gated_delta_product", "rwkv6", "oja"]
)
@torch.no_grad()
def test_a_step_in_a_pool(kit: Any, rule: str, engine: str, device: str) -> None:
    """States in half precision too; a negative index is a sequence without a state."""
    op = getattr(cw.library, rule)
    indices = torch.tensor([5, -1, 0], device=device)
    for (K, V), dtype in (((16, 8), torch.float32), ((5, 3), torch.float16)):
        operands = _inputs(kit, op, B=3, T=1, K=K, V=V, device=device)
        pools = _pools(op, 6, K, V, device=device, dtype=dtype)
        before = [x.clone() for x in pools]
        states = tuple(x[indices.clamp(0)].float() for x in pools)
        for x in states:
            x[1] = 0
        token = _token(op, operands, 0)
        want, new = op.step(**token, state=_given(states), engine="reference")
        o, same = op.step(**token, state=_given(pools), state_indices=indices, engine=engine)
        each = same if isinstance(same, tuple) else (same,)
        assert all(x is y for x, y in zip(each, pools, strict=True))
        torch.testing.assert_close(o[::2], want[::2], rtol=1e-4, atol=1e-5)
        assert bool(o[1].isfinite().all())
        for x, old, made in zip(pools, before, new if len(pools) > 1 else (new,), strict=True):
            rounding = 1e-5 if dtype is torch.float32 else 2e-3
            torch.testing.assert_close(x[5].float(), made[0], rtol=rounding, atol=1e-5)
            torch.testing.assert_close(x[0].float(), made[2], rtol=rounding, atol=1e-5)
            assert torch.equal(x[1:5], old[1:5])


@pytest.mark.parametrize(("engine", "device"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["gated_delta_rule", "linear_attention_normalised"])
@torch.no_grad()
def test_drafts_are_single_steps(
    kit: Any, rule: str, dtype: torch.dtype, engine: str, device: str
) -> None:
    """Bit for bit: each token rounds the state as the pool does, and the kernel is the same."""
    if engine == "triton" and device == "cpu" and dtype is torch.bfloat16:
        dtype = torch.float32  # the interpreter stores bfloat16 by truncation
    op = getattr(cw.library, rule)
    operands = _inputs(kit, op, B=2, T=3, K=8, V=16, device=device)
    pools = _pools(op, 8, 8, 16, device=device, dtype=dtype)
    alone = tuple(x.clone() for x in pools)
    slots = torch.tensor([[1, 2, 3], [6, 5, 4]], dtype=torch.int32, device=device)
    accepted = torch.tensor([3, 1], device=device)
    o, _ = op.step(
        **operands,
        state=_given(pools),
        state_indices=slots,
        num_accepted=accepted,
        engine=engine,
    )
    last = torch.tensor([0, 7], device=device)
    for x in alone:
        x[0], x[7] = x[3].clone(), x[6].clone()
    for t in range(3):
        each, _ = op.step(
            **_token(op, operands, t), state=_given(alone), state_indices=last, engine=engine
        )
        assert torch.equal(each, o[:, t])
        for x, y in zip(pools, alone, strict=True):
            assert torch.equal(x[slots[:, t].long()], y[last])


@torch.no_grad()
def test_states_after_each_of_several_tokens(kit: Any) -> None:
    """Without a pool: with the state of every token, from which the next draft goes on."""
    for rule in ("delta_rule", "momentum_delta"):
        op = getattr(cw.library, rule)
        operands = _inputs(kit, op, B=3, T=4, K=8, V=8)
        o, states = op.step(**operands)
        each = states if isinstance(states, tuple) else (states,)
        want, finals = op(**operands, output_final_state=True, engine="reference")
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
        for x, final in zip(each, finals if len(each) > 1 else (finals,), strict=True):
            torch.testing.assert_close(x[:, -1], final, rtol=1e-4, atol=1e-5)
        accepted = torch.tensor([1, 4, 2])
        o, _ = op.step(**operands, state=states, num_accepted=accepted)
        start = tuple(x[torch.arange(3), accepted - 1] for x in each)
        want, _ = op(**operands, initial_state=_given(start), engine="reference")
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


def test_several_tokens_have_a_gradient(kit: Any) -> None:
    op = cw.library.delta_rule
    operands = {n: x.requires_grad_() for n, x in _inputs(kit, op, B=2, T=3).items()}
    o, states = op.step(**operands)
    got = torch.autograd.grad(o.sum() + states[:, -1].sum(), list(operands.values()))
    o, final = op(**operands, output_final_state=True, engine="reference")
    want = torch.autograd.grad(o.sum() + final.sum(), list(operands.values()))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_graphs_change_pools(kit: Any) -> None:
    """By a mutating op, which graphs functionalise; opcheck looks at its schema and shapes."""
    op = cw.library.gated_delta_rule
    operands = _inputs(kit, op, B=2, T=1, K=8, V=8)
    token = _token(op, operands, 0)
    (pool,), indices = _pools(op, 4, 8, 8), torch.tensor([3, 1])

    def decode(pool: torch.Tensor, indices: torch.Tensor, token: Tensors) -> torch.Tensor:
        o, _ = op.step(**token, state=pool, state_indices=indices)
        return 2 * o + pool[indices].sum()

    want_pool = pool.clone()
    want = decode(want_pool, indices, token)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pool, indices, token), want)
    torch.testing.assert_close(pool, want_pool)
    args = (*operands.values(), pool.clone(), indices, None, None)
    torch.library.opcheck(op._ops.pooled, args, test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
def test_a_step_in_a_pool_marks_it_as_changed(kit: Any) -> None:
    op = cw.library.delta_rule
    token = _token(op, _inputs(kit, op, B=1, T=1, K=8, V=8), 0)
    (pool,) = _pools(op, 2, 8, 8)
    version = pool._version
    op.step(**token, state=pool, state_indices=torch.tensor([0]))
    assert pool._version == version + 1


def _bad(**changes: Any) -> dict[str, Any]:
    given = {"state": torch.zeros(4, 4, 8, 8), "state_indices": torch.tensor([0, 1]), **changes}
    return {n: x for n, x in given.items() if x is not None}


BAD = {
    "past the end": (
        _bad(state_indices=torch.tensor([0, 4])),
        "state_indices holds 4 at [1], expected a slot, 0 to 3",
    ),
    "shared": (
        _bad(state_indices=torch.tensor([2, 2])),
        "state_indices holds 2 at [1], expected a slot of its own: sequence 0",
    ),
    "accepted": (
        _bad(num_accepted=torch.tensor([1, 2])),
        "num_accepted holds 2 at [1], expected 1 to 1",
    ),
    "integers": (
        _bad(state=torch.zeros(4, 4, 8, 8, dtype=torch.int32)),
        "'state (S)' has dtype torch.int32, expected float32, bfloat16 or float16",
    ),
    "double": (
        _bad(state=torch.zeros(4, 4, 8, 8, dtype=torch.float64)),
        "'state (S)' has dtype torch.float64, expected float32",
    ),
    "stride": (
        _bad(state=torch.zeros(1, 4, 8, 8).expand(4, -1, -1, -1)),
        "a pool of strides (0, 64, 8, 1), whose slots share memory",
    ),
    "shape": (
        _bad(state=torch.zeros(4, 4, 8, 7)),
        "'state (S)' has shape [4, 4, 8, 7], expected a pool [slots,HV,K,V] = [4, 4, 8, 8]",
    ),
    "indices of floats": (
        _bad(state_indices=torch.zeros(2)),
        "'state_indices' has dtype torch.float32, expected int32 or int64",
    ),
    "too few": (
        _bad(state_indices=torch.tensor([0])),
        "'state_indices' has shape [1], expected [B] or [B,W] with B = 2",
    ),
    "no pool": (_bad(state=None), "needs the operand 'state' (a pool), got nothing"),
    "transposed": (
        _bad(state=torch.zeros(4, 4, 8, 8).mT),
        "the last axis of a pool has to be contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD)
@torch.no_grad()
def test_bad_pools_are_named(kit: Any, case: str) -> None:
    op = cw.library.delta_rule
    token = _token(op, _inputs(kit, op, B=2, T=1, H=4, K=8, V=8), 0)
    given, message = BAD[case]
    with pytest.raises(cw.errors.ChunkwiseError) as raised:
        op.step(**token, **given, engine="tvm")
    assert message in str(raised.value)


def test_no_gradient_through_a_pool(kit: Any) -> None:
    op = cw.library.delta_rule
    token = _token(op, _inputs(kit, op, B=2, T=1, H=4, K=8, V=8), 0)
    token["v"].requires_grad_()
    with pytest.raises(cw.errors.EngineUnavailable, match="a step in place has no gradient"):
        op.step(**token, **_bad())


@torch.no_grad()
def test_nine_tokens_are_a_call(kit: Any) -> None:
    op = cw.library.delta_rule
    for given in ({}, _bad()):
        with pytest.raises(cw.errors.BadShape, match="expected 1 to 8 tokens"):
            op.step(**_inputs(kit, op, B=2, T=9, H=4, K=8, V=8), **given)


@torch.no_grad()
def test_a_draft_whose_operands_disagree(kit: Any) -> None:
    op = cw.library.delta_rule
    x = _inputs(kit, op, B=2, T=3, H=2, K=4, V=4)
    with pytest.raises(cw.errors.BadShape, match="with T = 3"):
        op.step(**{**x, "k": x["k"][:, :2]})
    _, states = op.step(**x)
    with pytest.raises(cw.errors.NotATensor, match="'num_accepted' is of type list"):
        op.step(**x, state=states, num_accepted=[1, 2])
    with pytest.raises(cw.errors.BadDtype, match="'num_accepted' has dtype"):
        op.step(**x, state=states, num_accepted=torch.tensor([1.0, 2.0]))


@torch.no_grad()
def test_a_pool_without_sequences(kit: Any) -> None:
    op = cw.library.delta_rule
    token = {n: y[:0] for n, y in _token(op, _inputs(kit, op, B=2, T=1, K=8, V=8), 0).items()}
    slots = torch.empty(0, dtype=torch.int64)
    o, _ = op.step(**token, state=torch.zeros(3, 4, 8, 8), state_indices=slots)
    assert o.shape[0] == 0


def test_nothing_is_compiled_after_a_warmup(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of other lengths, with a first state and without, steps, pools, gradients."""
    from chunkwise.runtime.tvm import engine

    op = cw.library.delta_rule
    sizes = {"HV": 2, "K": 12, "V": 20, "B": (1, 2), "T": 40}
    spent = op.warmup(sizes, gradients=True, state_dtypes=(torch.float32, torch.bfloat16))
    assert list(spent) == ["call", "gradients", "step", "pool"]

    def compile_nothing(*of: Any) -> None:
        raise AssertionError("it was compiled before")

    monkeypatch.setattr(engine, "functions", compile_nothing)
    for B, T in ((1, 77), (2, 5)):
        operands = _inputs(kit, op, B=B, T=T, HV=2, K=12, V=20)
        o, state = op(
            **{n: x.requires_grad_() for n, x in operands.items()}, output_final_state=True
        )
        o.sum().backward()
        token = {n: x.detach() for n, x in _token(op, operands, 0).items()}
        with torch.no_grad():
            op(**operands, initial_state=state)
            op.step(**token, state=state)
            pool = torch.zeros(5, 2, 12, 20, dtype=torch.bfloat16)
            op.step(**token, state=pool, state_indices=torch.arange(B))


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ({"HV": 2, "K": 4}, cw.errors.MissingOperand, "'V'"),
        ({"HV": 2, "K": 4, "V": 4, "S": 1}, cw.errors.UnknownOperand, "'S'"),
        ({"HV": 2, "K": 4, "V": 0}, cw.errors.BadOption, r"dims\['V'\]"),
    ],
)
def test_a_warmup_names_the_size_at_fault(dims: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        cw.library.delta_rule.warmup(dims)


def _two(S: State, q: Key, k: Key, v: Value) -> Any:
    S = S + outer(k, v)
    return S, (q @ S, k @ S)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["tvm", "reference"])
def test_several_outputs(kit: Any, engine: str) -> None:
    op = cw.recurrence(_two)
    operands = _inputs(kit, op, B=2, T=3, K=8, V=8)
    (pool,) = _pools(op, 6, 8, 8)
    slots = torch.tensor([[0, 1, 2], [5, 4, 3]])
    start = pool[slots[:, 0]]
    outputs, _ = op.step(**operands, state=pool, state_indices=slots, engine=engine)
    want, final = op(**operands, initial_state=start, output_final_state=True, engine="reference")
    for x, y in zip((*outputs, pool[slots[:, 2]]), (*want, final), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
