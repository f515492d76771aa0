"""The catalogue of mistakes, a class each: what is wrong, the user's line, the reason, the remedy."""

from __future__ import annotations

from .dsl.errors import *  # noqa: F403
