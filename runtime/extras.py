"""How to install what an extra of the package brings: by names that an index has."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

# without the package's metadata (a source tree on a path), the packages are named alone
_NAMES = {
    "tvm": ("apache-tvm",),
    "plot": ("matplotlib",),
    "train": ("safetensors", "tokenizers"),
    "hf": ("transformers",),
}


@cache
def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra: `pip install apache-tvm==…`."""
    return "pip install " + " ".join(f'"{r}"' for r in requirements(extra))


def requirements(extra: str) -> tuple[str, ...]:
    """The requirements of an extra, as this package's metadata states them."""
    try:
        stated = metadata.requires("chunkwise") or []
    except metadata.PackageNotFoundError:
        stated = []
    found = [
        requirement.strip()
        for requirement, _, marker in (line.partition(";") for line in stated)
        if re.search(rf"extra == ['\"]{extra}['\"]", marker)
    ]
    return tuple(found) or _NAMES[extra]
