"""The recurrences of the literature, each declared in a few lines; the gates are log-decays ≤ 0."""

from __future__ import annotations

from . import errors, library_states
from .declaration import Declaration, declaration
from .functions import abs as abs_
from .functions import dot, exp, maximum, outer, sigmoid, softplus, within
from .kinds import HeadKey, HeadScalar, HeadValue, Key, KeyState, Scalar, State, Value


@declaration
def linear_attention(S: State, q: Key, k: Key, v: Value) -> tuple[State, Value]:
    """Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020), without the normaliser."""
    S = S + outer(k, v)
    return S, q @ S


@declaration
def linear_attention_normalised(
    S: State, z: KeyState, q: Key, k: Key, v: Value, *, eps: float = 1e-10
) -> tuple[tuple[State, KeyState], Value]:
    """Linear attention with its normaliser (Katharopoulos, Vyas, Pappas, Fleuret 2020)."""
    S, z = S + outer(k, v), z + k
    return (S, z), (q @ S) / (dot(q, z) + eps)


@declaration
def retention(S: State, q: Key, k: Key, v: Value, g: HeadScalar) -> tuple[State, Value]:
    """Retention (Sun et al. 2023): g = log γ_h, with γ_h = 1 − 2^(−5−h) for head h."""
    S = exp(g) * S + outer(k, v)
    return S, q @ S


@declaration
def lightning_attention(
    S: State, q: Key, k: Key, v: Value, slope: HeadScalar
) -> tuple[State, Value]:
    """Lightning attention (Qin et al. 2024): the slope s ≥ 0 depends on layer and head."""
    S = exp(-slope) * S + outer(k, v)
    return S, q @ S


@declaration
def simple_gla(S: State, q: Key, k: Key, v: Value, g: Scalar) -> tuple[State, Value]:
    """Linear attention with a scalar gate (Dao, Gu 2024; Yang et al. 2024)."""
    S = exp(g) * S + outer(k, v)
    return S, q @ S


@declaration
def mamba2(
    S: State,
    C: Key,
    B: Key,
    x: Value,
    dt: Scalar,
    A_log: HeadScalar,
    dt_bias: HeadScalar,
    D: HeadScalar,
) -> tuple[State, Value]:
    """Mamba-2 (Dao, Gu 2024): step size, decay and skip connection within the op."""
    step = softplus(dt + dt_bias)
    S = exp(-exp(A_log) * step) * S + outer(B, step * x)
    return S, C @ S + D * x


@declaration
def gla(S: State, q: Key, k: Key, v: Value, g: Key) -> tuple[State, Value]:
    """Gated linear attention (Yang, Wang, Shen, Panda, Kim 2024)."""
    S = exp(g) * S + outer(k, v)
    return S, q @ S


@declaration
def hgrn2(S: State, q: Key, f: Key, v: Value) -> tuple[State, Value]:
    """HGRN2 (Qin et al. 2024): the forget gate f in (0, 1) also makes the key 1 − f."""
    f = within(f, 0.0, 1.0)
    S = f * S + outer(1 - f, v)
    return S, q @ S


@declaration
def hgrn(S: State, one: Key, x: Value, g: Value) -> tuple[State, Value]:
    """HGRN (Qin, Yang, Zhong 2023): no keys, one state per channel; `one` is 1, and K is 1.

    HGRN has x = (1 − f) c, minGRU z h, the RG-LRU √(1 − a²) i x; g is log f, log(1 − z), log a.
    """
    S = exp(g) * S + outer(one, x)
    return S, one @ S


@declaration
def rwkv4(
    A: State, Z: State, one: Key, k: Value, v: Value, w: HeadValue, u: HeadValue
) -> tuple[tuple[State, State], Value]:
    """RWKV-4 (Peng et al. 2023): weights exp(k) per channel, bounded by the caller; K is 1.

    Channels decay by exp(−exp(w)); the token itself counts with the bonus u.
    """
    now = exp(u + k)
    o = (one @ A + now * v) / (one @ Z + now)
    A = exp(-exp(w)) * A + outer(one, exp(k) * v)
    Z = exp(-exp(w)) * Z + outer(one, exp(k))
    return (A, Z), o


@declaration
def rwkv6(S: State, q: Key, k: Key, v: Value, w: Key, u: HeadKey) -> tuple[State, Value]:
    """RWKV-6 (Peng et al. 2024): reads before the update; the bonus u never enters the state."""
    o = q @ (S + outer(u * k, v))
    S = exp(w) * S + outer(k, v)
    return S, o


@declaration
def rwkv7(S: State, r: Key, w: Key, k: Key, v: Value, k_hat: Key, a: Key) -> tuple[State, Value]:
    """RWKV-7 (Peng et al. 2025): log-decay −e^(−1/2) σ(w); reads with k_hat, erases at a∘k_hat."""
    S = exp(-0.6065306597126334 * sigmoid(w)) * S - outer(a * k_hat, k_hat @ S) + outer(k, v)
    return S, r @ S


@declaration
def mlstm(
    S: State, n: KeyState, q: Key, k: Key, v: Value, f: Scalar, i: Scalar
) -> tuple[tuple[State, KeyState], Value]:
    """mLSTM (Beck et al. 2024), f and i in log space, i bounded by the caller (no running max)."""
    decay, gain = exp(f), exp(i)
    S = decay * S + gain * outer(k, v)
    n = decay * n + gain * k
    return (S, n), (q @ S) / maximum(abs_(dot(q, n)), 1.0)


@declaration
def delta_rule(S: State, q: Key, k: Key, v: Value, beta: Scalar) -> tuple[State, Value]:
    """The delta rule (Schlag, Irie, Schmidhuber 2021); k is normalised by the caller, β ≤ 2.

    TTT-Linear (Sun et al. 2024) of one token a mini-batch, without its norm, has β = 2η.
    """
    S = S + beta * outer(k, v - k @ S)
    return S, q @ S


@declaration
def gated_delta_rule(
    S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar
) -> tuple[State, Value]:
    """Gated delta rule (Yang, Kautz, Hatamizadeh 2024)."""
    S = exp(g) * S
    S = S + beta * outer(k, v - k @ S)
    return S, q @ S


@declaration
def kda(S: State, q: Key, k: Key, v: Value, g: Key, beta: Scalar) -> tuple[State, Value]:
    """Kimi delta attention (Kimi Team 2025): the delta rule with a gate per key channel."""
    S = exp(g) * S
    S = S + beta * outer(k, v - k @ S)
    return S, q @ S


@declaration
def comba(
    S: State, q: Key, k: Key, v: Value, p: Key, g: Scalar, beta: Scalar
) -> tuple[State, Value]:
    """Comba (Hu et al. 2025): what is erased is read with p from the *undecayed* state."""
    S = exp(g) * S - beta * outer(k, p @ S) + beta * outer(k, v)
    return S, q @ S


@declaration
def dplr(S: State, q: Key, k: Key, v: Value, a: Key, b: Key, g: Key) -> tuple[State, Value]:
    """Diagonal plus low rank (Peng et al. 2025): a is written, b reads the undecayed state.

    flash-linear-attention swaps the names a and b.
    """
    S = exp(g) * S + outer(a, b @ S) + outer(k, v)
    return S, q @ S


@declaration
def delta_product(
    S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...], beta: tuple[Scalar, ...]
) -> tuple[State, Value]:
    """DeltaProduct (Siems et al. 2025): n delta steps per token, one read."""
    for k_i, v_i, b_i in zip(k, v, beta, strict=True):
        S = S + b_i * outer(k_i, v_i - k_i @ S)
    return S, q @ S


@declaration
def gated_delta_product(
    S: State,
    q: Key,
    k: tuple[Key, ...],
    v: tuple[Value, ...],
    g: Scalar,
    beta: tuple[Scalar, ...],
) -> tuple[State, Value]:
    """Gated DeltaProduct (Siems et al. 2025): one decay, then n delta steps."""
    S = exp(g) * S
    for k_i, v_i, b_i in zip(k, v, beta, strict=True):
        S = S + b_i * outer(k_i, v_i - k_i @ S)
    return S, q @ S


@declaration
def gdn2(S: State, q: Key, k: Key, v: Value, g: Key, b: Key, w: Value) -> tuple[State, Value]:
    """Gated DeltaNet-2 (Hatamizadeh, Choi, Kautz 2026): erase per key, write per value channel."""
    S = exp(g) * S
    S = S - outer(k, (b * k) @ S) + outer(k, w * v)
    return S, q @ S


@declaration
def oja(S: State, q: Key, k: Key, v: Value, g: Value, beta: Scalar) -> tuple[State, Value]:
    """Gated Oja's rule (Oja 1982; Irie, Schlag, Csordás, Schmidhuber 2022): keys are corrected."""
    S = S * exp(g)
    S = S + outer(k - S @ v, beta * v)
    return S, q @ S


@declaration
def longhorn(S: State, q: Key, k: Key, v: Value, beta: Scalar) -> tuple[State, Value]:
    """Longhorn (Liu et al. 2024): the step size of the implicit online-learning update."""
    step = beta / (1 + beta * dot(k, k))
    S = S + step * outer(k, v - k @ S)
    return S, q @ S


@declaration
def longhorn_channels(S: State, q: Key, k: Key, v: Value, beta: Value) -> tuple[State, Value]:
    """Longhorn (Liu et al. 2024) with a step size σ(β) per value channel, without its diagonal."""
    beta = sigmoid(beta)
    S = S + outer(k, beta / (1 + beta * dot(k, k)) * (v - k @ S))
    return S, q @ S


@declaration
def momentum_delta(
    S: State, M: State, q: Key, k: Key, v: Value, p: Key,
    log_alpha: Scalar, log_mu: Scalar, beta: Scalar, eta: Scalar,
) -> tuple[tuple[State, State], Value]:  # fmt: skip
    """The delta rule with momentum (Polyak 1964): M averages corrections v − pᵀS and moves S.

    MomentumDeltaNet (ICML 2026) has p = exp(log_alpha) k and −M; titans has p = k and β = 1.
    """
    M, S_old = exp(log_mu) * M + eta * outer(k, v - p @ S), S
    S = exp(log_alpha) * S_old + beta * M
    return (S, M), q @ S


@declaration
def gated_lms(S: State, q: Key, k: Key, v: Value, beta: Scalar) -> tuple[State, Value]:
    """Least mean squares (Widrow, Hoff 1960), β the step size: one neuron per value channel."""
    S = S + beta * outer(k, v - k @ S)
    return S, q @ S


# every declaration above, simplest first, then those with several states or recalls
_ALL = {name: each for name, each in globals().items() if isinstance(each, Declaration)}
_ALL |= {each.name: each for each in library_states.DECLARATIONS}


def all_declarations() -> tuple[Declaration, ...]:
    """Every recurrence of the library, simplest first."""
    return tuple(_ALL.values())


def by_name(name: str) -> Declaration:
    """The recurrence of that name. Raises UnknownRecurrence, with the names there are."""
    if name not in _ALL:
        raise errors.UnknownRecurrence(name, list(_ALL))
    return _ALL[name]
