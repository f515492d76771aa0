"""What may be chosen for one Triton kernel, and the rules that say which choices are legal.

Only what changes the printed kernel becomes an axis: whether it loops over values, keys or chunks
is read off the printer itself, by printing it twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..codegen.config import Config, Dims, KernelConfig, dims_of, padded
from ..codegen.interface import Signature
from ..codegen.plan import Hoist, Kernel, Plan
from ..codegen.tile import Axis as TileAxis
from ..codegen.triton.fit import shared_bound
from ..codegen.triton.kernel import TritonKernel, print_triton
from .gpu import Gpu
from .space import Axis, Point, Rule

_TILES = (16, 32, 64, 128)
_WARPS = (2, 4, 8)
_STAGES = (1, 2, 3, 4)
SURELY_SHARED = 0.7  # of the bound, which is generous: what compiled kernels take at the least
SOME_PLAN = Plan(Hoist.NOTHING)  # a kernel is printed whatever plan it came from


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
        """Of what the kernel computes."""
        return dims_of(self.kernel, self.signature.dims)

    @property
    def shared(self) -> int:
        """About how much shared memory a program takes, in bytes."""
        itemsize = self.signature.dtype.itemsize
        return shared_bound(self.kernel, self.tiles, self.chunk, self.dims, itemsize)

    @property
    def held(self) -> int:
        """32-bit registers of a thread that the carries take: the scan holds them throughout."""
        dims, threads = self.dims, self.tiles.warps * self.gpu.warp
        size = {
            TileAxis.K: padded(dims.K),
            TileAxis.V: min(self.tiles.v_tile, padded(dims.V)),
        }
        held = 0
        for carried in self.kernel.carried:
            elements = 1
            for axis in carried.end.axes:
                elements *= size.get(axis, 1)
            held += elements
        return held // threads


def _too_much_shared(c: Choice) -> float:
    return SURELY_SHARED * c.shared / c.gpu.shared_program - 1


def _too_many_held(c: Choice) -> float:
    return c.held / 192 - 1


def _idle_warps(c: Choice) -> float:
    rows = max(c.chunk, min(c.tiles.v_tile, padded(c.dims.V)))
    return 16 * c.tiles.warps / (2 * rows) - 1


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
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the choices change in a kernel. `split`: programs, not a loop, take the value tiles."""

    v: bool
    split: bool
    k: bool
    stages: bool


def traits(kernel: Kernel, chunk: int, signature: Signature) -> Traits:
    """Which choices change the printed kernel."""
    base = KernelConfig(v_tile=16, warps=4, stages=1, k_tile=16)
    narrow = printed(kernel, base, chunk, signature)
    wide_v = printed(kernel, replace(base, v_tile=256), chunk, signature)
    wide_k = printed(kernel, replace(base, k_tile=256), chunk, signature)
    return Traits(
        v=narrow.source != wide_v.source,
        split=narrow.v_programs > 1,
        k=narrow.source != wide_k.source,
        stages="\n    for " in narrow.source,
    )


def printed(kernel: Kernel, tiles: KernelConfig, chunk: int, signature: Signature) -> TritonKernel:
    """The kernel under these tiles."""
    return print_triton(kernel, signature, Config(chunk, SOME_PLAN, SOME_PLAN, tiles))


def axes(found: Traits, dims: Dims) -> tuple[Axis, ...]:
    """The axes of a kernel's space; there is always one."""
    made = []
    if found.v:
        made.append(Axis("v_tile", _upto(padded(dims.V))))
    if found.k:
        made.append(Axis("k_tile", _upto(padded(dims.K))))
    made.append(Axis("warps", _WARPS))
    if found.stages:
        made.append(Axis("stages", _STAGES))
    return tuple(made)


def _upto(widest: int) -> tuple[int, ...]:
    tiles = tuple(t for t in _TILES if t <= widest)
    return tiles if widest <= _TILES[-1] else (*tiles, widest)


def tiles_of(point: Point) -> KernelConfig:
    """The kernel's configuration; what is no axis of it keeps its default."""
    chosen = dict(point)
    base = KernelConfig(stages=1)
    return KernelConfig(
        v_tile=chosen.get("v_tile", base.v_tile),
        warps=chosen["warps"],
        stages=chosen.get("stages", base.stages),
        k_tile=chosen.get("k_tile", base.k_tile),
    )


def point_of(tiles: KernelConfig, space: tuple[Axis, ...]) -> Point | None:
    """The point of `space` that `tiles` mean; None where it lacks one of their numbers."""
    widest = {a.name: a.choices[-1] for a in space}
    values = {
        "v_tile": min(tiles.v_tile, widest.get("v_tile", 0)),
        "k_tile": min(tiles.k_tile, widest.get("k_tile", 0)),
        "warps": tiles.warps,
        "stages": tiles.stages,
    }
    point = tuple((a.name, values[a.name]) for a in space)
    legal = all(value in a.choices for a, (_, value) in zip(space, point, strict=True))
    return point if legal else None
