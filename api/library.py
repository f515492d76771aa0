"""The recurrences of the literature as ops: `library.gated_delta_rule(q, k, v, g, beta)`."""

from __future__ import annotations

from .dsl import library as declarations
from .dsl.diagnostic import did_you_mean
from .runtime.recurrence import Recurrence


def names() -> tuple[str, ...]:
    """The names of the library's recurrences.

    Returns:
        The names, simplest first: attributes of this module.
    """
    return tuple(_OPS)


def __getattr__(name: str) -> Recurrence:
    op = _OPS.get(name)
    if op is None:
        near = did_you_mean(name, names()) or f"it has {', '.join(names())}"
        raise AttributeError(f"chunkwise.library has no recurrence {name!r}; {near}")
    return op


def __dir__() -> list[str]:
    return ["names", *names()]


# made when chunkwise is imported, so that programs saved by torch.export find their ops
_OPS = {d.name: Recurrence(d) for d in declarations.all_declarations()}
for _op in _OPS.values():
    _op.__module__ = __name__  # pickle finds the op by this name
