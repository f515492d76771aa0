"""Layers and models of recurrences and of softmax attention, for torch."""

from __future__ import annotations

from .runtime.nn import *  # noqa: F403
from .runtime.nn import __all__ as __all__
