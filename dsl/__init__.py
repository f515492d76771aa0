"""The language: declare one step of a recurrence, trace it, normalise it, classify it."""

if __name__ == "dsl":  # a second copy of every class would make `isinstance` lie
    raise ImportError("import chunkwise.dsl, not dsl: the top folders are parts of one package")

from .declaration import Declaration, declaration
from .functions import (
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
from .kinds import HeadKey, HeadScalar, HeadValue, Key, KeyState, Scalar, State, Value
from .normalise import normalise
from .step import Step
from .trace import trace

__all__ = [
    "Declaration",
    "HeadKey",
    "HeadScalar",
    "HeadValue",
    "Key",
    "KeyState",
    "Scalar",
    "State",
    "Step",
    "Value",
    "abs",
    "clamp",
    "declaration",
    "dot",
    "exp",
    "expm1",
    "l2norm",
    "log",
    "log1p",
    "log2",
    "logsigmoid",
    "maximum",
    "minimum",
    "normalise",
    "outer",
    "relu",
    "rsqrt",
    "sigmoid",
    "silu",
    "softplus",
    "sqrt",
    "sum",
    "tanh",
    "trace",
    "within",
]
