"""Linear attention of the literature: declarations, and loops of the papers' equations."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import torch
from chunkwise import (
    Key,
    Scalar,
    State,
    Value,
    clamp,
    dot,
    exp,
    expm1,
    outer,
)
from torch import Tensor

from tests.papers import Token, loop_of

# ---- linear attention ----------------------------------------------------------------------------


@loop_of(cw.library.gsa, V=5, K=3)
def _(x: Token, A: Tensor, S: Tensor) -> Any:
    gate = torch.diag(x.g.exp())
    A = gate @ A + torch.outer(x.s, x.k)
    S = gate @ S + torch.outer(x.s, x.v)
    return S.mT @ torch.softmax(A @ x.q, 0), (A, S)


@loop_of(cw.library.abc, V=4, K=3)
def _(x: Token, A: Tensor, S: Tensor, Z: Tensor) -> Any:
    w, u = x.s.exp()[:, None], x.e.exp()
    A, S, Z = A + w * x.k, S + w * x.v, Z + w * u
    z = (Z * u).sum(-1) / (u @ u)
    p = torch.softmax(A @ x.q / z, 0)
    return (p / z) @ S, (A, S, Z)


@loop_of(cw.library.residual_linear_attention)
def _(x: Token, S: Tensor, R: Tensor) -> Any:
    S, R, a = S.mT, R.mT, x.g.exp()
    r = torch.clamp(x.v - S @ x.k, -1, 1)
    o = a * (S @ x.q)
    S, R = a * S + x.beta * torch.outer(x.v, x.k), a * R + x.gamma * torch.outer(r, x.k)
    return o + x.gamma * (R @ x.q), (S.mT, R.mT)


@cw.recurrence
def residual_delta(
    S: State, R: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar, gamma: Scalar
):
    """Residual delta net (2025): a second memory of the clipped errors of the first, both delta."""
    error = clamp(v - k @ S, -1, 1)
    before, S, R = q @ S, exp(g) * S, exp(g) * R
    S = S + beta * outer(k, v - k @ S)
    R = R + gamma * outer(k, error - k @ R)
    return (S, R), exp(g) * before + gamma * (q @ R)


@loop_of(residual_delta)
def _(x: Token, S: Tensor, R: Tensor) -> Any:
    S, R, a = S.mT, R.mT, x.g.exp()
    r = torch.clamp(x.v - S @ x.k, -1, 1)
    o = a * (S @ x.q)
    erase = torch.outer(x.k, x.k)
    S = a * (S - x.beta * S @ erase) + x.beta * torch.outer(x.v, x.k)
    R = a * (R - x.gamma * R @ erase) + x.gamma * torch.outer(r, x.k)
    return o + x.gamma * (R @ x.q), (S.mT, R.mT)


def _squashed(x: Token, D: Tensor) -> Tensor:
    """The preconditioner: 1.5 to the power of minus the squashed logarithm of what was summed."""
    u = x.e.exp()
    r = ((D @ u).abs() / (u @ u) + 1e-6).log() + 0.2
    return 1.5 ** -(r / (1 + r.abs()))


@loop_of(cw.library.preconditioned_delta)
def _(x: Token, D: Tensor, S: Tensor) -> Any:
    D = x.g_sum.exp() * D + x.b_sum * torch.outer(x.k**2, x.e.exp())
    p = x.k * _squashed(x, D)
    S = (torch.eye(5).to(p) - x.beta * torch.outer(p, x.k)) @ (x.g.exp() * S)
    S = S + x.beta * torch.outer(p, x.v)
    return x.q @ S, (D, S)


@loop_of(cw.library.preconditioned_kda)
def _(x: Token, D: Tensor, S: Tensor) -> Any:
    D = x.g_sum.exp() * D + x.b_sum * torch.outer(x.k**2, x.e.exp())
    p = x.k * _squashed(x, D)
    S = torch.diag(x.g.exp()) @ S
    S = S + x.beta * torch.outer(p, x.v - S.mT @ x.k)
    return x.q @ S, (D, S)


@loop_of(cw.library.kalman_linear_attention)
def _(x: Token, L: Tensor, H: Tensor) -> Any:
    f, r = x.f.sigmoid()[:, None], torch.nn.functional.softplus(x.r)
    L, H = f * L + r * (x.k**2)[:, None] * x.e, f * H + r * torch.outer(x.k, x.v)
    mean = H / (1 + (L @ x.e) ** 2)[:, None]
    return mean.mT @ x.q, (L, H)


@loop_of(cw.library.gla_both)
def _(x: Token, S: Tensor) -> Any:
    S = x.g.exp()[:, None] * S * x.h.exp() + torch.outer(x.k, x.v)
    return x.q @ S, (S,)


@loop_of(cw.library.delta_rule_normalised)
def _(x: Token, S: Tensor, z: Tensor) -> Any:
    W = torch.cat([S, z[:, None]], 1)  # one more value, 1
    W = W + x.beta * torch.outer(x.k, torch.cat([x.v, x.v.new_ones(1)]) - x.k @ W)
    o = x.q @ W
    return o[:-1] / o[-1].abs().clamp(min=1), (W[:, :-1], W[:, -1])


@cw.recurrence
def error_free(S: State, q: Key, k: Key, v: Value, beta: Scalar):
    """EFLA (2025): the delta rule's flow, solved exactly over a step of length beta."""
    step = -expm1(-beta * dot(k, k)) / dot(k, k)
    S = S + step * outer(k, v - k @ S)
    return S, q @ S


@loop_of(error_free)
def _(x: Token, S: Tensor) -> Any:
    A = torch.outer(x.k, x.k)
    n = x.k @ x.k
    flow = torch.linalg.matrix_exp(-x.beta * A)
    S = flow @ S + (1 - torch.exp(-x.beta * n)) / n * torch.outer(x.k, x.v)
    return x.q @ S, (S,)


@cw.recurrence
def mesa(H: State, S: State, q: Key, q_too: Value, k: Key, k_too: Value, v: Value, g: Scalar):
    """MesaNet (von Oswald et al. 2025) with two fixed gradient steps on (H + 1) x = q."""
    H, S = exp(g) * H + outer(k, k_too), exp(g) * S + outer(k, v)
    x = 0.3 * q_too
    x = 0.3 * q + 0.7 * (0.3 * q) - 0.3 * (H @ x)
    return (H, S), x @ S


@loop_of(mesa, V=5)
def _(x: Token, H: Tensor, S: Tensor) -> Any:
    H = x.g.exp() * H + torch.outer(x.k, x.k_too)
    S = x.g.exp() * S + torch.outer(x.k, x.v)
    first = 0.3 * x.q_too
    second = 0.3 * x.q + 0.7 * 0.3 * x.q - 0.3 * (H @ first)
    return S.mT @ second, (H, S)
