"""The oracle against loops written out by hand, and its layouts, packings and edges."""

from __future__ import annotations

import pytest
import torch
from chunkwise.dsl import (
    Declaration,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    errors,
    exp,
    library,
    oracle,
    outer,
)
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gated(T: int, B: int = 2, H: int = 2, HV: int = 4, K: int = 3, V: int = 2) -> dict[str, Tensor]:
    return {
        "q": rand(B, T, H, K),
        "k": rand(B, T, H, K, seed=1),
        "v": rand(B, T, HV, V),
        "g": -rand(B, T, HV).abs(),
        "beta": rand(B, T, HV, seed=1).sigmoid(),
    }


def by_hand(x: dict[str, Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule, one head at a time; value head j uses key head j // (HV/H)."""
    B, T, HV, V = x["v"].shape
    group = HV // x["q"].shape[2]
    o = torch.zeros(B, T, HV, V, dtype=torch.float64)
    end = start.clone()
    for b in range(B):
        for j in range(HV):
            S = start[b, j]
            for t in range(T):
                q, k = x["q"][b, t, j // group], x["k"][b, t, j // group]
                S = x["g"][b, t, j].exp() * S
                S = S + x["beta"][b, t, j] * torch.outer(k, x["v"][b, t, j] - k @ S)
                o[b, t, j] = q @ S
            end[b, j] = S
    return o, end


def test_grouped_heads_against_a_plain_loop() -> None:
    x, start = gated(5), rand(2, 4, 3, 2)
    o, (end,) = oracle.run(library.gated_delta_rule.step(), x, {}, [start])
    expected, expected_end = by_hand(x, start)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(end, expected_end)


def test_widrow_hoff() -> None:
    """gated_lms with V = 1 is the textbook loop: w += β (d − wᵀx) x."""
    x, d, beta = rand(7, 3), rand(7), 0.1
    w = torch.zeros(3, dtype=torch.float64)
    for t in range(7):
        w = w + beta * (d[t] - w @ x[t]) * x[t]
    operands = {
        "q": x[None, :, None],
        "k": x[None, :, None],
        "v": d[None, :, None, None],
        "beta": torch.full((1, 7, 1), beta, dtype=torch.float64),
    }
    _, (end,) = oracle.run(library.gated_lms.step(), operands)
    torch.testing.assert_close(end[0, 0, :, 0], w)


def test_a_single_neuron_is_a_key_state() -> None:
    """The same neuron as a KeyState, whose values and outputs are Scalars."""

    def neuron(z: KeyState, q: Key, k: Key, d: Scalar, beta: Scalar):
        z = z + beta * outer(k, d - dot(k, z))
        return z, q @ z

    x = gated(6, HV=2, V=1)
    operands = {"q": x["q"], "k": x["k"], "d": x["v"][..., 0], "beta": x["beta"]}
    d = Declaration(neuron)
    expected, (expected_end,) = oracle.run(
        library.gated_lms.step(), {n: x[n] for n in ("q", "k", "v", "beta")}
    )
    for o, (end,) in (
        oracle.run(d.step(), operands),
        oracle.run(d.normal_form(), operands),
    ):
        torch.testing.assert_close(o, expected[..., 0])
        torch.testing.assert_close(end, expected_end[..., 0])


def test_packed_equals_the_loop_over_sequences() -> None:
    x, starts = gated(9, B=1), rand(4, 4, 3, 2)
    bounds = [0, 4, 4, 5, 9]  # an empty sequence, one of a single token
    step = library.gated_delta_rule.step()
    o, (ends,) = oracle.run(step, x, {}, [starts], torch.tensor(bounds))
    for i in range(4):
        part = {n: t[:, bounds[i] : bounds[i + 1]] for n, t in x.items()}
        o_i, (end_i,) = oracle.run(step, part, {}, [starts[i : i + 1]])
        torch.testing.assert_close(o[:, bounds[i] : bounds[i + 1]], o_i)
        torch.testing.assert_close(ends[i : i + 1], end_i)
    torch.testing.assert_close(ends[1], starts[1])


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0])])
def test_no_tokens(cu_seqlens: Tensor | None) -> None:
    start = rand(1, 4, 3, 2)
    x = gated(0, B=1)
    o, (end,) = oracle.run(library.gated_delta_rule.step(), x, {}, [start], cu_seqlens)
    assert o.shape == (1, 0, 4, 2)
    torch.testing.assert_close(end, start)


def test_checkpointing_changes_no_gradient() -> None:
    """T = 100 is checkpointed; two runs of 50, chained through the state, are not."""
    x = {n: t.requires_grad_() for n, t in gated(100, B=1, H=1, HV=1).items()}
    step = library.gated_delta_rule.step()
    o, (end,) = oracle.run(step, x)
    first, mid = oracle.run(step, {n: t[:, :50] for n, t in x.items()})
    last, (other_end,) = oracle.run(step, {n: t[:, 50:] for n, t in x.items()}, {}, mid)
    other = torch.cat([first, last], 1)
    torch.testing.assert_close(other, o)
    leaves = list(x.values())
    weights = rand(*o.shape)
    one = torch.autograd.grad((o * weights).sum() + end.sum(), leaves)
    two = torch.autograd.grad((other * weights).sum() + other_end.sum(), leaves)
    torch.testing.assert_close(one, two)


def test_gradients_are_derivatives() -> None:
    step = library.gated_delta_rule.step()
    x = gated(3, B=1, H=1, HV=2)
    names = list(x)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, (end,) = oracle.run(step, dict(zip(names, tensors, strict=False)), {}, [tensors[-1]])
        return o, end

    inputs = [t.requires_grad_() for t in (*x.values(), rand(1, 2, 3, 2))]
    assert torch.autograd.gradcheck(run, inputs)


def test_decoding_is_the_loop() -> None:
    x = gated(4)
    step = library.gated_delta_rule.step()
    o, (end,) = oracle.run(step, x)
    states: tuple[Tensor | None, ...] = (None,)
    for t in range(4):
        o_t, states = oracle.run(step, {n: y[:, t : t + 1] for n, y in x.items()}, {}, states)
        torch.testing.assert_close(o_t, o[:, t : t + 1])
    torch.testing.assert_close(states[0], end)


def test_params_and_dtype() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, *, scale: float, bias: float = 1.0):
        S = S + outer(k, v)
        return S, scale * (q @ S) + bias

    step = Declaration(rule).step()
    x = {n: t for n, t in gated(3).items() if n in "qkv"}
    o, _ = oracle.run(step, x, {"scale": 2.0}, dtype=torch.float32)
    assert o.dtype is torch.float32
    plain, _ = oracle.run(library.linear_attention.step(), x)
    torch.testing.assert_close(o.double(), 2.0 * plain + 1.0, rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.MissingOperand, match="scale"):
        oracle.run(step, x)


def test_an_output_without_a_read_has_all_heads() -> None:
    def rule(S: State, k: Key, v: Value, g: Scalar):
        return exp(g) * S + outer(k, v), g * k

    x = gated(3)
    o, _ = oracle.run(Declaration(rule).step(), {n: x[n] for n in ("k", "v", "g")})
    assert o.shape == (2, 3, 4, 3)


def test_bad_operands_are_named() -> None:
    step, x = library.gated_delta_rule.step(), gated(2)
    with pytest.raises(errors.MissingOperand, match="beta"):
        oracle.run(step, {n: t for n, t in x.items() if n != "beta"})
    with pytest.raises(errors.BadShape, match="'g'"):
        oracle.run(step, x | {"g": x["g"][..., None]})
    with pytest.raises(errors.HeadMismatch, match="'k'"):
        oracle.run(step, x | {"k": rand(2, 2, 3, 3)})


def test_a_form_whose_later_reads_see_earlier_moments() -> None:
    """What is read of a second state reads the first again, as it was before its update."""

    def rule(S: State, M: State, k: Key, v: Value, p: Key) -> tuple[tuple[State, State], Key]:
        before, read = S, p @ M
        return (S + outer(k, v), M + outer(k, k @ before)), before @ read

    declared = Declaration(rule)
    random = torch.Generator().manual_seed(0)
    sizes = {"B": 1, "T": 6, "H": 1, "HV": 1, "K": 3, "V": 4}
    operands = {
        o.name: torch.randn([sizes[a] for a in o.axes], generator=random, dtype=torch.float64)
        for o in declared.operands
    }
    by_step, by_form = (
        oracle.run(x, operands, {}, None)[0] for x in (declared.step(), declared.normal_form())
    )
    torch.testing.assert_close(by_form, by_step, rtol=1e-12, atol=1e-12)
