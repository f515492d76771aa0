"""Running maxima are computed before the op, in parallel, and given to it: gates stay at most 1.

Exponential gates of either sign up to 40, against loops that carry the maximum.
"""

from __future__ import annotations

import chunkwise as cw
import torch
from chunkwise import Key, KeyState, Scalar, State, Value, dot, exp, maximum, outer
from torch import Tensor


def running_maximum(log_decay: Tensor, log_input: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """m_t = max(m_(t-1) + log_decay_t, log_input_t) along axis 1, and m_(t-1), from `start`."""
    total = log_decay.cumsum(1)
    m = total + torch.maximum((log_input - total).cummax(1).values, start[:, None])
    return m, torch.cat((start[:, None], m[:, :-1]), 1)


@cw.recurrence
def mlstm(C: State, n: KeyState, q: Key, k: Key, v: Value, f: Scalar, i: Scalar, m: Scalar):
    C, n = exp(f) * C + outer(k, exp(i) * v), exp(f) * n + exp(i) * k
    return (C, n), (q @ C) / maximum(cw.abs(dot(q, n)), exp(-m))


@cw.recurrence
def rwkv4(A: State, Z: State, one: Key, v: Value, g: Value, i: Value, past: Value, now: Value):
    o = exp(past) * (one @ A) + exp(now) * v
    o = o / (exp(past) * (one @ Z) + exp(now))
    A, Z = exp(g) * A + outer(one, exp(i) * v), exp(g) * Z + outer(one, exp(i))
    return (A, Z), o


B, T, H, K, V = 2, 67, 2, 5, 3


def drawn(*axes: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*axes, dtype=torch.float64)).requires_grad_()


def agree(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(got)
    for x, y in zip(
        torch.autograd.grad((got * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((want * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


def test_mlstm_with_its_stabiliser() -> None:
    """xLSTM (Beck et al. 2024), eqs. 19 to 27: the state and its normaliser in units of e^m."""
    torch.manual_seed(0)
    q, k, v = drawn(B, T, H, K), drawn(B, T, H, K), drawn(B, T, H, V)
    x, i = drawn(B, T, H, scale=8.0), drawn(B, T, H, scale=15.0)
    log_f = torch.nn.functional.logsigmoid(x)
    m, before = running_maximum(log_f, i, torch.zeros(B, H, dtype=torch.float64))
    got, _ = mlstm(q, k, v, log_f + before - m, i - m, m, engine="eager")

    C, n, at = torch.zeros(B, H, K, V).double(), torch.zeros(B, H, K).double(), torch.zeros(B, H)
    outputs = []
    for t in range(T):
        new = torch.maximum(log_f[:, t] + at, i[:, t])
        f_t, i_t = (log_f[:, t] + at - new).exp(), (i[:, t] - new).exp()
        C = f_t[..., None, None] * C + i_t[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n, at = f_t[..., None] * n + i_t[..., None] * k[:, t], new
        norm = torch.maximum((n * q[:, t]).sum(-1).abs(), torch.exp(-at))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], C) / norm[..., None])
    agree(got, torch.stack(outputs, 1), [q, k, v, x, i])


def test_rwkv4_with_its_stabiliser() -> None:
    """RWKV-4 (Peng et al. 2023), appendix D: numerator and denominator in units of e^p."""
    torch.manual_seed(1)
    k, v = drawn(B, T, H, V, scale=15.0), drawn(B, T, H, V)
    w, u = drawn(H, V), drawn(H, V)
    one = torch.ones(B, T, H, 1, dtype=torch.float64)
    decay = -w.exp().expand(B, T, H, V)
    least = torch.full((B, H, V), -1e30, dtype=torch.float64)
    total = torch.arange(T, dtype=torch.float64)[:, None, None] * decay[:, :1]
    p = total + (k - total).cummax(1).values
    before = torch.cat((k[:, :1] - 100.0, p[:, :-1]), 1)  # nothing has been written
    larger = torch.maximum(before, u + k)
    gates = (decay + before - p, k - p, before - larger, u + k - larger)
    got, _ = rwkv4(one, v, *gates, engine="eager")

    a, b, at, outputs = torch.zeros(B, H, V).double(), torch.zeros(B, H, V).double(), least, []
    for t in range(T):
        now = torch.maximum(at, u + k[:, t])
        e1, e2 = torch.exp(at - now), torch.exp(u + k[:, t] - now)
        outputs.append((e1 * a + e2 * v[:, t]) / (e1 * b + e2))
        new = torch.maximum(at - w.exp(), k[:, t])
        e1, e2 = torch.exp(at - w.exp() - new), torch.exp(k[:, t] - new)
        a, b, at = e1 * a + e2 * v[:, t], e1 * b + e2, new
    agree(got, torch.stack(outputs, 1), [k, v, w, u])
