"""Tests of tuning make folders of artifacts of their own, which the others do not look into."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _untuned() -> None:
    """Nothing is hidden here."""
