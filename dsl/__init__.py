"""The language: declare one step of a recurrence, trace it, normalise it, classify it."""

if __name__ == "dsl":  # a second copy of every class would make `isinstance` lie
    raise ImportError("import chunkwise.dsl, not dsl: the top folders are parts of one package")

from . import functions
from .declaration import Declaration, declaration
from .functions import *  # noqa: F403
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
    "declaration",
    "normalise",
    "trace",
]
__all__ += functions.__all__
