"""Declare one step of a linear-attention recurrence; get a differentiable chunkwise op.

Names that Python has as well (`sum`, `abs`) are `chunkwise.sum` and `chunkwise.abs`: a star import
leaves Python's own in place.
"""

from __future__ import annotations

from . import interrupts as interrupts  # first, since the others import torch

# isort: split
from . import errors, fla, library, nn
from .dsl import functions as _functions
from .dsl.diagnostic import did_you_mean
from .dsl.functions import *  # noqa: F403
from .dsl.functions import abs as abs
from .dsl.functions import sum as sum
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
    "errors",
    "fla",
    "library",
    "nn",
    "recurrence",
]
__all__ += _functions.__all__
__all__.remove("abs")  # Python's own stay what they are under `from chunkwise import *`
__all__.remove("sum")


def __getattr__(name: str) -> str:
    if name == "__version__":  # looked up when asked for: a source tree on a path has none
        from importlib.metadata import version

        return version("chunkwise")
    near = did_you_mean(name, (*__all__, *_functions.__all__, *library.names()))
    if not near and not name.startswith("_"):
        near = f"functions of a step are {', '.join(_functions.__all__)}"
    text = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(f"{text}; {near}" if near else text)
