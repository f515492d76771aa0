"""The search spaces of the engines that run on a CPU, as `CallTunable` takes them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from ..codegen.config import Dims, EagerConfig
from ..codegen.plan import Hoist, Plan
from ..codegen.tir.config import NARROWEST, WIDEST, TvmConfig
from ..dsl.normal_form import NormalForm
from ..runtime.call import Call
from ..runtime.tuned.artifact import Configuration
from .call_tunable import Space
from .space import Axis, Point, Rule
from .tunable import Built, Job

_EAGER_CHUNKS, _TVM_CHUNKS = (16, 32, 64, 128), (16, 32, 64)
_TILES = (NARROWEST, 32, 64, 128, WIDEST)
_FUSED = Plan(Hoist.NOTHING, outputs_in_scan=True)
# pairs of plans (forward, backward); the axis `plans` holds an index of this table
PLANS = (
    (_FUSED, _FUSED),
    (_FUSED, Plan(Hoist.ALL)),
    (Plan(Hoist.PREFIXES | Hoist.SOLVES),) * 2,
    (Plan(Hoist.ALL),) * 2,
)
_REGISTERS = {4: 32, 8: 16, 16: 32}  # number of vector registers, by their length in float32


def eager_space(chunks: tuple[int, ...]) -> Space:
    """The space of the eager engine: the number of tokens per chunk."""
    default = EagerConfig(64)
    first = ((("chunk", default.chunk),),)
    return Space((Axis("chunk", chunks or _EAGER_CHUNKS),), EagerConfig, default, first)


def tvm_space(call: Call, default: TvmConfig, chunks: tuple[int, ...]) -> Space:
    """The space of the TVM engine: chunk length, plans, register tile, channels per work item."""
    axes = (
        Axis("chunk", chunks or tuple(c for c in _TVM_CHUNKS if c % default.lanes == 0)),
        Axis("plans", tuple(range(len(PLANS)))),
        Axis("rows", (2, 4, 6, 8)),
        Axis("vectors", (1, 2, 3, 4)),
        Axis("v_tile", tuple(sorted({default.v_tile, WIDEST, *(t for t in _TILES if t < call.V)}))),
    )

    def make(plans: int, **numbers: int) -> TvmConfig:
        forward, backward = PLANS[plans]
        return replace(default, forward=forward, backward=backward, **numbers)

    chosen = {
        "chunk": default.chunk,
        "plans": PLANS.index((default.forward, default.backward)),
        "rows": default.rows,
        "vectors": default.vectors,
        "v_tile": default.v_tile,
    }
    first: Point = tuple((a.name, chosen[a.name]) for a in axes)

    def jobs(config: Configuration) -> tuple[Job, ...]:
        assert isinstance(config, TvmConfig)
        dtypes = tuple((name, x.dtype) for name, x in call.operands.items())
        job = TvmJob(call.form, Dims(call.K, call.V), call.dtype, dtypes, config)
        return (job, replace(job, backward=True))

    return Space(axes, make, default, (first,), TVM_RULES, jobs)


def _spills(config: Configuration) -> float:
    """The vector registers that a tile of a product needs, as an excess over those that exist."""
    assert isinstance(config, TvmConfig)
    held = config.rows * config.vectors + config.vectors + 1
    return held / _REGISTERS.get(config.lanes, 16) - 1


TVM_RULES: tuple[Rule[Configuration], ...] = (
    Rule("registers", _spills, "a product's accumulators must stay in vector registers"),
)


@dataclass(frozen=True, slots=True)
class TvmJob:
    """The compilation of one direction of a configuration into the engine's cache on disk."""

    form: NormalForm
    dims: Dims
    dtype: torch.dtype
    dtypes: tuple[tuple[str, torch.dtype], ...]
    config: TvmConfig
    backward: bool = False

    def __call__(self) -> Built:
        """Compile it."""
        # TVM is imported only in the process that compiles
        from ..runtime.tvm.engine import compiled

        started = time.monotonic()
        try:
            compiled(self.form, self.dims, self.dtype, self.dtypes, self.config, self.backward)
        except (RuntimeError, ValueError) as why:  # the compiler rejects the configuration
            return Built.failed(why, started)
        return Built(seconds=time.monotonic() - started)
