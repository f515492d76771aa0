"""The cost model predicts how long a kernel takes on a GPU, and what limits it.

FLOPs and bytes are closed forms (`codegen.cost`). A choice of tiles determines the number of
programs, how many of them share a multiprocessor, and how many steps a scan takes in sequence. The
search ranks choices by the predictions; measured times correct their scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..codegen import cost
from ..codegen.config import Dims, padded
from ..codegen.interface import Dtype
from ..codegen.plan import Kernel, Loop
from ..codegen.tile import Tile, TileOp
from ..runtime.tuned.artifact import CallSize
from .kernel_space import SURELY_SHARED, Choice, Traits

# the shares of the data sheet's rates that such kernels reach (docs/measured.md, on an H100)
_OF_BANDWIDTH = 0.75
_OF_PRODUCTS = 0.15
_LAUNCH_US = 2.5
# per step of a scan: the wait for its loads, and for each product that depends on another
_LOAD_US = 0.8
_PRODUCT_US = 0.5
_OTHER_REGISTERS = 64  # registers per thread beside those of the carried states


@dataclass(frozen=True, slots=True)
class KernelWork:
    """The work of a kernel in a whole call, which does not depend on its tiles.

    Attributes:
        flops: of matrix products.
        read, written: bytes of device memory.
        products: matrix products of one chunk that depend on one another.
    """

    flops: float
    read: float
    written: float
    products: int

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of a kernel in microseconds, and the time that each limit would take.

    Attributes:
        us: the kernel's time.
        memory_us, products_us, serial_us: the time by memory traffic, by products, by steps.
        programs, resident: programs in all, and at a time on one multiprocessor.
        steps: steps that a program takes in sequence.
        shared: bytes of shared memory per program.
    """

    us: float
    memory_us: float
    products_us: float
    serial_us: float
    programs: int
    resident: int
    steps: int
    shared: int

    @property
    def limit(self) -> str:
        """The limit that takes the most time."""
        parts = {
            "memory": self.memory_us,
            "products": self.products_us,
            "steps in sequence": self.serial_us,
        }
        return max(parts, key=lambda name: parts[name])


@lru_cache(maxsize=4096)
def work(kernel: Kernel, dtype: Dtype, chunk: int, dims: Dims, size: CallSize) -> KernelWork:
    """The closed forms of a kernel's work, evaluated at one size of call."""
    spent = _cost(kernel, dtype)
    flops, read, written = (
        cost.evaluate(x, chunk, dims) * size.rows * size.tokens
        for x in (spent.products, spent.read, spent.written)
    )
    loaded = kernel.buffers
    products = sum(_in_a_row(t, chunk) for t in kernel.order if t not in loaded)
    return KernelWork(flops, read, written, products)


def _in_a_row(t: Tile, chunk: int) -> int:
    """The number of dependent matrix products in `t`; an inverse takes two per doubling."""
    levels = chunk.bit_length() - 1
    counts = {TileOp.DOT: 1, TileOp.PRODUCT: 1, TileOp.INVERSE: 2 * levels}
    counts |= dict.fromkeys((TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY), levels)
    counts[TileOp.DECAYED_CROSSING] = 3 * levels
    return counts.get(t.op, 0)


@lru_cache(maxsize=4096)
def _cost(kernel: Kernel, dtype: Dtype) -> cost.Cost:
    return cost.kernel_cost(kernel, dtype)


def bound_us(kernel: Kernel, choice: Choice, size: CallSize) -> float:
    """A lower bound over all tiles in microseconds: operands read once, products at full rate."""
    done = _work_of(kernel, choice, size)
    gpu, dtype = choice.gpu, choice.signature.dtype
    return max(done.read / gpu.bandwidth, done.flops / gpu.flops(dtype)) * 1e6


def predict(choice: Choice, found: Traits, size: CallSize) -> Prediction:
    """The predicted time of one choice of tiles, for a kernel with the traits `found`."""
    kernel, tiles, gpu = choice.kernel, choice.tiles, choice.gpu
    dims, dtype = choice.dims, choice.signature.dtype
    done = _work_of(kernel, choice, size)
    chunks = -(-size.tokens // choice.chunk)
    scan = kernel.loop is not Loop.PARALLEL
    v_tiles = -(-padded(dims.V) // min(tiles.v_tile, padded(dims.V))) if found.v else 1
    k_tiles = -(-padded(dims.K) // min(tiles.k_tile, padded(dims.K))) if found.k else 1
    programs = size.rows * (1 if scan else chunks) * (v_tiles if found.split else 1)
    steps = (chunks if scan else 1) * (1 if found.split else v_tiles) * k_tiles
    resident = _resident(choice)
    waves = max(1, math.ceil(programs / (gpu.multiprocessors * resident)))
    busy = min(1.0, programs / (waves * gpu.multiprocessors))
    # programs that share a multiprocessor hide one another's waiting; a lone one waits more
    hidden = min(1.0, 0.5 + 0.25 * resident * min(1.0, tiles.warps / 4))
    memory = done.moved / (gpu.bandwidth * _OF_BANDWIDTH) * 1e6
    products = done.flops / (gpu.flops(dtype) * _OF_PRODUCTS * hidden) * 1e6
    products /= busy
    step = _LOAD_US / tiles.stages + _PRODUCT_US * max(done.products, 1) / (1 if scan else 2)
    serial = waves * steps * step * (4 / tiles.warps) ** 0.3
    us = _LAUNCH_US + max(memory, products, serial)
    return Prediction(us, memory, products, serial, programs, resident, steps, choice.shared)


def _work_of(kernel: Kernel, choice: Choice, size: CallSize) -> KernelWork:
    return work(kernel, choice.signature.dtype, choice.chunk, choice.dims, size)


def _resident(choice: Choice) -> int:
    """The programs that a multiprocessor holds at a time, by shared memory, registers, warps."""
    gpu, warps = choice.gpu, choice.tiles.warps
    registers = min(255, choice.held + _OTHER_REGISTERS) * gpu.warp * warps
    shared = max(int(choice.shared * SURELY_SHARED), 1)
    return max(1, min(gpu.shared // shared, gpu.registers // registers, gpu.warps // warps))
