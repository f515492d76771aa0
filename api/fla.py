"""flash-linear-attention's names and signatures on chunkwise's engines (see `runtime.fla`)."""

from __future__ import annotations

from .runtime.fla import *  # noqa: F403
from .runtime.fla import __all__ as __all__
