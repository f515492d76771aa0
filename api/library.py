"""The recurrences of the literature as ops: `library.gated_delta_rule(q, k, v, g, beta)`."""

from __future__ import annotations

from functools import cache

from .dsl import library as declarations
from .dsl.declaration import Declaration
from .runtime.recurrence import Recurrence


def names() -> tuple[str, ...]:
    """The names of the library's recurrences, in the order of `dsl/library.py`."""
    return tuple(x.name for x in declarations.all_declarations())


def __getattr__(name: str) -> Recurrence:
    if isinstance(vars(declarations).get(name), Declaration):
        return _op(name)
    raise AttributeError(
        f"chunkwise.library has no recurrence {name!r}; it has {', '.join(names())}"
    )


def __dir__() -> list[str]:
    return ["names", *names()]


@cache
def _op(name: str) -> Recurrence:
    declared = vars(declarations)[name]
    assert isinstance(declared, Declaration)
    op = Recurrence(declared)
    op.__module__ = __name__  # pickle finds the op by this name
    return op
