"""The steps behind the flash-linear-attention names: the library's, with a scaled output.

What is static there (a normalisation, a promised bound of the gate) is an argument here, so that
every variant is traced once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...dsl import library
from ...dsl.functions import dot, exp, l2norm, outer, within
from ...dsl.kinds import Key, KeyState, Scalar, State, Value, annotations_of
from ..recurrence import Recurrence, recurrence


def normalised(
    S: State, z: KeyState, q: Key, k: Key, v: Value, *, scale: float
) -> tuple[tuple[State, KeyState], Value]:
    """Linear attention, the output divided by what the scaled q recalls of the sum of keys."""
    S, z = S + outer(k, v), z + k
    return (S, z), scale * (q @ S) / (scale * dot(q, z) + 1e-10)


def value_gla(S: State, q: Key, k: Key, v: Value, g: Value) -> tuple[State, Value]:
    """Linear attention with a log-decay per value channel."""
    S = exp(g) * S + outer(k, v)
    return S, q @ S


def dplr(S: State, q: Key, k: Key, v: Value, a: Key, b: Key, g: Key) -> tuple[State, Value]:
    """Diagonal plus low rank: `a` reads the undecayed state, `b` is written."""
    S = exp(g) * S + outer(b, a @ S) + outer(k, v)
    return S, q @ S


def iplr(S: State, q: Key, k: Key, v: Value, a: Key, b: Key) -> tuple[State, Value]:
    """Identity plus low rank: `a` reads the state, `b` is written."""
    S = S + outer(b, a @ S) + outer(k, v)
    return S, q @ S


def momentum(
    S: State, M: State, q: Key, k: Key, v: Value, p: Key,
    log_alpha: Scalar, log_mu: Scalar, beta: Scalar, eta: Scalar,
) -> tuple[tuple[State, State], Value]:  # fmt: skip
    """The delta rule with momentum: M averages gradients, so that S moves against it."""
    M, S_old = exp(log_mu) * M + eta * outer(k, p @ S - v), S
    S = exp(log_alpha) * S_old - beta * M
    return (S, M), q @ S


def momentum_decayed(
    S: State, M: State, q: Key, k: Key, v: Value, p: Key,
    log_alpha: Scalar, log_mu: Scalar, beta: Scalar, eta: Scalar,
) -> tuple[tuple[State, State], Value]:  # fmt: skip
    """The same, where p reads the decayed state."""
    return momentum(S, M, q, k, v, exp(log_alpha) * p, log_alpha, log_mu, beta, eta)


def sums_of_squares(D: State, k: Key, one: Value, g: Scalar, b: Scalar) -> tuple[State, Key]:
    """Decayed sums of squares per key channel; V is 1."""
    D = exp(g) * D + b * outer(k * k, one)
    return D, D @ one


def preconditioned_delta(
    S: State, q: Key, k: Key, p: Key, v: Value, g: Scalar, beta: Scalar
) -> tuple[State, Value]:
    """Gated delta rule that writes with p; its gate may be one per key channel."""
    S = exp(g) * S
    S = S + beta * outer(p, v - k @ S)
    return S, q @ S


_OWN = {
    step.__name__: step
    for step in (
        *(normalised, value_gla, dplr, iplr, momentum, momentum_decayed, sums_of_squares),
        preconditioned_delta,
    )
}


_CHANNELS = {"beta": Value, "g": Key}  # of operands that may be Scalars or have channels


def rule(
    name: str, l2: bool = False, bound: float | None = None, wide: tuple[str, ...] = ()
) -> Recurrence:
    """The step `name`, of this file or else of the library, as the peer calls it.

    Its output is multiplied by a run-time float `scale`; `l2`: q, k and p are normalised first;
    `bound`: g is promised to lie between it and 0; `wide`: those of beta, g that have channels.
    """
    found: Recurrence = getattr(_DECLARED, _declare(name, l2, bound, wide))
    return found


class _Declared:
    """The recurrences declared here so far, each an attribute: torch.compile finds them by name."""


_DECLARED = _Declared()


def _declare(name: str, l2: bool, bound: float | None, wide: tuple[str, ...]) -> str:
    """Have a variant declared once; torch.compile does that as it traces, and traces no more."""
    key = f"{name} {l2} {bound} {wide}"
    if not hasattr(_DECLARED, key):
        setattr(_DECLARED, key, recurrence(_variant(name, l2, bound, wide)))
    return key


# the mark is torch.compiler.assume_constant_result's, whose call would import the compiler
_declare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _variant(name: str, l2: bool, bound: float | None, wide: tuple[str, ...]) -> Callable[..., Any]:
    """The step `name` as a function of the same arguments and `scale`, made to be traced."""
    step: Callable[..., Any] = _OWN.get(name) or library.by_name(name).function
    arguments = inspect.signature(step).parameters
    scaled = "scale" in arguments  # by itself

    def variant(*positional: Any, scale: float) -> tuple[Any, Any]:
        x = dict(zip(arguments, positional, strict=False))
        for vectors in ("q", "k", "p") if l2 else ():
            if vectors in x:
                each = x[vectors]
                x[vectors] = tuple(map(l2norm, each)) if isinstance(each, tuple) else l2norm(each)
        if bound is not None:
            x["g"] = within(x["g"], bound, 0.0)
        if scaled:
            state, o = step(**x, scale=scale)
            return state, o
        state, o = step(**x)
        return state, scale * o

    scale = inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY)
    variant.__name__, variant.__doc__ = f"fla_{name}", step.__doc__
    kinds = {**annotations_of(step), "scale": float}
    kinds |= {n: _CHANNELS[n] for n in wide if kinds[n] == Scalar}
    variant.__annotations__ = kinds
    own = [p.replace(annotation=kinds[n]) for n, p in arguments.items() if n != "scale"]
    variant.__signature__ = inspect.Signature([*own, scale])  # type: ignore[attr-defined]
    return variant
