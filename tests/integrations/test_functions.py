"""The functions of mamba_ssm and causal_conv1d against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from chunkwise import errors
from chunkwise.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from chunkwise.integrations.mamba_ssm import (
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
)
from chunkwise.runtime.nn import fused
from torch import Tensor

B, T, D, W = 2, 11, 6, 4
SEQUENCES = torch.tensor([[0] * 4 + [1] + [2] * 6, [3] * 5 + [0] * 6])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    """Equal, and so are the gradients of the leaves."""
    torch.testing.assert_close(got, want)
    if leaves:
        of = [torch.autograd.grad((y * randn(*y.shape)).sum(), leaves) for y in (got, want)]
        for a, b in zip(*of, strict=True):
            torch.testing.assert_close(a, b)


# ---- convolutions --------------------------------------------------------------------------------


def convolved(x: Tensor, weight: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Token by token; x may begin with tokens that are only seen."""
    rows = []
    for b in range(len(x)):
        columns = []
        for t in range(x.shape[2]):
            seen = torch.zeros_like(x[b, :, 0])
            for n in range(min(weight.shape[1], t + 1)):
                if seq_idx is None or seq_idx[b, t] == seq_idx[b, t - n]:
                    seen = seen + weight[:, -1 - n] * x[b, :, t - n]
            columns.append(seen)
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution(packed: bool) -> None:
    x, weight, bias = randn(B, D, T), randn(D, W, seed=1), randn(D, seed=2)
    leaves = [y.requires_grad_() for y in (x, weight, bias)]
    seq_idx = SEQUENCES if packed else None
    want = F.silu(convolved(x, weight, seq_idx) + bias[:, None])
    check(causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu"), want, *leaves)
    check(causal_conv1d_fn(x, weight, seq_idx=seq_idx), convolved(x, weight, seq_idx), x, weight)


@pytest.mark.interpreter
@pytest.mark.parametrize("biased", [False, True])
def test_convolution_by_its_kernel(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    x, weight = (randn(*s, dtype=torch.float32).requires_grad_() for s in ((B, D, T), (D, W)))
    bias = randn(D, seed=2, dtype=torch.float32) if biased else None
    for seq_idx in (None, SEQUENCES):
        want = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
        with monkeypatch.context() as patch:
            patch.setattr(fused, "serves", lambda x: True)
            got = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
        check(got, want, x, weight)


@pytest.mark.interpreter
def test_convolution_by_its_kernel_of_two_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output has x's, and what a first call under inference mode keeps serves gradients."""
    monkeypatch.setattr(fused, "serves", lambda x: True)
    channels = 7  # of no other test, for what is kept
    x = randn(B, channels, T).bfloat16()
    weight, bias = randn(channels, W, dtype=torch.float32), randn(channels, dtype=torch.float32)
    with torch.inference_mode():
        first = causal_conv1d_fn(x, weight, bias, activation="silu")
    y = causal_conv1d_fn(x, weight.requires_grad_(), bias, activation="silu")
    assert y.dtype == first.dtype == torch.bfloat16
    assert torch.equal(y, first)
    y.sum().backward()
    assert weight.grad is not None


def test_convolution_of_16_bits_rounds_once() -> None:
    x, weight, bias = randn(B, D, 64).bfloat16(), randn(D, W).bfloat16(), randn(D).bfloat16()
    want = F.silu(convolved(x.double(), weight.double()) + bias.double()[:, None])
    for got in (
        causal_conv1d_fn(x, weight, bias, activation="silu"),
        causal_conv1d_update(x, torch.zeros(B, D, W - 1), weight, bias, "silu"),
    ):
        torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, T])
def test_states_of_convolutions(tokens: int) -> None:
    x, weight, before = randn(B, D, tokens), randn(D, W, seed=1), randn(B, D, W - 1, seed=2)
    whole = torch.cat([before, x], -1)
    want = convolved(whole, weight)[..., W - 1 :]
    room = torch.empty(B, D, W - 1, dtype=x.dtype)
    got, last = causal_conv1d_fn(
        x, weight, initial_states=before, return_final_states=True, final_states_out=room
    )
    check(got, want)
    assert last is room
    assert torch.equal(last, whole[..., -(W - 1) :])
    _, alone = causal_conv1d_fn(x, weight, return_final_states=True)
    assert torch.equal(alone, F.pad(x, (W - 1, 0))[..., -(W - 1) :])

    state = F.pad(before, (1, 0))  # states may hold more than is seen
    pool = randn(5, D, W, seed=3)
    slots = torch.tensor([3, 1])
    pool[slots] = state
    others = pool[[0, 2, 4]]
    given = x.squeeze(-1) if tokens == 1 else x
    check(causal_conv1d_update(given, state, weight).view(want.shape), want)
    check(
        causal_conv1d_update(given, pool, weight, conv_state_indices=slots).view(want.shape), want
    )
    assert torch.equal(state, F.pad(whole, (1, 0))[..., -W:])
    assert torch.equal(pool[slots], state)
    assert torch.equal(pool[[0, 2, 4]], others)


def test_convolutions_refuse() -> None:
    x, weight = randn(B, D, T), randn(D, W)
    with pytest.raises(errors.BadOption, match="activation"):
        causal_conv1d_fn(x, weight, activation="tanhshrink")
    with pytest.raises(errors.BadOption, match="seq_idx"):
        causal_conv1d_fn(x, weight, seq_idx=SEQUENCES, return_final_states=True)
    with pytest.raises(errors.BadOption, match="cache_seqlens"):
        causal_conv1d_update(x, randn(B, D, W), weight, None, None, torch.tensor([3, 1]))
    for wrong, options in (
        ("weight", {"weight": weight[:, None]}),
        ("weight", {"weight": weight[:1]}),
        ("bias", {"bias": randn(1)}),
        ("initial_states", {"initial_states": randn(B, D, W - 2)}),
        ("x", {"x": x[0]}),
    ):
        with pytest.raises(errors.BadShape, match=f"operand '{wrong}'"):
            causal_conv1d_fn(**{"x": x, "weight": weight, **options})
    for state in (randn(B, D, W - 2), randn(1, D, W), randn(B, 1, W)):
        with pytest.raises(errors.BadShape, match="operand 'conv_state'"):
            causal_conv1d_update(x, state, weight)


# ---- scans ---------------------------------------------------------------------------------------

H, G, P, N = 4, 2, 3, 5


def scanned(
    x: Tensor, dt: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor, state: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[B,T,H,P]`, token by token; dt `[B,T,H,P]`, A `[H,P,N]`, Bs and Cs `[B,T,H,N]`."""
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        step = dt[:, t, :, :, None]
        state = torch.exp(step * A) * state + step * x[:, t, :, :, None] * Bs[:, t, :, None]
        outputs.append((state * Cs[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("case", ["plain", "packed", "continued", "skip per channel"])
def test_mamba2(case: str) -> None:
    x, dt, z = randn(B, T, H, P), randn(B, T, H, seed=1), randn(B, T, H, P, seed=2)
    A, bias = -randn(H, seed=3).exp(), randn(H, seed=4)
    Bs, Cs = randn(B, T, G, N, seed=5), randn(B, T, G, N, seed=6)
    skip = randn(H, P, seed=7) if case == "skip per channel" else randn(H, seed=7)
    leaves = [y.requires_grad_() for y in (x, dt, A, Bs, Cs, skip, bias, z)]
    first = randn(B, H, P, N, seed=8) if case == "continued" else None
    seq_idx = SEQUENCES if case == "packed" else None
    o, final = mamba_chunk_scan_combined(
        *(x, dt, A, Bs, Cs, 64), D=skip, z=z, dt_bias=bias, initial_states=first, seq_idx=seq_idx,
        dt_softplus=True, dt_limit=(0.1, 2.0), return_final_states=True,
    )  # fmt: skip
    steps = F.softplus(dt + bias).clamp(0.1, 2.0)[..., None].expand(x.shape)
    keys = [y.repeat_interleave(H // G, 2) for y in (Bs, Cs)]
    zero = torch.zeros(B, H, P, N, dtype=x.dtype) if first is None else first
    want, last = scanned(x, steps, A[:, None, None].expand(H, P, N), *keys, zero, seq_idx)
    want = (want + x * (skip if skip.ndim == 2 else skip[:, None])) * F.silu(z)
    check(o, want, *leaves)
    check(final, last)


@pytest.mark.parametrize("one_rate", [True, False])
def test_one_token(one_rate: bool) -> None:
    """Of Mamba-2, whose heads have one rate, and of what has a rate for every channel."""
    x, z, state = randn(B, H, P), randn(B, H, P, seed=1), randn(B, H, P, N, seed=2)
    Bs, Cs, skip = randn(B, G, N, seed=3), randn(B, G, N, seed=4), randn(H, P, seed=5)
    dt, A = randn(B, H, P, seed=6), -randn(H, P, N, seed=7).exp()
    bias = randn(H, P, seed=8)
    if one_rate:
        dt, bias = dt[..., :1].expand(B, H, P), bias[:, :1].expand(H, P)
        A = A[:, :1, :1].expand(H, P, N)
    keys = [y.repeat_interleave(H // G, 1)[:, None] for y in (Bs, Cs)]
    want, last = scanned(x[:, None], F.softplus(dt + bias)[:, None], A, *keys, state)
    want = (want[:, 0] + skip * x) * F.silu(z)
    pool, slots = randn(5, H, P, N, seed=9), torch.tensor([4, 0])
    pool[slots], others = state, pool[1:4].clone()
    given = (x, dt, A, Bs, Cs, skip, z, bias, True)
    check(selective_state_update(pool, *given, slots), want)
    check(selective_state_update(state, *given), want)
    check(state, last)
    assert torch.equal(pool[slots], state)
    assert torch.equal(pool[1:4], others)
    for wrong, message in (([4, 4], "holds 4 at \\[1\\]"), ([4, 5], "holds 5 at \\[1\\]")):
        with pytest.raises(errors.BadSlots, match=message):
            selective_state_update(pool, *given, torch.tensor(wrong))
    selective_state_update(pool, *given, torch.tensor([-1, -1]))
    assert torch.equal(pool[slots], state)  # no slot, no change


def test_mamba1() -> None:
    """Whole sequences, and one token more."""
    u, delta, z = randn(B, D, T), randn(B, D, T, seed=1), randn(B, D, T, seed=2)
    A, skip, bias = -randn(D, N, seed=3).exp(), randn(D, seed=4), randn(D, seed=5)
    Bs, Cs = randn(B, N, T, seed=6), randn(B, N, T, seed=7)
    leaves = [y.requires_grad_() for y in (u, delta, A, Bs, Cs, skip, bias, z)]
    o, final = selective_scan_fn(u, delta, A, Bs, Cs, skip, z, bias, True, True)
    steps = F.softplus(delta + bias[:, None]).mT[:, :, None]
    keys = [y.mT[:, :, None] for y in (Bs, Cs)]
    zero = torch.zeros(B, 1, D, N, dtype=u.dtype)
    want, last = scanned(u.mT[:, :, None], steps, A[None], *keys, zero)
    check(o, (want[:, :, 0].mT + skip[:, None] * u) * F.silu(z), *leaves)
    check(final, last[:, 0])
    grouped = [y[:, None].expand(B, 2, N, T) for y in (Bs, Cs)]
    check(selective_scan_fn(u, delta, A, *grouped), selective_scan_fn(u, delta, A, Bs, Cs))

    with torch.no_grad():
        part, state = selective_scan_fn(
            *(u[..., :-1], delta[..., :-1], A, Bs[..., :-1], Cs[..., :-1]), return_last_state=True
        )
        got = selective_state_update(state, u[..., -1], delta[..., -1], A, Bs[..., -1], Cs[..., -1])
        assert math.prod(part.shape) == B * D * (T - 1)
        check(got, selective_scan_fn(u, delta, A, Bs, Cs)[..., -1])
        given = (u[..., -1], delta[..., -1], A, Bs[..., -1], Cs[..., -1])
        again, update = state.clone(), selective_state_update
        whole = torch.compile(update, backend="eager", fullgraph=True)(again, *given)
        check(whole, update(state, *given))
        check(again, state)


def test_scans_refuse() -> None:
    """What torch would broadcast, and what the functions do not have."""
    x, dt, A, bias = randn(B, T, H, P), randn(B, T, H), randn(H), randn(H)
    keys, skip, z = randn(B, T, G, N), randn(H, P), randn(B, T, H, P)
    given = {"x": x, "dt": dt, "A": A, "B": keys, "C": keys, "D": skip, "z": z, "dt_bias": bias}
    for name, wrong in (
        ("A", A[:1]), ("A", A[:, None]), ("D", skip[:1, :1]), ("D", A[:1]), ("z", z[:1]),
        ("dt_bias", bias.expand(T, H)), ("seq_idx", SEQUENCES[:1]), ("dt", dt[..., :1]),
        ("x", x[0]),
    ):  # fmt: skip
        with pytest.raises(errors.BadShape, match=f"operand '{name}'"):
            mamba_chunk_scan_combined(**{**given, name: wrong}, chunk_size=64)
    bounds = torch.tensor([0, T])
    with pytest.raises(errors.BadOption, match="cu_seqlens"):  # where the package has it
        mamba_chunk_scan_combined(x, dt, A, keys, keys, 64, skip, z, bias, None, None, bounds)
    with pytest.raises(errors.BadOption, match="varlen"):
        mamba_chunk_scan_combined(**given, chunk_size=64, return_varlen_states=True)
    u, rates, of_all = randn(B, D, T), randn(D, N), randn(B, N, T)
    for name, wrong in (("B", rates), ("C", rates), ("D", rates[:1, 0]), ("z", u[:1])):
        scan = {"u": u, "delta": u, "A": rates, "B": of_all, "C": of_all, name: wrong}
        with pytest.raises(errors.BadShape, match=f"operand '{name}'"):
            selective_scan_fn(**scan)
    token = {"state": randn(B, H, P, N), "x": x[:, 0], "dt": x[:, 0], "A": randn(H, P, N)}
    token |= {"B": keys[:, 0], "C": keys[:, 0]}
    for name, wrong in (("D", skip[:1]), ("dt_bias", bias[:, None]), ("A", randn(H, 1, 1))):
        with pytest.raises(errors.BadShape, match=f"operand '{name}'"):
            selective_state_update(**{**token, name: wrong})
    slots = torch.arange(B)
    for how in ({}, {"state_batch_indices": slots}):  # as many numbers, in other axes
        with pytest.raises(errors.BadShape, match="operand 'state'"):
            selective_state_update(**{**token, "state": randn(B, P, H, N)}, **how)
    with pytest.raises(errors.BadLayout, match="H and P"):
        selective_state_update(**{**token, "state": randn(B, P, H, N).transpose(1, 2)})


def test_no_tokens_and_no_sequences() -> None:
    x, dt, keys = randn(B, 0, H, P), randn(B, 0, H), randn(B, 0, G, N)
    o, final = mamba_chunk_scan_combined(
        *(x, dt, randn(H), keys, keys, 64), seq_idx=SEQUENCES[:, :0], return_final_states=True
    )
    assert o.shape == x.shape
    assert not final.any()
    no, A = randn(0, H, P), randn(H, P, N)
    for rates in (A, A[:, :1, :1].expand(A.shape)):
        o = selective_state_update(randn(0, H, P, N), no, no, rates, *randn(2, 0, G, N))
        assert o.shape == no.shape
