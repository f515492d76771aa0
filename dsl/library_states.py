"""Recurrences of the literature with several states or recalls: mini-batches, lags, slots, errors.

Part of the library (library.py); the gates are log-decays ≤ 0 unless a line says otherwise.
"""

from __future__ import annotations

import functools
import operator

from .declaration import Declaration, declaration
from .functions import abs as abs_
from .functions import clamp, dot, exp, log, maximum, outer, rotate, sigmoid, softplus
from .functions import sum as sum_
from .kinds import HeadScalar, HeadValue, Key, KeyState, Scalar, State, Value
from .traced import Traced

_Two = tuple[tuple[State, State], Value]
_Four = tuple[tuple[State, State, State, State], Value]
_Three = tuple[tuple[State, State, State], Value]


@declaration
def gla_both(S: State, q: Key, k: Key, v: Value, g: Key, h: Value) -> tuple[State, Value]:
    """Gated linear attention (Yang et al. 2024) with a gate for rows and one for columns."""
    S = exp(g) * S * exp(h) + outer(k, v)
    return S, q @ S


@declaration
def kalman_linear_attention(
    L: State, H: State, q: Key, k: Key, v: Value, f: Key, r: Scalar, e: HeadValue
) -> _Two:
    """Kalman linear attention (2026), information form: H = L * mean, with precisions L.

    r is the precision of v, and e 1 for every channel or a number of its own. Precisions fade, by
    a gate, in place of process noise, whose 1 / (1 / L + p) is not affine.
    """
    f, r = sigmoid(f), softplus(r)
    L = f * L + outer(r * k * k, e)
    H = f * H + outer(r * k, v)
    return (L, H), (q / (1 + (L @ e) ** 2)) @ H


@declaration
def delta_rule_normalised(
    S: State, z: KeyState, q: Key, k: Key, v: Value, beta: Scalar
) -> tuple[tuple[State, KeyState], Value]:
    """The delta rule whose normaliser follows the delta rule (Schlag, Irie, Schmidhuber 2021).

    z learns to recall 1; the output is divided by what q recalls of it, as mLSTM's, at least 1.
    """
    S = S + beta * outer(k, v - k @ S)
    z = z + beta * (1 - dot(k, z)) * k
    return (S, z), (q @ S) / maximum(abs_(dot(q, z)), 1.0)


@declaration
def mamba3_trapezoid(
    S: State, lag: State, C: Key, B: Key, x: Value, dt: Scalar, lam: Scalar, A_log: HeadScalar
) -> _Two:
    """Mamba-3's exponential-trapezoidal rule (Lahoti et al. 2026): one input, one output.

    The lag is what the last token wrote. Without the rotation of B and C, which Mamba-3 adds.
    """
    step, now = softplus(dt), sigmoid(lam)
    decay = exp(-exp(A_log) * step)
    S = decay * S + (1 - now) * step * decay * lag + now * step * outer(B, x)
    return (S, outer(B, x)), C @ S


@declaration
def mamba3(
    R: State, J: State, R_lag: State, J_lag: State, C: Key, C2: Key, B: Key, B2: Key, x: Value,
    dt: Scalar, lam: Scalar, A_log: HeadScalar, theta: Key,
) -> _Four:  # fmt: skip
    """Mamba-3 (Lahoti et al. 2026): the trapezoid, and turns by dt θ of halves B, B2 and C, C2."""
    step, now = softplus(dt), sigmoid(lam)
    decay, late = exp(-exp(A_log) * step), (1 - now) * step
    R, J = decay * (R + late * R_lag), decay * (J + late * J_lag)
    R, J = rotate(R, J, step * theta)
    R_lag, J_lag = outer(B, x), outer(B2, x)
    R, J = R + now * step * R_lag, J + now * step * J_lag
    return (R, J, R_lag, J_lag), C @ R + C2 @ J


@declaration
def mamba3_mimo(
    S: State, C: tuple[Key, ...], B: tuple[Key, ...], x: tuple[Value, ...],
    c: tuple[Value, ...], g: Scalar,
) -> tuple[State, Value]:  # fmt: skip
    """Mamba-3's several inputs and outputs (Lahoti et al. 2026): R writes and R reads a token.

    c joins what was read, per channel. Without the trapezoid and the rotation.
    """
    S = exp(g) * S
    for B_i, x_i in zip(B, x, strict=True):
        S = S + outer(B_i, x_i)
    reads = [c_i * (C_i @ S) for c_i, C_i in zip(c, C, strict=True)]
    return S, functools.reduce(operator.add, reads)


@declaration
def titans(
    M: State, S: State, q: Key, k: Key, v: Value, alpha: Scalar, eta: Scalar, theta: Scalar
) -> _Two:
    """Titans' linear memory (Behrouz, Zhong, Mirrokni 2025, eqs. 13 and 14), token by token.

    The surprise S is kept by σ(η), the memory M by 1 − σ(α). The rate θ has to be small: what the
    surprise keeps is learnt again and again.
    """
    S = sigmoid(eta) * S - 2 * theta * outer(k, k @ M - v)
    M = (1 - sigmoid(alpha)) * M + S
    return (M, S), q @ M


@declaration
def ttt(S: State, W: State, q: Key, k: Key, v: Value, first: Scalar, eta: Scalar) -> _Two:
    """TTT-Linear (Sun et al. 2024) without its norm: gradients at W, where the mini-batch began.

    `first` is 1 at the first token of a mini-batch, else 0; 1 throughout is the delta rule, β = 2η.
    """
    W = first * S + (1 - first) * W
    S = S - 2 * eta * outer(k, k @ W - v)
    return (S, W), q @ S


@declaration
def titans_batches(
    M: State, S: State, W: State, q: Key, k: Key, v: Value,
    first: Scalar, alpha: Scalar, eta: Scalar, theta: Scalar,
) -> _Three:  # fmt: skip
    """Titans' linear memory by mini-batches (Behrouz et al. 2025, section 3.2); `first` as in ttt.

    Surprises are gradients at W, the memory when the mini-batch began.
    """
    W = first * M + (1 - first) * W
    S = sigmoid(eta) * S - 2 * theta * outer(k, k @ W - v)
    M = (1 - sigmoid(alpha)) * M + S
    return (M, S, W), q @ M


@declaration
def gsa(A: State, S: State, q: Value, k: Value, v: Value, s: Key, g: Key) -> _Two:
    """Gated slot attention (Zhang et al. 2024): slots keep keys and values, softmax reads them.

    Slots are key channels; the paper writes with s = 1 − exp(g). Scores are bounded by the caller.
    """
    A, S = exp(g) * A + outer(s, k), exp(g) * S + outer(s, v)
    p = exp(A @ q)
    return (A, S), (p / sum_(p)) @ S


@declaration
def abc(A: State, S: State, Z: State, q: Value, k: Value, v: Value, s: Key, e: HeadValue) -> _Three:
    """Attention with bounded memory (Peng et al. 2022): slots are averages with weights exp(s).

    Every column of Z is the sum of the weights, times exp(e): any e will do, as 0. s is bounded by
    the caller.
    """
    w, u = exp(s), exp(e)
    A, S, Z = A + outer(w, k), S + outer(w, v), Z + outer(w, u)
    z = (Z @ u) / dot(u, u)
    p = exp((A @ q) / z)
    return (A, S, Z), (p / sum_(p) / z) @ S


@declaration
def residual_linear_attention(
    S: State, R: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar, gamma: Scalar
) -> _Two:
    """Residual linear attention (Lai et al. 2025): R adds up the clipped errors of S."""
    error = clamp(v - k @ S, -1.0, 1.0)
    before, S, R = q @ S, exp(g) * S, exp(g) * R
    S, R = S + beta * outer(k, v), R + gamma * outer(k, error)
    return (S, R), exp(g) * before + gamma * (q @ R)


def _by_squares(D: Traced, k: Traced, g: Traced, b: Traced, e: Traced) -> tuple[Traced, Traced]:
    """The next D, and the key that is written: k, shrunk where the decayed sum of k² is large."""
    D, u = exp(g) * D + b * outer(k * k, exp(e)), exp(e)
    r = log(abs_(D @ u) / dot(u, u) + 1e-6) + 0.2
    return D, k * exp(-0.4054651081081644 * r / (1 + abs_(r)))


@declaration
def preconditioned_delta(
    D: State, S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar,
    g_sum: Scalar, b_sum: Scalar, e: HeadValue,
) -> _Two:  # fmt: skip
    """Preconditioned gated delta rule (Tumma, Loo, Rus 2026): steps shrink with the sum of k².

    Every column of D is that sum, decayed, times exp(e): any e will do, as 0.
    """
    D, p = _by_squares(D, k, g_sum, b_sum, e)
    S = exp(g) * S
    S = S + beta * outer(p, v - k @ S)
    return (D, S), q @ S


@declaration
def preconditioned_kda(
    D: State, S: State, q: Key, k: Key, v: Value, g: Key, beta: Scalar,
    g_sum: Scalar, b_sum: Scalar, e: HeadValue,
) -> _Two:  # fmt: skip
    """Preconditioned Kimi delta attention (Tumma, Loo, Rus 2026): the same, gates per channel."""
    D, p = _by_squares(D, k, g_sum, b_sum, e)
    S = exp(g) * S
    S = S + beta * outer(p, v - k @ S)
    return (D, S), q @ S


@declaration
def omega(
    S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], g: Scalar, beta: tuple[Scalar, ...]
) -> tuple[State, Value]:
    """The Omega rule (ATLAS, Behrouz et al. 2025): one gradient step for a window of tokens.

    k, v and β are those of the token and of the tokens before it; β is 0 where there are none.
    """
    old, S = S, exp(g) * S
    for k_i, v_i, b_i in zip(k, v, beta, strict=True):
        S = S + b_i * outer(k_i, v_i - k_i @ old)
    return S, q @ S


# every declaration above, in their order
DECLARATIONS = tuple(each for each in list(globals().values()) if isinstance(each, Declaration))
