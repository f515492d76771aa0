"""What is free in the engines that run on a CPU: their spaces, as `CallTunable` takes them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from ..codegen.config import Dims, EagerConfig
from ..codegen.plan import Hoist, Plan
from ..codegen.tir_config import TvmConfig
from ..dsl.normal_form import NormalForm
from ..runtime.artifact import Configuration
from ..runtime.call import Call
from .call_tunable import Space
from .space import Axis, Point, Rule
from .tunable import Built, Job

_EAGER_CHUNKS, _TVM_CHUNKS = (16, 32, 64, 128), (16, 32, 64)
_TILES = (16, 32, 64, 128, 256)
# what is computed ahead of the scan, in parallel over chunks, by its number on the axis
_HOISTS = (Hoist.NOTHING, Hoist.PREFIXES | Hoist.SOLVES, Hoist.ALL)
_REGISTERS = {4: 32, 8: 16, 16: 32}  # vector registers, by how many float32 numbers one holds


def eager_space(chunks: tuple[int, ...]) -> Space:
    """The eager engine: tokens per chunk."""
    default = EagerConfig(64)
    first = ((("chunk", default.chunk),),)
    return Space((Axis("chunk", chunks or _EAGER_CHUNKS),), EagerConfig, default, first)


def tvm_space(call: Call, default: TvmConfig, chunks: tuple[int, ...]) -> Space:
    """The TVM engine: chunk, plan, register tile, and channels per item."""
    axes = (
        Axis("chunk", chunks or tuple(c for c in _TVM_CHUNKS if c % default.lanes == 0)),
        Axis("hoist", tuple(range(len(_HOISTS)))),
        Axis("rows", (2, 4, 6, 8)),
        Axis("vectors", (1, 2, 3, 4)),
        Axis("v_tile", tuple(t for t in _TILES if t < 2 * call.V)),
    )

    def make(hoist: int, v_tile: int, **numbers: int) -> TvmConfig:
        plan = Plan(_HOISTS[hoist], outputs_in_scan=hoist == 0)
        # as wide as all channels is one configuration, however it is written
        v_tile = default.v_tile if v_tile >= min(call.V, default.v_tile) else v_tile
        return replace(default, forward=plan, backward=plan, v_tile=v_tile, **numbers)

    chosen = {
        "chunk": default.chunk,
        "hoist": 0,
        "rows": default.rows,
        "vectors": default.vectors,
        "v_tile": min(default.v_tile, axes[-1].choices[-1]),
    }
    first: Point = tuple((a.name, chosen[a.name]) for a in axes)

    def jobs(config: Configuration) -> tuple[Job, ...]:
        assert isinstance(config, TvmConfig)
        dtypes = tuple((name, x.dtype) for name, x in call.operands.items())
        job = TvmJob(call.form, Dims(call.K, call.V), call.dtype, dtypes, config)
        return (job, replace(job, backward=True))

    return Space(axes, make, default, (first,), TVM_RULES, jobs)


def _spills(config: Configuration) -> float:
    """Accumulators, a row's number and the vectors of the other side, against the registers."""
    assert isinstance(config, TvmConfig)
    held = config.rows * config.vectors + config.vectors + 1
    return held / _REGISTERS.get(config.lanes, 16) - 1


TVM_RULES: tuple[Rule[Configuration], ...] = (
    Rule("registers", _spills, "a product's accumulators must stay in vector registers"),
)


@dataclass(frozen=True, slots=True)
class TvmJob:
    """One direction of one configuration, compiled into the engine's cache on disk."""

    form: NormalForm
    dims: Dims
    dtype: torch.dtype
    dtypes: tuple[tuple[str, torch.dtype], ...]
    config: TvmConfig
    backward: bool = False

    def __call__(self) -> Built:
        """Compile it."""
        # TVM is imported only where it compiles
        from ..runtime.tvm_engine import compiled

        started = time.monotonic()
        try:
            compiled(self.form, self.dims, self.dtype, self.dtypes, self.config, self.backward)
        except (RuntimeError, ValueError) as why:  # the compiler's verdict
            lines = [line for line in str(why).splitlines() if line.strip()]
            text = f"{type(why).__name__}: {lines[-1] if lines else ''}"[:200]
            return Built(error=text, seconds=time.monotonic() - started)
        return Built(seconds=time.monotonic() - started)
