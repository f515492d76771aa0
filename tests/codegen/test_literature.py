"""Recurrences of the literature, declared in at most 15 lines, against loops of their equations.

The loops follow the papers: their states are often [V, K], windows and batches are windows and
batches. Gated Oja and slots' scores have theirs in test_axes.py.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import (
    HeadValue,
    Key,
    Scalar,
    State,
    Value,
    exp,
    expm1,
    logsigmoid,
    outer,
    sigmoid,
    softplus,
    sqrt,
)
from torch import Tensor

from tests import papers_attention, papers_turns  # noqa: F401
from tests.harness import Sizes, engine_results, make_inputs
from tests.papers import BATCH, DENSE, PACKED, PAPERS, Token, loop_of, loop_results
from tests.tolerances import FLOAT64_RANDOM, assert_agree

# ---- memories that learn at test time ------------------------------------------------------------


@loop_of(cw.library.momentum_delta)
def _(x: Token, S: Tensor, M: Tensor) -> Any:
    error = x.v - (S * x.p[:, None]).sum(0)
    M = x.log_mu.exp() * M + x.eta * x.k[:, None] * error
    S = x.log_alpha.exp() * S + x.beta * M
    return (S * x.q[:, None]).sum(0), (S, M)


@loop_of(cw.library.titans)
def _(x: Token, M: Tensor, S: Tensor) -> Any:
    M, S = M.mT, S.mT
    gradient = 2 * torch.outer(M @ x.k - x.v, x.k)  # of |M k - v|^2
    S = x.eta.sigmoid() * S - x.theta * gradient
    M = (1 - x.alpha.sigmoid()) * M + S
    return M @ x.q, (M.mT, S.mT)


@loop_of(cw.library.titans_batches)
def _(x: Token, M: Tensor, S: Tensor, W: Tensor) -> Any:
    W = M if x.t % BATCH == 0 else W
    gradient = 2 * torch.outer(W.mT @ x.k - x.v, x.k)
    S = x.eta.sigmoid() * S - x.theta * gradient.mT
    M = (1 - x.alpha.sigmoid()) * M + S
    return M.mT @ x.q, (M, S, W)


@loop_of(cw.library.ttt)
def _(x: Token, S: Tensor, W: Tensor) -> Any:
    W = S if x.t % BATCH == 0 else W
    S = S - x.eta * 2 * torch.outer(x.k, x.k @ W - x.v)
    return x.q @ S, (S, W)


@loop_of(cw.library.omega, micro=3)
def _(x: Token, S: Tensor) -> Any:
    S = x.g.exp() * S - x.k.mT @ (x.beta[:, None] * (x.k @ S - x.v))
    return x.q @ S, (S,)


@loop_of(cw.library.longhorn_channels)
def _(x: Token, S: Tensor) -> Any:
    beta = x.beta.sigmoid()
    columns = []
    for channel, b in enumerate(beta):  # argmin_s |s - s'|^2 + b (k s - x)^2, of each row of S^T
        A = torch.eye(len(x.k)).to(S) + b * torch.outer(x.k, x.k)
        columns.append(torch.linalg.solve(A, S[:, channel] + b * x.v[channel] * x.k))
    S = torch.stack(columns, 1)
    return x.q @ S, (S,)


@cw.recurrence
def atlas(S: State, M: State, q: Key, k0: Key, k1: Key, v0: Value, v1: Value,
          a: Scalar, mu: Scalar, b0: Scalar, b1: Scalar):  # fmt: skip
    """ATLAS with momentum, without Muon: the Omega rule's gradient is averaged."""
    M = exp(mu) * M - b0 * outer(k0, k0 @ S - v0) - b1 * outer(k1, k1 @ S - v1)
    S = exp(a) * S + M
    return (S, M), q @ S


@loop_of(atlas)
def _(x: Token, S: Tensor, M: Tensor) -> Any:
    k, v = torch.stack([x.k0, x.k1]), torch.stack([x.v0, x.v1])
    M = x.mu.exp() * M - k.mT @ (torch.stack([x.b0, x.b1])[:, None] * (k @ S - v))
    S = x.a.exp() * S + M
    return x.q @ S, (S, M)


@cw.recurrence
def nesterov(S: State, M: State, q: Key, k: Key, v: Value, mu: Scalar, eta: Scalar):
    """Nesterov's momentum (1983): the gradient is taken where the momentum alone would lead."""
    mu = 0.9 * sigmoid(mu)
    ahead = S + mu * M
    M = mu * M - eta * outer(k, k @ ahead - v)
    S = S + M
    return (S, M), q @ S


@loop_of(nesterov)
def _(x: Token, S: Tensor, M: Tensor) -> Any:
    mu = 0.9 * x.mu.sigmoid()
    M = mu * M + x.eta * torch.outer(x.k, x.v - x.k @ (S + mu * M))
    return x.q @ (S + M), (S + M, M)


# ---- state space models --------------------------------------------------------------------------


@loop_of(cw.library.mamba3_trapezoid)
def _(x: Token, h: Tensor, last: Tensor) -> Any:
    delta, lam = torch.nn.functional.softplus(x.dt), x.lam.sigmoid()
    alpha = torch.exp(delta * -x.A_log.exp())
    beta, gamma = (1 - lam) * delta * alpha, lam * delta
    now = x.B[:, None] * x.x
    h = alpha * h + beta * last + gamma * now
    return x.C @ h, (h, now)


@cw.recurrence
def rotated(R: State, J: State, qr: Key, qi: Key, kr: Key, ki: Key, v: Value, g: Scalar, c: Scalar,
            s: Scalar):  # fmt: skip
    """A complex state (S4D, Gu et al. 2022; RetNet's xPos) with one angle per head and token."""
    R, J = exp(g) * c * R - exp(g) * s * J, exp(g) * s * R + exp(g) * c * J
    R, J = R + outer(kr, v), J + outer(ki, v)
    return (R, J), qr @ R - qi @ J


@loop_of(rotated)
def _(x: Token, R: Tensor, J: Tensor) -> Any:
    S = torch.exp(x.g) * torch.complex(x.c, x.s) * torch.complex(R, J)
    S = S + torch.outer(torch.complex(x.kr, x.ki), x.v.to(S.dtype))
    return (torch.complex(x.qr, x.qi) @ S).real, (S.real, S.imag)


@loop_of(cw.library.mamba3_mimo, micro=3)
def _(x: Token, h: Tensor) -> Any:
    h = x.g.exp() * h + x.B.mT @ x.x
    return (x.c * (x.C @ h)).sum(0), (h,)


@cw.recurrence
def griffin(S: State, one: Key, r: Value, i: Value, x: Value, Lam: HeadValue):
    """RG-LRU (Griffin, De et al. 2024): a gate and an input gate per channel."""
    log_a = -8 * softplus(Lam) * sigmoid(r)
    S = exp(log_a) * S + outer(one, sqrt(-expm1(2 * log_a)) * (sigmoid(i) * x))
    return S, one @ S


@loop_of(griffin, K=1)
def _(x: Token, h: Tensor) -> Any:
    a = (-x.Lam).sigmoid() ** (8 * x.r.sigmoid())
    h = a * h + (1 - a * a).sqrt() * x.i.sigmoid() * x.x * x.one[0]
    return h[0] * x.one[0], (h,)


@loop_of(cw.library.hgrn, K=1)
def _(x: Token, h: Tensor) -> Any:
    h = x.g.exp() * h + x.x * x.one[0]
    return h[0] * x.one[0], (h,)


@cw.recurrence
def min_lstm(S: State, one: Key, f: Value, i: Value, h: Value):
    """minLSTM (Feng et al. 2024): two gates, normalised to f / (f + i) and i / (f + i)."""
    x = logsigmoid(f) - logsigmoid(i)
    S = sigmoid(x) * S + outer(one, (1 - sigmoid(x)) * h)
    return S, one @ S


@loop_of(min_lstm, K=1)
def _(x: Token, h: Tensor) -> Any:
    f, i = x.f.sigmoid(), x.i.sigmoid()
    h = f / (f + i) * h + i / (f + i) * x.h * x.one[0]
    return h[0] * x.one[0], (h,)


@loop_of(cw.library.rwkv4, K=1)
def _(x: Token, a: Tensor, b: Tensor) -> Any:
    e = torch.exp(x.u + x.k)
    o = (x.one[0] * a[0] + e * x.v) / (x.one[0] * b[0] + e)
    decay = torch.exp(-x.w.exp())
    return o, (decay * a + x.one * x.k.exp() * x.v, decay * b + x.one * x.k.exp())


@pytest.mark.parametrize("sizes", [DENSE, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("name", PAPERS)
def test_the_paper(name: str, sizes: Sizes) -> None:
    op, _, channels_of = PAPERS[name]
    sizes = replace(sizes, **channels_of)
    inputs = make_inputs(op, sizes)
    flags = inputs.operands.get("first")
    if flags is not None:  # 1 where a batch begins
        starts = [0] if sizes.lengths is None else list(itertools.accumulate((0, *sizes.lengths)))
        places = [t - max(s for s in starts if s <= t) for t in range(sizes.T)]
        begins = torch.tensor([t % BATCH == 0 for t in places], dtype=sizes.dtype)
        inputs.operands["first"] = begins[None, :, None].expand_as(flags).clone().requires_grad_()
    got, want = engine_results(op, inputs, "eager"), loop_results(name, inputs, sizes)
    if flags is not None:
        got["dfirst"] = want["dfirst"]  # the loop has batches, and no flags
    assert_agree(got, want, FLOAT64_RANDOM)


def test_momentum_delta_net_is_momentum_delta() -> None:
    """MomentumDeltaNet (ICML 2026): M averages gradients, of the decayed memory, and S descends."""
    inputs = make_inputs(cw.library.momentum_delta, DENSE)
    q, k, v, _, a, mu, b, eta = (x.detach() for x in inputs.operands.values())
    keys, queries = (x.repeat_interleave(DENSE.HV // DENSE.H, 2) for x in (k, q))
    W = torch.zeros(DENSE.B, DENSE.HV, DENSE.V, DENSE.K, dtype=torch.float64)
    G, outputs = torch.zeros_like(W), []
    for t in range(DENSE.T):
        W = W * a[:, t, :, None, None].exp()
        error = (W @ keys[:, t, ..., None]).squeeze(-1) - v[:, t]
        G = G * mu[:, t, :, None, None].exp()
        G = G + eta[:, t, :, None, None] * error[..., None] * keys[:, t, :, None]
        W = W - b[:, t, :, None, None] * G
        outputs.append((W @ queries[:, t, ..., None]).squeeze(-1))
    p = a.exp()[..., None] * keys
    got, (S, M) = cw.library.momentum_delta(
        queries, keys, v, p, a, mu, b, eta, output_final_state=True, engine="eager"
    )
    want = (torch.stack(outputs, 1), W.mT, -G.mT)
    torch.testing.assert_close((got, S, M), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAPERS)
def test_a_declaration_is_short(name: str) -> None:
    source = inspect.getsource(PAPERS[name][0].declaration.function)
    assert len(source.splitlines()) <= 15


# ---- what is refused, and for want of what -------------------------------------------------------


def test_recalls_under_gates_on_both_sides_are_refused() -> None:
    with pytest.raises(cw.errors.NoChunkForm, match="a system of equations for every channel"):

        @cw.recurrence
        def delta(S: State, q: Key, k: Key, v: Value, a: Key, b: Value):
            S = sigmoid(a) * S * sigmoid(b)
            return S + outer(k, v - k @ S), q @ S


def test_a_matrix_per_channel_is_refused() -> None:
    """Two states that mix by any numbers per channel: those of an angle have a chunk form."""
    with pytest.raises(cw.errors.NoChunkForm, match="gate per channel"):

        @cw.recurrence
        def pairs(R: State, J: State, q: Key, p: Key, k: Key, v: Value, c: Key, s: Key):
            R, J = c * R - s * J + outer(k, v), s * R + c * J
            return (R, J), q @ R - p @ J


def test_what_is_not_affine_is_refused() -> None:
    """Kalman linear attention with process noise divides a state by itself: no chunk form."""
    with pytest.raises(cw.errors.NotAffine):

        @cw.recurrence
        def process_noise(L: State, q: Key, k: Key, e: Value, p: Scalar):
            L = L / (1 + p * (k @ L)) + outer(k * k, e)
            return L, q @ L
