"""The catalogue of mistakes: what is wrong, the user's line, the reason, the remedy."""

from __future__ import annotations

from .dsl.errors import *  # noqa: F403
