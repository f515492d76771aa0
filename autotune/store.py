"""Writing artifacts: whole or not at all, one writer at a time, nobody's buckets lost."""

from __future__ import annotations

import warnings
from pathlib import Path

from filelock import FileLock

from ..dsl import errors
from ..runtime.artifact import Artifact, merged, to_text
from ..runtime.cache import cache_folder, write_atomically
from ..runtime.selection import read


def save(artifact: Artifact, folder: Path | None = None) -> Path:
    """Merge `artifact` into the file of its key below `folder` (the user's own); returns its path.

    A damaged file is set aside under the suffix `.damaged`, with a warning, and written anew.
    """
    path = (cache_folder() / "artifacts" if folder is None else folder) / artifact.key.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _known(path)
        write_atomically(path, to_text(artifact if known is None else merged(known, artifact)))
    return path


def _known(path: Path) -> Artifact | None:
    if not path.exists():
        return None
    try:
        return read(path)
    except errors.BadArtifact as why:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        warnings.warn(f"{why.render()}\nset aside as {aside}", RuntimeWarning, stacklevel=3)
        return None
