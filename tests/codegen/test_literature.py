"""Recurrences of the literature, declared in at most 15 lines, against loops of their equations.

The loops follow the papers: their states are often [V, K], windows and batches are windows and
batches. Gated Oja, minGRU, RWKV-4 and slots' scores have theirs in test_axes.py.
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
    HeadScalar,
    HeadValue,
    Key,
    Scalar,
    State,
    Value,
    dot,
    exp,
    expm1,
    logsigmoid,
    outer,
    sigmoid,
    softplus,
    sqrt,
    within,
)
from torch import Tensor

from tests import papers_attention  # noqa: F401
from tests.harness import Sizes, engine_results, make_inputs
from tests.papers import BATCH, DENSE, PACKED, PAPERS, Token, loop_of, loop_results
from tests.tolerances import FLOAT64_RANDOM, assert_agree

# ---- memories that learn at test time ------------------------------------------------------------


@cw.recurrence
def momentum_2026(
    S: State, M: State, q: Key, k: Key, v: Value, a: Scalar, mu: Scalar, b: Scalar, eta: Scalar
):
    """MomentumDeltaNet (ICML 2026): M averages gradients, of the decayed memory, and S descends."""
    S = exp(a) * S
    M = exp(mu) * M + eta * outer(k, k @ S - v)
    return (S - b * M, M), q @ (S - b * M)


@loop_of(momentum_2026)
def _(x: Token, S: Tensor, M: Tensor) -> Any:
    W = (S * x.a.exp()).mT
    G = x.mu.exp() * M.mT + x.eta * torch.outer(W @ x.k - x.v, x.k)
    W = W - x.b * G
    return W @ x.q, (W.mT, G.mT)


@loop_of(cw.library.momentum_delta)
def _(x: Token, S: Tensor, M: Tensor) -> Any:
    error = x.v - (S * x.p[:, None]).sum(0)
    M = x.log_mu.exp() * M + x.eta * x.k[:, None] * error
    S = x.log_alpha.exp() * S + x.beta * M
    return (S * x.q[:, None]).sum(0), (S, M)


@cw.recurrence
def titans(M: State, S: State, q: Key, k: Key, v: Value, alpha: Scalar, eta: Scalar, theta: Scalar):
    """Titans (Behrouz et al. 2025), eqs. 13 and 14, of a linear memory: surprise with momentum."""
    S = sigmoid(eta) * S - 2 * theta * outer(k, k @ M - v)
    M = (1 - sigmoid(alpha)) * M + S
    return (M, S), q @ M


@loop_of(titans)
def _(x: Token, M: Tensor, S: Tensor) -> Any:
    M, S = M.mT, S.mT
    gradient = 2 * torch.outer(M @ x.k - x.v, x.k)  # of |M k - v|^2
    S = x.eta.sigmoid() * S - x.theta * gradient
    M = (1 - x.alpha.sigmoid()) * M + S
    return M @ x.q, (M.mT, S.mT)


@cw.recurrence
def titans_batches(
    M: State, S: State, W: State, q: Key, k: Key, v: Value,
    first: Scalar, alpha: Scalar, eta: Scalar, theta: Scalar,
):  # fmt: skip
    """Titans' chunks (section 3.2): gradients at W, the memory when the batch began."""
    W = first * M + (1 - first) * W
    S = exp(eta) * S - theta * outer(k, k @ W - v)
    M = exp(alpha) * M + S
    return (M, S, W), q @ M


@loop_of(titans_batches)
def _(x: Token, M: Tensor, S: Tensor, W: Tensor) -> Any:
    W = M if x.t % BATCH == 0 else W
    S = x.eta.exp() * S - x.theta * torch.outer(W.mT @ x.k - x.v, x.k).mT
    M = x.alpha.exp() * M + S
    return M.mT @ x.q, (M, S, W)


@cw.recurrence
def ttt_batches(S: State, W: State, q: Key, k: Key, v: Value, first: Scalar, eta: Scalar):
    """TTT-Linear (Sun et al. 2024) without its norm, mini-batches: G_t = sum of gradients at W."""
    W = first * S + (1 - first) * W
    S = S - eta * outer(k, 2 * (k @ W - v))
    return (S, W), q @ S


@loop_of(ttt_batches)
def _(x: Token, S: Tensor, W: Tensor) -> Any:
    W = S if x.t % BATCH == 0 else W
    S = S - x.eta * 2 * torch.outer(x.k, x.k @ W - x.v)
    return x.q @ S, (S, W)


@cw.recurrence
def ttt(S: State, q: Key, k: Key, v: Value, eta: Scalar):
    """TTT-Linear without its norm, per token, with a bias: the last channel of k and q is 1."""
    S = S - eta * outer(k, 2 * (k @ S - v))
    return S, q @ S


@loop_of(ttt)
def _(x: Token, S: Tensor) -> Any:
    W, b = S[:-1].mT, S[-1]
    error = 2 * (W @ x.k[:-1] + b * x.k[-1] - x.v)
    W, b = W - x.eta * torch.outer(error, x.k[:-1]), b - x.eta * error * x.k[-1]
    return W @ x.q[:-1] + b * x.q[-1], (torch.cat([W.mT, b[None]]),)


@cw.recurrence
def omega(S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], a: Scalar,
          b: tuple[Scalar, ...]):  # fmt: skip
    """The Omega rule (ATLAS, Behrouz et al. 2025): a gradient step on a window of tokens."""
    old, S = S, exp(a) * S
    for k_i, v_i, b_i in zip(k, v, b, strict=True):
        S = S - 0.3 * b_i * outer(k_i, k_i @ old - v_i)
    return S, q @ S


@loop_of(omega, micro=3)
def _(x: Token, S: Tensor) -> Any:
    S = x.a.exp() * S - x.k.mT @ (0.3 * x.b[:, None] * (x.k @ S - x.v))
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


@cw.recurrence
def mamba3(S: State, lag: State, C: Key, B: Key, x: Value, dt: Scalar, lam: Scalar, A: HeadScalar):
    """Mamba-3's trapezoid (2026), without rotation: the lag is what the last token wrote."""
    step, lam = softplus(dt), sigmoid(lam)
    decay = exp(-step * exp(A))
    S = decay * S + (1 - lam) * step * decay * lag + lam * step * outer(B, x)
    return (S, outer(B, x)), C @ S


@loop_of(mamba3)
def _(x: Token, h: Tensor, last: Tensor) -> Any:
    delta, lam = torch.nn.functional.softplus(x.dt), x.lam.sigmoid()
    alpha = torch.exp(delta * -x.A.exp())
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


@cw.recurrence
def mimo(S: State, q: tuple[Key, ...], k: tuple[Key, ...], v: tuple[Value, ...],
         c: tuple[Value, ...], g: Scalar):  # fmt: skip
    """Mamba-3's MIMO: one decay, R writes, R reads, joined by weights per channel."""
    S = exp(g) * S
    for k_i, v_i in zip(k, v, strict=True):
        S = S + outer(k_i, v_i)
    o = c[0] * (q[0] @ S)
    for c_i, q_i in zip(c[1:], q[1:], strict=True):
        o = o + c_i * (q_i @ S)
    return S, o


@loop_of(mimo, micro=3)
def _(x: Token, h: Tensor) -> Any:
    h = x.g.exp() * h + x.k.mT @ x.v
    return (x.c * (x.q @ h)).sum(0), (h,)


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


@cw.recurrence
def hgrn(S: State, one: Key, f: Value, c: Value, g: Value, low: HeadValue):
    """HGRN (Qin et al. 2023), real: a forget gate with a learnt lower bound, an output gate."""
    f = sigmoid(low) + (1 - sigmoid(low)) * sigmoid(f)
    S = within(f, 0, 1) * S + outer(one, (1 - f) * c * sigmoid(c))
    return S, sigmoid(g) * (one @ S)


@loop_of(hgrn, K=1)
def _(x: Token, h: Tensor) -> Any:
    low = x.low.sigmoid()
    f = low + (1 - low) * x.f.sigmoid()
    h = f * h + (1 - f) * torch.nn.functional.silu(x.c) * x.one[0]
    return x.g.sigmoid() * h[0] * x.one[0], (h,)


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


@cw.recurrence
def rwkv4(A: State, Z: State, one: Key, k: Value, v: Value, w: HeadValue, u: HeadValue):
    """RWKV-4 (Peng et al. 2023), without stabiliser: w and u are parameters."""
    now = exp(u + k)
    o = (one @ A + now * v) / (one @ Z + now)
    A = exp(-exp(w)) * A + outer(one, exp(k) * v)
    Z = exp(-exp(w)) * Z + outer(one, exp(k))
    return (A, Z), o


@loop_of(rwkv4, K=1)
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


# the library's momentum_delta is left out: its typed signature alone takes 13 lines
@pytest.mark.parametrize("name", [n for n in PAPERS if n not in cw.library.names()])
def test_a_declaration_is_short(name: str) -> None:
    source = inspect.getsource(PAPERS[name][0].declaration.function)
    assert len(source.splitlines()) <= 15


# ---- what is refused, and for want of what -------------------------------------------------------


def test_a_step_size_per_channel_is_refused() -> None:
    """Longhorn (Liu et al. 2024) without its diagonal: a solve per column is missing."""
    with pytest.raises(cw.errors.NoChunkForm, match="scaled per channel"):

        @cw.recurrence
        def longhorn(S: State, q: Key, k: Key, x: Value, beta: Value):
            S = S + outer(k, beta / (1 + beta * dot(k, k)) * (x - k @ S))
            return S, q @ S


def test_gates_on_both_sides_are_refused() -> None:
    """Gated linear attention with Diag(a) S Diag(b): decayed scores per column are missing."""
    with pytest.raises(cw.errors.NoChunkForm, match="rows of the state and its columns"):

        @cw.recurrence
        def gla(S: State, q: Key, k: Key, v: Value, a: Key, b: Value):
            S = sigmoid(a) * S * sigmoid(b) + outer(k, v)
            return S, q @ S


def test_an_angle_per_channel_is_refused() -> None:
    """Mamba-3's rotation, an angle per pair of channels: decays of unit modulus are missing."""
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
