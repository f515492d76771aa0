"""What tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import transition_of
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.triton import engine as triton_engine


@pytest.fixture
def in_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has scans run on segments of 64 tokens where they can, however short the call."""

    def short(form: NormalForm, dims: Dims, *sizes: Any) -> int:
        return 64 if transition_of(form, dims) else 0

    monkeypatch.setattr(triton_engine, "segment_of", short)
    Records.forget()
    yield
    Records.forget()
