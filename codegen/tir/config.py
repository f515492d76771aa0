"""The choices left on a CPU once recurrence, dimensions and dtypes are known, and defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from ...dsl.errors import BadConfiguration
from ..config import Chunk, Space, Tiles
from ..limits import Limited, Within
from ..plan import Hoist, Plan

NARROWEST, WIDEST = 16, 256  # channels of the value axis that a part of it has


@dataclass(frozen=True, slots=True)
class TvmConfig(Limited):
    """How the CPU's kernels are cut and tiled.

    Attributes:
        chunk: tokens per chunk, a power of two.
        forward, backward: how each direction is cut into kernels.
        lanes: float32 numbers in a vector register, a power of two.
        rows, vectors: the register tile of a product, rows times vectors of accumulators.
        v_tile: channels of the value axis per work item, where a kernel can be split along it.
    """

    chunk: Chunk
    forward: Plan
    backward: Plan
    lanes: Annotated[int, Within(2, 32, "vector registers hold so many", power=True)]
    rows: Annotated[int, Within(1, 32, "accumulators of a product stay in registers")]
    vectors: Annotated[int, Within(1, 16, "accumulators of a product stay in registers")]
    v_tile: Annotated[int, Within(1, 4096, "an item has at least a channel")] = WIDEST

    def __post_init__(self) -> None:
        Limited.__post_init__(self)
        for plan in (self.forward, self.backward):
            if plan.saves:
                why = "this engine hands nothing from a forward to its backward"
                raise BadConfiguration("TvmConfig: saves", plan.saves, str(Hoist.NOTHING), why)

    @property
    def tiles(self) -> Tiles:
        """The extents of a kernel's tiles."""
        return Tiles(self.chunk, self.v_tile, space=Space.MEMORY)


def default_config(lanes: int) -> TvmConfig:
    """Good for calls of usual size on a CPU whose vectors hold `lanes` float32 numbers.

    A core has no shared memory to fill: everything is computed in the scan, from operands that are
    read once. 16 registers of AVX2 hold 4 x 2 accumulators beside operands, 32 of AVX-512 8 x 2;
    6 x 2 would fit too, runs no faster, and compiles longer, for no extent is a multiple of 6.
    """
    rows = {4: 4, 8: 4, 16: 8}.get(lanes, 4)
    return TvmConfig(
        chunk=max(32, lanes),
        forward=Plan(Hoist.NOTHING, outputs_in_scan=True),
        backward=Plan(Hoist.NOTHING, outputs_in_scan=True),
        lanes=lanes,
        rows=rows,
        vectors=2,
    )


def spread(config: TvmConfig, rows: int, V: int, threads: int) -> TvmConfig:
    """`config` where rows (sequences times value heads) are no more than half the threads.

    Items are parts of the value axis, as many as there are threads for. A backward computed in the
    scan sums over that axis, so up to a quarter of the threads it becomes a scan of parts between
    kernels that are parallel over chunks (measured: docs/measured.md).
    """
    if 2 * rows > threads:
        return config
    tile = config.v_tile if V % config.v_tile == 0 else V
    while rows * (V // tile) < threads and tile % (2 * config.lanes) == 0 and tile >= 2 * NARROWEST:
        tile //= 2
    backward = config.backward
    if 4 * rows <= threads and backward.outputs_in_scan and not backward.scans_apart:
        backward = Plan(Hoist.ALL)
    return replace(config, backward=backward, v_tile=tile if tile < V else config.v_tile)


def token_config(lanes: int) -> TvmConfig:
    """For kernels that take one token at a time: there is nothing to tile but the state's rows."""
    nothing = Plan(Hoist.NOTHING, outputs_in_scan=True)
    return TvmConfig(chunk=1, forward=nothing, backward=nothing, lanes=lanes, rows=1, vectors=4)
