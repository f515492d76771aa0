"""The surface types: the annotations that a parameter of a step may have."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from .ir import Kind, Per
from .traced import Traced


@dataclass(frozen=True, slots=True)
class KindAnnotation:
    """The meaning of an annotation: the kind of the value and how often it changes."""

    name: str
    kind: Kind
    per: Per
    micro: bool = False


Key = Annotated[Traced, KindAnnotation("Key", Kind.KEY, Per.TOKEN)]
"""K channels per token: a query, a key, a gate per key channel.

The tensor of the call is `[B,T,H,K]`, or `[B,T,HV,K]` where it belongs to the value heads (HV is a
multiple of H, and value head j uses key head j // (HV/H)).
"""
Value = Annotated[Traced, KindAnnotation("Value", Kind.VALUE, Per.TOKEN)]
"""V channels per token: what is written and read. The tensor of the call is `[B,T,HV,V]`."""
Scalar = Annotated[Traced, KindAnnotation("Scalar", Kind.SCALAR, Per.TOKEN)]
"""One number per head and token: a gate, a step size. The tensor of the call is `[B,T,HV]`."""
HeadScalar = Annotated[Traced, KindAnnotation("HeadScalar", Kind.SCALAR, Per.HEAD)]
"""One number per head, for all tokens: a parameter. The tensor of the call is `[HV]`."""
HeadKey = Annotated[Traced, KindAnnotation("HeadKey", Kind.KEY, Per.HEAD)]
"""K channels per head, for all tokens: a parameter. The tensor of the call is `[HV,K]`."""
HeadValue = Annotated[Traced, KindAnnotation("HeadValue", Kind.VALUE, Per.HEAD)]
"""V channels per head, for all tokens: a parameter. The tensor of the call is `[HV,V]`."""
State = Annotated[Traced, KindAnnotation("State", Kind.STATE, Per.TOKEN)]
"""The matrix that is carried from token to token: K×V per sequence and head, in float32.

The initial and the final state of a call are `[N,HV,K,V]`; N is B, or the number of packed
sequences.
"""
KeyState = Annotated[Traced, KindAnnotation("KeyState", Kind.KEY_STATE, Per.TOKEN)]
"""A vector of K channels that is carried from token to token: a sum of keys, a normaliser.

The initial and the final state of a call are `[N,HV,K]`, in float32.
"""

_ALIASES = {n: x for n, x in list(globals().items()) if typing.get_origin(x) is Annotated}


def _document() -> None:
    """Gives each kind the string below it as `__doc__`, which `help(Key)` shows; editors read it.

    A module without its source keeps undocumented kinds.
    """
    try:
        body = ast.parse(inspect.getsource(sys.modules[__name__])).body
    except OSError:
        return
    for assignment, below in itertools.pairwise(body):
        if isinstance(assignment, ast.Assign) and isinstance(below, ast.Expr):
            (target,) = assignment.targets
            kind = _ALIASES.get(ast.unparse(target))
            if kind is not None:
                kind.__doc__ = inspect.cleandoc(ast.literal_eval(below.value))


_document()


def annotation_of(kind: Kind, per: Per) -> object:
    """The annotation of a kind, the inverse of `kind_annotation`."""
    known = ((x, kind_annotation(x)) for x in _ALIASES.values())
    return next(x for x, k in known if k is not None and (k.kind, k.per) == (kind, per))


def kind_annotation(annotation: object) -> KindAnnotation | None:
    """The kind that a type hint states; `tuple[Key, ...]` is a Key per micro-step."""
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)
        found = kind_annotation(inner[0]) if len(inner) == 2 and inner[1] is Ellipsis else None
        if found is None or found.micro or found.kind.is_state or found.per is Per.HEAD:
            return None
        return KindAnnotation(f"tuple[{found.name}, ...]", found.kind, found.per, micro=True)
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, KindAnnotation):
            return extra
    return None


def annotations_of(function: Callable[..., object]) -> dict[str, object]:
    """The parameters' annotations, strings resolved in the function's own scope."""
    if not isinstance(function, types.FunctionType):
        return dict(getattr(function, "__annotations__", {}))
    local: dict[str, object] = dict(_ALIASES)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            local[name] = cell.cell_contents
        except ValueError:  # a name that is bound later, such as the function itself
            continue
    # a global of that name wins over the aliases: get_type_hints looks at locals first
    for name in _ALIASES:
        if name in function.__globals__:
            local[name] = function.__globals__[name]
    holder = types.SimpleNamespace(
        __annotations__={n: a for n, a in function.__annotations__.items() if n != "return"}
    )
    return typing.get_type_hints(holder, function.__globals__, local, include_extras=True)
