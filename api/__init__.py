"""Declare one step of a linear-attention recurrence; get a differentiable chunkwise op."""

from __future__ import annotations

from . import fla, library, nn
from .dsl import errors
from .dsl.functions import (
    abs,
    clamp,
    dot,
    exp,
    expm1,
    l2norm,
    log,
    log1p,
    log2,
    logsigmoid,
    maximum,
    minimum,
    outer,
    relu,
    rsqrt,
    sigmoid,
    silu,
    softplus,
    sqrt,
    sum,
    tanh,
    within,
)
from .dsl.kinds import HeadKey, HeadScalar, HeadValue, Key, KeyState, Scalar, State, Value
from .runtime.engines import EngineName
from .runtime.recurrence import Recurrence, recurrence

__all__ = [
    "EngineName",
    "HeadKey",
    "HeadScalar",
    "HeadValue",
    "Key",
    "KeyState",
    "Recurrence",
    "Scalar",
    "State",
    "Value",
    "abs",
    "clamp",
    "dot",
    "errors",
    "exp",
    "expm1",
    "fla",
    "l2norm",
    "library",
    "log",
    "log1p",
    "log2",
    "logsigmoid",
    "maximum",
    "minimum",
    "nn",
    "outer",
    "recurrence",
    "relu",
    "rsqrt",
    "sigmoid",
    "silu",
    "softplus",
    "sqrt",
    "sum",
    "tanh",
    "within",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when asked for: a source tree on a path has none
        from importlib.metadata import version

        return version("chunkwise")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
