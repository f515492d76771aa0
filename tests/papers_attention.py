"""Linear attention of the literature: declarations, and loops of the papers' equations."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import torch
from chunkwise import (
    HeadValue,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    clamp,
    dot,
    exp,
    expm1,
    outer,
    sigmoid,
    softplus,
    sqrt,
    within,
)
from chunkwise import sum as channels
from torch import Tensor

from tests.papers import Token, loop_of

# ---- linear attention ----------------------------------------------------------------------------


@cw.recurrence
def gsa(A: State, S: State, q: Value, k: Value, v: Value, f: Key):
    """Gated slot attention (Zhang et al. 2024): slots keep keys and values, softmax reads them."""
    f = within(f, 0, 1)
    A, S = f * A + outer(1 - f, k), f * S + outer(1 - f, v)
    p = exp(A @ q)
    return (A, S), (p / channels(p)) @ S


@loop_of(gsa, V=5, K=3)
def _(x: Token, A: Tensor, S: Tensor) -> Any:
    gate = torch.diag(x.f)
    A = gate @ A + torch.outer(1 - x.f, x.k)
    S = gate @ S + torch.outer(1 - x.f, x.v)
    return S.mT @ torch.softmax(A @ x.q, 0), (A, S)


@cw.recurrence
def abc(A: State, S: State, Z: State, q: Value, k: Value, v: Value, s: Key, e: HeadValue):
    """ABC (Peng et al. 2022): slots are averages with the weights exp(s), over all tokens before.

    A column of Z holds the weights' sums: e e^T = 1 is what the layer keeps, and is not needed.
    """
    w = exp(s)
    A, S, Z = A + outer(w, k), S + outer(w, v), Z + outer(w, e)
    z = Z @ e
    p = exp((A @ q) / z)
    return (A, S, Z), (p / channels(p) / z) @ S


@loop_of(abc, V=4, K=3)
def _(x: Token, A: Tensor, S: Tensor, Z: Tensor) -> Any:
    w = x.s.exp()[:, None]
    A, S, Z = A + w * x.k, S + w * x.v, Z + w * x.e
    z = (Z * x.e).sum(-1)
    p = torch.softmax(A @ x.q / z, 0)
    return (p / z) @ S, (A, S, Z)


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


@cw.recurrence
def preconditioned(
    D: State, S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar, e: HeadValue
):
    """Preconditioned gated delta rule (2026): steps in proportion to 1 / (decayed sum of k^2)."""
    D = exp(g) * D + outer(k * k, e)
    p = k / (1 + cw.abs(D @ e))
    S = exp(g) * S
    S = S + beta * outer(p, v - k @ S)
    return (D, S), q @ S


@loop_of(preconditioned)
def _(x: Token, D: Tensor, S: Tensor) -> Any:
    D = x.g.exp() * D + (x.k**2)[:, None] * x.e
    p = x.k / (1 + (D * x.e).sum(-1).abs())
    S = (torch.eye(5).to(p) - x.beta * torch.outer(p, x.k)) @ (x.g.exp() * S)
    S = S + x.beta * torch.outer(p, x.v)
    return x.q @ S, (D, S)


@cw.recurrence
def preconditioned_kda(
    D: State, S: State, q: Key, k: Key, v: Value, g: Key, beta: Scalar, e: HeadValue
):
    """The same of KDA: gates per channel, and the Adagrad root."""
    D = exp(g) * D + outer(k * k, e)
    p = k / sqrt(1 + (D @ e) ** 2)
    S = exp(g) * S
    S = S + beta * outer(p, v - k @ S)
    return (D, S), q @ S


@loop_of(preconditioned_kda)
def _(x: Token, D: Tensor, S: Tensor) -> Any:
    D = x.g.exp()[:, None] * D + (x.k**2)[:, None] * x.e
    p = x.k * (1 + (D * x.e).sum(-1) ** 2) ** -0.5
    S = torch.diag(x.g.exp()) @ S
    S = S + x.beta * torch.outer(p, x.v - S.mT @ x.k)
    return x.q @ S, (D, S)


@cw.recurrence
def kalman(L: State, H: State, q: Key, k: Key, v: Value, f: Key, r: Scalar, e: HeadValue):
    """Kalman linear attention (2026), information form with fading memory: H = precision * mean.

    Fading in place of process noise, whose precision 1 / (1 / l + p) is not affine.
    """
    L = sigmoid(f) * L + outer(softplus(r) * k * k, e)
    H = sigmoid(f) * H + outer(softplus(r) * k, v)
    return (L, H), (q / (1 + (L @ e) ** 2)) @ H


@loop_of(kalman)
def _(x: Token, L: Tensor, H: Tensor) -> Any:
    f, r = x.f.sigmoid()[:, None], torch.nn.functional.softplus(x.r)
    L, H = f * L + r * (x.k**2)[:, None] * x.e, f * H + r * torch.outer(x.k, x.v)
    mean = H / (1 + (L @ x.e) ** 2)[:, None]
    return mean.mT @ x.q, (L, H)


@cw.recurrence
def normalised_delta(S: State, z: KeyState, q: Key, k: Key, v: Value, beta: Scalar):
    """The delta rule with its normaliser (Schlag et al. 2021, eq. 20): z follows the same rule."""
    S = S + beta * outer(k, v - k @ S)
    z = z + beta * (1 - dot(k, z)) * k
    return (S, z), (q @ S) / (1 + dot(q, z) ** 2)


@loop_of(normalised_delta)
def _(x: Token, S: Tensor, z: Tensor) -> Any:
    W = torch.cat([S, z[:, None]], 1)  # one more value, 1
    W = W + x.beta * torch.outer(x.k, torch.cat([x.v, x.v.new_ones(1)]) - x.k @ W)
    o = x.q @ W
    return o[:-1] / (1 + o[-1] ** 2), (W[:, :-1], W[:, -1])


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
