"""Chunks so short that a few tokens make several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chunkwise.runtime import eager as eager_engine
from chunkwise.runtime.triton import engine as triton_engine

from tests.interpreted import now_and_then_in_segments
from tests.random_draws import CALIBERS


@pytest.fixture(scope="module")
def short_chunks() -> Iterator[None]:
    """Also where nothing says how long they are; Triton's scans run in segments now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_engine, "_LONGEST_CHUNK", CALIBERS["eager"].chunk)
        patch.setattr(triton_engine, "_compiled_for", now_and_then_in_segments)
        yield
