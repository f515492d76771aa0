"""Calls of the Triton engine under configurations that its interpreter runs in reasonable time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from chunkwise.codegen.config import Config, Dims, KernelConfig
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.call import Call
from chunkwise.runtime.triton import engine as triton_engine

CHUNK = 16  # the least extent of a matrix product, so that a few tokens make several chunks
TILES = KernelConfig(v_tile=16, warps=4, stages=1, k_tile=16)  # 17 channels loop over two tiles


def _scan_by_rows(self: Any, arguments: Any) -> list[Any]:
    """The interpreter's associative scan, computed by rows instead of single elements."""
    import numpy as np

    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in arguments]
    types = [x.dtype for x in arguments]
    outputs = [np.zeros_like(a) for a in arrays]
    row = tuple(a[0] for a in arrays)
    for n in range(arrays[0].shape[0]):
        if n:
            before = [self.to_tensor(x, t) for x, t in zip(row, types, strict=True)]
            now = [self.to_tensor(a[n], t) for a, t in zip(arrays, types, strict=True)]
            combined = self.combine_fn.fn(*before, *now)
            combined = combined if isinstance(combined, tuple) else (combined,)
            row = tuple(
                x.handle.data.reshape(a[n].shape) for x, a in zip(combined, arrays, strict=True)
            )
        for out, x in zip(outputs, row, strict=True):
            out[n] = x
    return [
        self.to_tensor(np.moveaxis(x, 0, self.axis), t) for x, t in zip(outputs, types, strict=True)
    ]


def hasten() -> None:
    """Replace functions that take two thirds of the interpreter's time by a few lines of NumPy."""
    from triton.runtime import interpreter

    interpreter.ScanOps.generic_scan = _scan_by_rows
    original = interpreter._get_np_dtype
    of_scalar = lru_cache(maxsize=None)(original)

    def np_dtype(t: Any) -> Any:  # blocks and pointers do not hash
        return original(t) if t.scalar.is_ptr() else of_scalar(t.scalar)

    interpreter._get_np_dtype = np_dtype


@cache
def small(form: NormalForm) -> Config:
    """The plans that serve `form` by default, on short chunks and narrow tiles."""
    default = default_config(chunk_program(form), Dims(16, 16), wide_dtype=True)
    return Config(CHUNK, default.forward, default.backward, TILES)


@cache
def _compiled(
    form: NormalForm, dims: Dims, dtype: Any, dtypes: tuple[Any, ...], config: Config, segment: int
) -> Any:
    return triton_engine.compile_with(form, dims, dtype, dtypes, config, segment)


class Poisoned:
    """A copy of torch whose `empty` returns NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, **options).fill_(torch.nan)


def served_under(
    config_of: Callable[[NormalForm], Config], segment: int = 0
) -> Callable[[Call], Any]:
    """A replacement for `triton_engine._compiled_for`, which interprets the kernels.

    `segment` is the number of tokens of a segment, if scans run in segments.
    """

    def compiled_for(call: Call) -> Any:
        dtypes = tuple((name, x.dtype) for name, x in call.operands.items())
        config = config_of(call.form)
        return _compiled(call.form, Dims(call.K, call.V), call.dtype, dtypes, config, segment)

    return compiled_for


def now_and_then_in_segments(call: Call) -> Any:
    """A replacement for `triton_engine._compiled_for`: segments of one chunk if T is odd."""
    return served_under(small, CHUNK * (call.T % 2))(call)
