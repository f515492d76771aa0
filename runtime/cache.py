"""Where emitted source lives on disk, and how it is imported: Triton reads kernels from files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from ..codegen.modules import import_file

CACHE_VARIABLE = "CHUNKWISE_CACHE"


def cache_folder() -> Path:
    """`$CHUNKWISE_CACHE`, else `chunkwise` under the XDG cache folder."""
    return _folder(os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=64)  # asked for by every call, and paths are slow to make
def _folder(chosen: str | None, xdg: str | None) -> Path:
    if chosen:
        return Path(chosen)
    return Path(xdg or Path.home() / ".cache") / "chunkwise"


def write_atomically(path: Path, text: str) -> None:
    """`text` at `path`, whole or not at all: a temporary file in the same folder, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)


@lru_cache(maxsize=1024)
def import_source(source: str) -> ModuleType:
    """The module of `source`, from a file named by its digest; a file that differs is rewritten."""
    digest = hashlib.blake2b(source.encode(), digest_size=10).hexdigest()
    path = cache_folder() / "source" / f"kernels_{digest}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        write_atomically(path, source)
    return import_file(f"chunkwise_emitted_{digest}", path)
