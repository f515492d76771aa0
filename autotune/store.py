"""Writing artifacts: whole or not at all, one writer at a time, nobody's buckets lost."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..dsl import errors
from ..runtime.artifact import Artifact, merged, to_text
from ..runtime.cache import locked, own_folder, set_aside, write_atomically
from ..runtime.selection import read


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
