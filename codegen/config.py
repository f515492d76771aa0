"""The choices left once a recurrence, its dimensions and dtypes are known: plans and tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated

from ..dsl.errors import BadConfiguration
from .limits import Limited, Within
from .plan import ENDS, MATRICES, Hoist, Kernel, Plan
from .segments import Start

_HALVED = "a chunk is halved until single tokens are left"
Chunk = Annotated[int, Within(1, 1024, _HALVED, power=True)]  # 1: for tokens one at a time
Tile = Annotated[int, Within(8, 4096, "Triton's tiles are powers of two", power=True)]
Channels = Annotated[int, Within(1, 1 << 16)]
Block = Annotated[int, Within(16, 32, "a block's decay is split in float32's range", power=True)]


class Precision(Enum):
    """How products of float32 tiles run on tensor cores."""

    TF32 = "tf32"  # 10 bits: enough between half-precision roundings
    TF32X3 = "tf32x3"  # three products, float32's 23 bits
    IEEE = "ieee"  # where tf32 does not exist


class Space(Enum):
    """Where a target holds tiles while it computes."""

    REGISTERS = "as powers of two, in the dtypes of operands; products add to accumulators"
    MEMORY = "as wide as their operands, in float32; nothing is taken part by part but by programs"


class Printer(Enum):
    """The language in which a kernel is printed."""

    TRITON = "Triton, whose compiler schedules loads and products"
    GLUON = "Gluon, for Hopper: warp groups, barriers and asynchronous products are written out"


@dataclass(frozen=True, slots=True)
class Tiles:
    """The extents that are asked for: tokens of a chunk, channels of V and of K (None: all).

    `block`: tokens between two of which a vector gate's decay is split, as in `KernelConfig`.
    """

    chunk: int
    v: int
    k: int | None = None
    space: Space = Space.REGISTERS
    block: int = 32


@dataclass(frozen=True, slots=True)
class KernelConfig(Limited):
    """One kernel's tiles: channels of the value axis at a time, warps, pipeline stages.

    `k_tile`: channels of the key axis at a time, in kernels parallel over chunks that can loop over
    it (no value axis, nothing along K that needs a sum over K); elsewhere all of K.
    `block`: tokens of a block of the chunk, between any two of which the decay of a vector gate is
    split into two factors; a chunk that has no more tokens is one block.
    `printer`: the language (None: what the runtime prefers for a call); where Gluon cannot have the
    kernel (`codegen.gluon.refusal`) or a call, Triton has it with these tiles.
    """

    v_tile: Tile = 64
    warps: Annotated[int, Within(1, 32, "a program has at most 1024 threads", power=True)] = 4
    stages: Annotated[int, Within(1, 16, "a loop's tiles are held once per stage")] = 2
    k_tile: Tile = 256
    block: Block = 32
    printer: Printer | None = None

    def options(self, stages: int) -> dict[str, int | bool]:
        """Triton's options, for a launch and for compiling alike.

        Fused multiply-adds, because that default changes: on to Triton 3.9, off from 3.10.
        """
        return {"num_warps": self.warps, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Config(Limited):
    """The shared decisions and each kernel's own. `kernels` overrides `default` by kernel name."""

    chunk: Chunk
    forward: Plan
    backward: Plan
    default: KernelConfig
    kernels: tuple[tuple[str, KernelConfig], ...] = ()

    def __post_init__(self) -> None:
        Limited.__post_init__(self)
        if self.backward.saves is not self.forward.saves:
            why = "the backward reads what the forward has stored"
            saves = self.forward.saves
            raise BadConfiguration("Config.backward.saves", self.backward.saves, str(saves), why)

    def saving(self, kinds: Hoist) -> Config:
        """The same with a forward that stores tiles of these kinds for the backward."""
        if self.forward.saves is kinds:
            return self
        forward, backward = (replace(p, saves=kinds) for p in (self.forward, self.backward))
        return replace(self, forward=forward, backward=backward)

    def of(self, kernel: str) -> KernelConfig:
        """The tiles of the kernel called `kernel`; scans for ends may have those of their scan."""
        own = dict(self.kernels)
        scan = kernel.removesuffix(ENDS).removesuffix(MATRICES)
        return own.get(kernel) or own.get(scan, self.default)

    def tiles(self, kernel: str) -> Tiles:
        """The extents of its tiles."""
        own = self.of(kernel)
        return Tiles(self.chunk, own.v_tile, own.k_tile, block=own.block)


@dataclass(frozen=True, slots=True)
class EagerConfig(Limited):
    """The one choice of the eager engine: tokens per chunk, a power of two."""

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Dims:
    """Channels of the state: [K, V]."""

    K: Channels
    V: Channels


def held(dims: Dims, *, transposed: bool) -> Dims:
    """The dimensions of a state with those channels, as tiles hold it."""
    return Dims(dims.V, dims.K) if transposed else dims


def dims_of(kernel: Kernel, dims: Dims) -> Dims:
    """The dimensions of the state as `kernel` holds it; a transition matrix is K x K."""
    dims = held(dims, transposed=kernel.transposed)
    identity = kernel.segments is not None and kernel.segments.start is Start.IDENTITY
    return Dims(dims.K, dims.K) if identity else dims


def padded(channels: int, least: int = 16) -> int:
    """The tile that holds `channels`: a power of two, and no smaller than a tensor core's."""
    size = least
    while size < channels:
        size *= 2
    return size
