"""The search space of one Triton kernel: its axes, and the rules that say which points are legal.

A parameter becomes an axis only if it changes the printed kernel. To find out, the kernel is
printed with small and with large tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..codegen.config import Config, Dims, KernelConfig, Printer, Tiles, dims_of, padded
from ..codegen.gluon.kernel import refusal_of
from ..codegen.gluon.refusal import ROWS_OF_WARP
from ..codegen.interface import Signature
from ..codegen.phases import in_registers
from ..codegen.plan import Hoist, Kernel, Loop, Plan
from ..codegen.tiled import TiledKernel
from ..codegen.tiling import tile
from ..codegen.triton.fit import shared_bound
from ..codegen.triton.kernel import TritonKernel, print_triton
from .gpu import Gpu
from .space import Axis, Point, Rule

_TILES = (16, 32, 64, 128)
_WARPS = (2, 4, 8)
_STAGES = (1, 2, 3, 4)
_BLOCKS = (16, 32)
SURELY_SHARED = 0.7  # compiled kernels take at least this share of the estimate `shared_bound`
SOME_PLAN = Plan(Hoist.NOTHING)  # a placeholder: a kernel's text does not depend on its plan


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel under one choice of tiles."""

    kernel: Kernel
    tiles: KernelConfig
    chunk: int
    signature: Signature
    gpu: Gpu

    @property
    def dims(self) -> Dims:
        """The dimensions K and V of the state that the kernel computes."""
        return dims_of(self.kernel, self.signature.dims)

    @property
    def shared(self) -> int:
        """An estimate of the shared memory that a program takes, in bytes."""
        itemsize = self.signature.dtype.itemsize
        return shared_bound(self.kernel, self.tiles, self.chunk, self.dims, itemsize)

    @property
    def held(self) -> int:
        """32-bit registers per thread that hold the carried states throughout the scan."""
        size = in_registers(self.dims, Tiles(self.chunk, self.tiles.v_tile))
        held = sum(math.prod(size[a] for a in c.end.axes) for c in self.kernel.carried)
        return held // (self.tiles.warps * self.gpu.warp)


def _too_much_shared(c: Choice) -> float:
    return SURELY_SHARED * c.shared / c.gpu.shared_program - 1


def _too_many_held(c: Choice) -> float:
    return c.held / 192 - 1


def _idle_warps(c: Choice) -> float:
    rows = max(c.chunk, min(c.tiles.v_tile, padded(c.dims.V)))
    return 16 * c.tiles.warps / (2 * rows) - 1


def _other_warps(c: Choice) -> float:
    if c.tiles.printer is not Printer.GLUON:
        return 0.0
    if c.kernel.loop is Loop.PARALLEL:
        return max(0.0, abs(math.log2(c.tiles.warps / 4) - 0.5) - 0.5)
    return abs(math.log2(ROWS_OF_WARP * c.tiles.warps / c.tiles.v_tile))


RULES: tuple[Rule[Choice], ...] = (
    Rule(
        "shared memory",
        _too_much_shared,
        "a program's tiles, times the stages of its loop, must fit shared memory",
    ),
    Rule(
        "registers",
        _too_many_held,
        "the carried state must leave registers for everything else, or it spills in every step",
    ),
    Rule(
        "warps",
        _idle_warps,
        "a warp computes 16 rows of a product: with twice as many warps as rows, most would idle",
    ),
    Rule(
        "warp groups",
        _other_warps,
        "in Gluon, a warp of a scan has 16 values, and a chunk takes four warps or eight",
    ),
)


@dataclass(frozen=True, slots=True)
class Traits:
    """Which parameters change a printed kernel.

    Attributes:
        v, k, stages: the tile of the value axis, of the key axis, the stages of the loop.
        split: each value tile has a program of its own, instead of an iteration of a loop.
        block: the block within which decays of a vector gate are split.
        gluon: whether it can be printed in Gluon too.
    """

    v: bool
    split: bool
    k: bool
    stages: bool
    block: bool
    gluon: bool


def traits(kernel: Kernel, chunk: int, signature: Signature) -> Traits:
    """Which parameters change the kernel by more than the extents of its tiles."""

    def decided(v_tile: int = 16, k_tile: int = 16, block: int = 32) -> TiledKernel:
        return tile(kernel, signature, Tiles(chunk, v_tile, k_tile, block=block))

    narrow, wide_v, wide_k = decided(), decided(v_tile=256), decided(k_tile=256)
    return Traits(
        v=narrow != replace(wide_v, extents=narrow.extents),
        split=narrow.v_parts > 1,
        k=narrow != replace(wide_k, extents=narrow.extents),
        stages=narrow.scan is not Loop.PARALLEL or narrow.turns > 0,
        block=narrow != decided(block=16),
        gluon=_in_gluon(kernel, chunk, signature),
    )


def _in_gluon(kernel: Kernel, chunk: int, signature: Signature) -> bool:
    """Whether Gluon has the kernel with some tiles."""
    tiles = [KernelConfig(v, v // ROWS_OF_WARP) for v in (64, 128)]
    return any(
        refusal_of(kernel, signature, Config(chunk, SOME_PLAN, SOME_PLAN, t)) is None for t in tiles
    )


def printed(kernel: Kernel, tiles: KernelConfig, chunk: int, signature: Signature) -> TritonKernel:
    """The kernel, printed with these tiles."""
    return print_triton(kernel, signature, Config(chunk, SOME_PLAN, SOME_PLAN, tiles))


def axes(found: Traits, dims: Dims, *, hopper: bool = False) -> tuple[Axis, ...]:
    """The axes of a kernel's space; there is always one. `hopper`: for a GPU that runs Gluon's."""
    made = []
    if found.v:
        made.append(Axis("v_tile", _upto(padded(dims.V))))
    if found.k:
        made.append(Axis("k_tile", _upto(padded(dims.K))))
    made.append(Axis("warps", _WARPS))
    if found.stages:
        made.append(Axis("stages", _STAGES))
    if found.block:
        made.append(Axis("block", _BLOCKS))
    if found.gluon and hopper:
        made.append(Axis("gluon", (0, 1)))
    return tuple(made)


def _upto(widest: int) -> tuple[int, ...]:
    tiles = tuple(t for t in _TILES if t <= widest)
    return tiles if widest <= _TILES[-1] else (*tiles, widest)


def tiles_of(point: Point) -> KernelConfig:
    """The kernel's configuration at `point`; a field without an axis keeps its default."""
    chosen = dict(point)
    base = KernelConfig(stages=1)
    return KernelConfig(
        v_tile=chosen.get("v_tile", base.v_tile),
        warps=chosen["warps"],
        stages=chosen.get("stages", base.stages),
        k_tile=chosen.get("k_tile", base.k_tile),
        block=chosen.get("block", base.block),
        printer=Printer.GLUON if chosen.get("gluon") else Printer.TRITON,
    )


def tiles_text(tiles: KernelConfig) -> str:
    """A kernel's tiles as one line: `BV=64 BK=32 warps=4 stages=2`."""
    more = f" block={tiles.block}" if tiles.block != KernelConfig().block else ""
    more += " in Gluon" * (tiles.printer is Printer.GLUON)
    return f"BV={tiles.v_tile} BK={tiles.k_tile} warps={tiles.warps} stages={tiles.stages}{more}"


def point_of(tiles: KernelConfig, space: tuple[Axis, ...]) -> Point | None:
    """The point of `space` for `tiles`; None if one of their numbers is not a choice there."""
    widest = {a.name: a.choices[-1] for a in space}
    values = {
        "v_tile": min(tiles.v_tile, widest.get("v_tile", 0)),
        "k_tile": min(tiles.k_tile, widest.get("k_tile", 0)),
        "warps": tiles.warps,
        "stages": tiles.stages,
        "block": tiles.block,
        "gluon": int(tiles.printer is Printer.GLUON),
    }
    point = tuple((a.name, values[a.name]) for a in space)
    legal = all(value in a.choices for a, (_, value) in zip(space, point, strict=True))
    return point if legal else None
