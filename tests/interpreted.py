"""Calls of the Triton engine under configurations that its interpreter runs in reasonable time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from chunkwise.codegen.config import Config, Dims, KernelConfig
from chunkwise.codegen.defaults import default_config
from chunkwise.codegen.emit import chunk_body
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime import triton_engine
from chunkwise.runtime.call import Call

CHUNK = 16  # the least that a matrix product takes: a few tokens make several chunks
TILES = KernelConfig(v_tile=16, warps=4, stages=1, k_tile=16)  # 17 channels loop over two tiles


@cache
def small(form: NormalForm) -> Config:
    """The plans that serve `form` by default, on short chunks and narrow tiles."""
    default = default_config(chunk_body(form), Dims(16, 16), wide_dtype=True)
    return Config(CHUNK, default.forward, default.backward, TILES)


@cache
def _compiled(
    form: NormalForm, dims: Dims, dtype: Any, dtypes: tuple[Any, ...], config: Config, segment: int
) -> Any:
    return triton_engine.compile_with(form, dims, dtype, dtypes, config, segment)


class Poisoned:
    """torch, but what `empty` returns is NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, **options).fill_(torch.nan)


def served_under(
    config_of: Callable[[NormalForm], Config], segment: int = 0
) -> Callable[[Call], Any]:
    """What to put in place of `triton_engine._compiled_for`.

    `segment`: tokens of a segment, for scans of segments.
    """

    def compiled_for(call: Call) -> Any:
        dtypes = tuple((name, x.dtype) for name, x in call.operands.items())
        config = config_of(call.form)
        return _compiled(call.form, Dims(call.K, call.V), call.dtype, dtypes, config, segment)

    return compiled_for
