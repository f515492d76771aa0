"""The steps behind the flash-linear-attention names: as that library defines them, scale included.

Each function returns one declared recurrence; what is static there (a normalisation, a promised
bound of the gate) is an argument here, so that every variant is traced once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from ...dsl.functions import dot, exp, l2norm, outer, within
from ...dsl.kinds import HeadKey, HeadScalar, Key, KeyState, Scalar, State, Value
from ..recurrence import Recurrence, recurrence

_P = ParamSpec("_P")


class _Variants:
    """The recurrences declared here so far, each an attribute: torch.compile finds them by name."""


_VARIANTS = _Variants()


def _once(declare: Callable[_P, Recurrence]) -> Callable[_P, Recurrence]:
    """Have each variant declared once; torch.compile does that as it traces, and traces no more."""

    def name_of(*args: _P.args, **kwargs: _P.kwargs) -> str:
        name = f"{declare.__name__}{args}{sorted(kwargs.items())}"
        if not hasattr(_VARIANTS, name):
            setattr(_VARIANTS, name, declare(*args, **kwargs))
        return name

    # the mark is torch.compiler.assume_constant_result's, whose call would import the compiler
    name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(declare)
    def variant(*args: _P.args, **kwargs: _P.kwargs) -> Recurrence:
        found: Recurrence = getattr(_VARIANTS, name_of(*args, **kwargs))
        return found

    return variant


@_once
def linear() -> Recurrence:
    """No decay."""

    def fla_linear(S: State, q: Key, k: Key, v: Value, *, scale: float) -> tuple[State, Value]:
        S = S + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_linear)


@_once
def linear_normalised() -> Recurrence:
    """No decay; the output divided by what q recalls of the sum of keys."""

    def fla_linear_normalised(
        S: State, z: KeyState, q: Key, k: Key, v: Value, *, scale: float
    ) -> tuple[tuple[State, KeyState], Value]:
        S, z = S + outer(k, v), z + k
        return (S, z), scale * (q @ S) / (scale * dot(q, z) + 1e-10)

    return recurrence(fla_linear_normalised)


@_once
def head_decay() -> Recurrence:
    """A fixed log-decay per head (retention, lightning attention, `g_gamma`)."""

    def fla_head_decay(
        S: State, q: Key, k: Key, v: Value, g: HeadScalar, *, scale: float
    ) -> tuple[State, Value]:
        S = exp(g) * S + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_head_decay)


@_once
def scalar_decay() -> Recurrence:
    """A log-decay per token and head."""

    def fla_scalar_decay(
        S: State, q: Key, k: Key, v: Value, g: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        S = exp(g) * S + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_scalar_decay)


@_once
def key_decay() -> Recurrence:
    """A log-decay per token and key channel."""

    def fla_key_decay(
        S: State, q: Key, k: Key, v: Value, g: Key, *, scale: float
    ) -> tuple[State, Value]:
        S = exp(g) * S + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_key_decay)


@_once
def value_decay() -> Recurrence:
    """A log-decay per token and value channel."""

    def fla_value_decay(
        S: State, q: Key, k: Key, v: Value, g: Value, *, scale: float
    ) -> tuple[State, Value]:
        S = exp(g) * S + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_value_decay)


@_once
def bonus() -> Recurrence:
    """The read before the update, with a bonus for the current token (RWKV-6)."""

    def fla_bonus(
        S: State, q: Key, k: Key, v: Value, w: Key, u: HeadKey, *, scale: float
    ) -> tuple[State, Value]:
        o = scale * (q @ (S + outer(u * k, v)))
        S = exp(w) * S + outer(k, v)
        return S, o

    return recurrence(fla_bonus)


@_once
def delta(normalised: bool) -> Recurrence:
    """The delta rule."""

    def fla_delta(
        S: State, q: Key, k: Key, v: Value, beta: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), l2norm(k)
        S = S + beta * outer(k, v - k @ S)
        return S, scale * (q @ S)

    return recurrence(fla_delta)


@_once
def scalar_gated_delta(normalised: bool) -> Recurrence:
    """Decay by a scalar, then the delta rule."""

    def fla_scalar_gated_delta(
        S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), l2norm(k)
        S = exp(g) * S
        S = S + beta * outer(k, v - k @ S)
        return S, scale * (q @ S)

    return recurrence(fla_scalar_gated_delta)


@_once
def key_gated_delta(normalised: bool, bound: float | None) -> Recurrence:
    """Decay per key channel, then the delta rule. `bound`: what the caller promises of the gate."""

    def fla_key_gated_delta(
        S: State, q: Key, k: Key, v: Value, g: Key, beta: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), l2norm(k)
        S = exp(g if bound is None else within(g, bound, 0.0)) * S
        S = S + beta * outer(k, v - k @ S)
        return S, scale * (q @ S)

    return recurrence(fla_key_gated_delta)


@_once
def value_gated_delta(normalised: bool) -> Recurrence:
    """Decay per value channel, then the delta rule."""

    def fla_value_gated_delta(
        S: State, q: Key, k: Key, v: Value, g: Value, beta: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), l2norm(k)
        S = exp(g) * S
        S = S + beta * outer(k, v - k @ S)
        return S, scale * (q @ S)

    return recurrence(fla_value_gated_delta)


@_once
def comba(normalised: bool) -> Recurrence:
    """The erasure reads the state before its decay, along p."""

    def fla_comba(
        S: State, q: Key, k: Key, v: Value, p: Key, g: Scalar, beta: Scalar, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k, p = l2norm(q), l2norm(k), l2norm(p)
        S = exp(g) * S + beta * outer(k, v - p @ S)
        return S, scale * (q @ S)

    return recurrence(fla_comba)


@_once
def low_rank(bound: float | None) -> Recurrence:
    """Diagonal plus low rank: `a` reads the undecayed state, `b` writes what was read."""

    def fla_low_rank(
        S: State, q: Key, k: Key, v: Value, a: Key, b: Key, g: Key, *, scale: float
    ) -> tuple[State, Value]:
        decay = exp(g if bound is None else within(g, bound, 0.0))
        S = decay * S + outer(b, a @ S) + outer(k, v)
        return S, scale * (q @ S)

    return recurrence(fla_low_rank)


@_once
def erase_write(normalised: bool, bound: float | None) -> Recurrence:
    """Decay per key channel, erasure along b∘k, write of w∘v (GDN-2)."""

    def fla_erase_write(
        S: State, q: Key, k: Key, v: Value, g: Key, b: Key, w: Value, *, scale: float
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), l2norm(k)
        S = exp(g if bound is None else within(g, bound, 0.0)) * S
        S = S + outer(k, w * v - (b * k) @ S)
        return S, scale * (q @ S)

    return recurrence(fla_erase_write)


@_once
def gated_product(normalised: bool, gated: bool) -> Recurrence:
    """Several delta steps per token, behind at most one decay."""

    def fla_gated_product(
        S: State,
        q: Key,
        k: tuple[Key, ...],
        v: tuple[Value, ...],
        g: Scalar,
        beta: tuple[Scalar, ...],
        *,
        scale: float,
    ) -> tuple[State, Value]:
        return _product(exp(g) * S, q, k, v, beta, scale)

    def fla_product(
        S: State,
        q: Key,
        k: tuple[Key, ...],
        v: tuple[Value, ...],
        beta: tuple[Scalar, ...],
        *,
        scale: float,
    ) -> tuple[State, Value]:
        return _product(S, q, k, v, beta, scale)

    def _product(
        S: State,
        q: Key,
        k: tuple[Key, ...],
        v: tuple[Value, ...],
        beta: tuple[Scalar, ...],
        scale: float,
    ) -> tuple[State, Value]:
        if normalised:
            q, k = l2norm(q), tuple(l2norm(x) for x in k)
        for k_i, v_i, beta_i in zip(k, v, beta, strict=True):
            S = S + beta_i * outer(k_i, v_i - k_i @ S)
        return S, scale * (q @ S)

    return recurrence(fla_gated_product if gated else fla_product)
