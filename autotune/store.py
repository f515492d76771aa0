"""Writing artifacts: whole or not at all, one writer at a time, nobody's buckets lost.

The schema: `runtime.tuned.artifact`.
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
    """Merge `artifact` into the file of its key below `folder` (the user's own); returns its path.

    A damaged file is set aside under the suffix `.damaged`, with a warning, and written anew.

    Raises:
        BadCache: it cannot be written there.
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
    """What compiles and runs the kernels of `engine` on this machine."""
    package = _BACKENDS.get(engine)
    on_gpu = engine is EngineName.TRITON
    return Versions(
        chunkwise=version("chunkwise") or "not installed",
        torch=torch.__version__,
        backend=None if package is None else f"{package} {version(package)}",
        assembler=assembler() if on_gpu else None,
        driver=driver() if on_gpu else None,
    )
