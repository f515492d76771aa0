"""Writes artifacts atomically, one writer at a time, merged into the file that exists.

`runtime.tuned.artifact` defines the schema.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ..dsl import errors
from ..runtime.cache import locked, own_folder, set_aside, write_atomically
from ..runtime.engines import EngineName
from ..runtime.tuned.artifact import Artifact, Versions, merged, to_text
from ..runtime.tuned.machine import assembler, driver, version
from ..runtime.tuned.selection import read

_BACKENDS = {EngineName.TRITON: "triton", EngineName.TVM: "apache-tvm"}


def save(artifact: Artifact, folder: Path | None = None) -> Path:
    """Merge `artifact` into its key's file below `folder` (the user's own); returns the path.

    A damaged file is set aside under the suffix `.damaged`, with a warning, and written anew.

    Raises:
        BadCache: the file cannot be written.
    """
    path = (own_folder("artifacts") if folder is None else folder) / artifact.key.path
    try:
        if folder is None:
            own_folder("artifacts", path.parent.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            known = _known(path)
            write_atomically(path, to_text(artifact if known is None else merged(known, artifact)))
    except errors.BadCache:
        raise
    except OSError as why:
        raise errors.BadCache(str(path.parent), str(why)) from None
    return path


def _known(path: Path) -> Artifact | None:
    if not path.exists():
        return None
    try:
        return read(path)
    except errors.BadArtifact as why:
        aside = set_aside(path)
        warnings.warn(f"{why.render()}\nset aside as {aside}", RuntimeWarning, stacklevel=3)
        return None


def versions_here(engine: EngineName) -> Versions:
    """The versions of the software that compiles and runs kernels of `engine` here."""
    package = _BACKENDS.get(engine)
    on_gpu = engine is EngineName.TRITON
    return Versions(
        chunkwise=version("chunkwise") or "not installed",
        torch=torch.__version__,
        backend=None if package is None else f"{package} {version(package)}",
        assembler=assembler() if on_gpu else None,
        driver=driver() if on_gpu else None,
    )
