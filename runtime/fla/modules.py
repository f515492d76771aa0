"""The functions under the names of flash-linear-attention's modules, and in place of that library.

A function lies where it lies there: `chunk_kda` in `ops`, `ops.kda` and `ops.kda.chunk`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ...dsl import errors

_KINDS = ("chunk", "fused_chunk", "fused_recurrent")
# families whose name is not that of their functions
_FAMILIES = {
    "gdn": "gated_delta_rule",
    "dplr_delta_rule": "generalized_delta_rule",
    "iplr_delta_rule": "generalized_delta_rule",
}
_PEER = "fla"


def modules(
    root: str, functions: Mapping[str, Callable[..., Any]], doc: str
) -> dict[str, ModuleType]:
    """Modules by name: `root.ops`, one for each family, and one for each kind of function there."""
    made: dict[str, ModuleType] = {}

    def put(path: str, name: str) -> None:
        if path not in made:
            module = made[path] = ModuleType(path, f"{doc} {path.removeprefix(f'{root}.')}.")
            module.__spec__ = ModuleSpec(path, None, is_package=True)
            module.__path__ = []  # what is not here is not found, and said so
            parent, _, own = path.rpartition(".")
            if parent in made:
                setattr(made[parent], own, module)
        setattr(made[path], name, functions[name])

    for name in functions:
        # the longest kind first: fused_chunk_x is no x of kind fused
        kind = next(k for k in sorted(_KINDS, key=len, reverse=True) if name.startswith(f"{k}_"))
        rest = name.removeprefix(f"{kind}_")
        family = f"{root}.ops.{_FAMILIES.get(rest, rest)}"
        for path in (f"{root}.ops", family, f"{family}.{kind}"):
            put(path, name)
    return made


def install(functions: Mapping[str, Callable[..., Any]]) -> list[str]:
    """See `chunkwise.fla.install`."""
    loaded = sys.modules.get(_PEER)
    if loaded is not None and not hasattr(loaded, "__chunkwise__"):
        raise errors.PackageUnavailable(
            "fla",
            "flash-linear-attention is imported, and who has its functions would keep them",
            help="call chunkwise.fla.install() before anything imports fla",
        )
    root = ModuleType(_PEER, "Functions of chunkwise under the names of flash-linear-attention.")
    root.__spec__ = ModuleSpec(_PEER, None, is_package=True)
    root.__path__ = []
    found = modules(_PEER, functions, "Functions of chunkwise, as in")
    vars(root).update(__chunkwise__=True, ops=found[f"{_PEER}.ops"])
    sys.modules.update({_PEER: root, **found})
    return sorted({_PEER: root, **found})


def uninstall() -> None:
    """See `chunkwise.fla.uninstall`."""
    if hasattr(sys.modules.get(_PEER), "__chunkwise__"):
        for name in [n for n in sys.modules if n == _PEER or n.startswith(f"{_PEER}.")]:
            del sys.modules[name]
