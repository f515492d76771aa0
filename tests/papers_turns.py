"""Recurrences of the literature whose states turn: loops on complex numbers, or pair by pair."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import torch
from chunkwise import (
    HeadKey,
    Key,
    State,
    Value,
    exp,
    outer,
    rotate,
)
from torch import Tensor

from tests.papers import Token, loop_of


@loop_of(cw.library.mamba3)
def _(x: Token, R: Tensor, J: Tensor, X: Tensor, Y: Tensor) -> Any:
    delta, lam = torch.nn.functional.softplus(x.dt), x.lam.sigmoid()
    alpha = torch.exp(delta * -x.A_log.exp())
    turn = torch.polar(torch.ones_like(x.theta), delta * x.theta)[:, None]
    now = torch.outer(torch.complex(x.B, x.B2), x.x.to(turn.dtype))
    h = alpha * turn * torch.complex(R, J)
    h = h + (1 - lam) * delta * alpha * turn * torch.complex(X, Y) + lam * delta * now
    y = (torch.complex(x.C, x.C2).conj() @ h).real
    return y, (h.real, h.imag, now.real, now.imag)


@cw.recurrence
def lru(R: State, J: State, one: Value, b: Key, d: Key, nu: HeadKey, theta: HeadKey, u: HeadKey):
    """LRU (Orvieto et al. 2023) and S5: a diagonal of complex numbers, |lambda| below 1; b and d
    are the real and imaginary parts of B u, what is given out those of C, its diagonal, times x."""
    R, J = rotate(exp(-exp(nu)) * R, exp(-exp(nu)) * J, exp(theta))
    R, J = R + outer(b, one), J + outer(d, one)
    return (R, J), u * (R @ one) - J @ one


@loop_of(lru, V=1)
def _(x: Token, R: Tensor, J: Tensor) -> Any:
    eigenvalues = torch.exp(torch.complex(-x.nu.exp(), x.theta.exp()))
    h = eigenvalues * torch.complex(R, J)[:, 0] + torch.complex(x.b, x.d) * x.one
    return (x.u * h.real - h.imag) * x.one, (h.real[:, None], h.imag[:, None])


@cw.recurrence
def selective_rope(R: State, J: State, q: Key, p: Key, k: Key, c: Key, v: Value, g: Key, a: Key):
    """Selective RoPE (2025): gated linear attention, positions that the data turn."""
    R, J = rotate(exp(g) * R, exp(g) * J, a)
    R, J = R + outer(k, v), J + outer(c, v)
    return (R, J), q @ R + p @ J


@loop_of(selective_rope)
def _(x: Token, R: Tensor, J: Tensor) -> Any:
    turn = torch.stack([x.a.cos(), -x.a.sin(), x.a.sin(), x.a.cos()], -1).unflatten(-1, (2, 2))
    S = turn @ torch.stack([R, J], 1) * x.g.exp()[:, None, None]  # [K, 2, V]: pair by pair
    S = S + torch.stack([x.k, x.c], -1)[..., None] * x.v
    return (torch.stack([x.q, x.p], -1)[..., None] * S).sum((0, 1)), (S[:, 0], S[:, 1])
