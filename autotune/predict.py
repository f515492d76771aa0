"""The cost model: how long a kernel should take on a GPU, and what limits it.

FLOPs and bytes are SymPy's closed forms (`codegen.cost`); from a choice of tiles follow the
programs, how many share a multiprocessor, and how many steps of a scan come one after the other. It
ranks choices and says why; what is measured corrects its scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..codegen import cost
from ..codegen.config import padded
from ..codegen.interface import Dtype
from ..codegen.plan import Kernel, Loop
from ..codegen.tile import Tile, TileOp
from ..runtime.tuned.artifact import Bucket
from .kernel_space import SURELY_SHARED, Choice, Traits

# of the data sheet's rates, what such kernels reach (docs/measured.md: kernels on an H100)
_OF_BANDWIDTH = 0.75
_OF_PRODUCTS = 0.15
_LAUNCH_US = 2.5
# a step of a scan: waiting for its loads, and for each product that needs the one before
_LOAD_US = 0.8
_PRODUCT_US = 0.5
_OTHER_REGISTERS = 64  # of a thread, beside what is carried


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel does for a whole call, whatever its tiles: FLOPs, bytes, products in a row."""

    flops: float
    read: float
    written: float
    products: int

    @property
    def moved(self) -> float:
        """Bytes, either way."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Prediction:
    """Microseconds by what would limit the kernel; `us` is all of it.

    Attributes:
        programs: launched in all; `resident`: at a time on one multiprocessor.
        steps: that a program takes one after the other.
        shared: bytes of a program.
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
        """What it waits for most."""
        parts = {
            "memory": self.memory_us,
            "products": self.products_us,
            "steps in sequence": self.serial_us,
        }
        return max(parts, key=lambda name: parts[name])


@lru_cache(maxsize=4096)
def work(kernel: Kernel, dtype: Dtype, chunk: int, K: int, V: int, size: Bucket) -> Work:
    """The closed forms at one size of call."""
    spent = _cost(kernel, dtype)
    values = {cost.C: chunk, cost.K: K, cost.V: V, cost.LEVELS: chunk.bit_length() - 1}
    flops, read, written = (
        float(x.subs(values)) * size.rows * size.tokens
        for x in (spent.products, spent.read, spent.written)
    )
    loaded = kernel.buffers
    products = sum(_in_a_row(t, chunk) for t in kernel.order if t not in loaded)
    return Work(flops, read, written, products)


def _in_a_row(t: Tile, chunk: int) -> int:
    """Products that `t` takes one after the other; an inverse takes two per doubling."""
    levels = chunk.bit_length() - 1
    counts = {TileOp.DOT: 1, TileOp.INVERSE: 2 * levels}
    counts |= dict.fromkeys((TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY), levels)
    counts[TileOp.DECAYED_CROSSING] = 3 * levels
    return counts.get(t.op, 0)


@lru_cache(maxsize=4096)
def _cost(kernel: Kernel, dtype: Dtype) -> cost.Cost:
    return cost.kernel_cost(kernel, dtype)


def bound_us(kernel: Kernel, choice: Choice, size: Bucket) -> float:
    """No tiles can be faster: the operands are read once, the products run at the full rate."""
    done = _work_of(kernel, choice, size)
    gpu, dtype = choice.gpu, choice.signature.dtype
    return max(done.read / gpu.bandwidth, done.flops / gpu.flops(dtype)) * 1e6


def predict(choice: Choice, found: Traits, size: Bucket) -> Prediction:
    """The time of one choice."""
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


def _work_of(kernel: Kernel, choice: Choice, size: Bucket) -> Work:
    dims = choice.dims
    return work(kernel, choice.signature.dtype, choice.chunk, dims.K, dims.V, size)


def _resident(choice: Choice) -> int:
    """Programs on a multiprocessor at a time, by shared memory, registers and warps."""
    gpu, warps = choice.gpu, choice.tiles.warps
    registers = min(255, choice.held + _OTHER_REGISTERS) * gpu.warp * warps
    shared = max(int(choice.shared * SURELY_SHARED), 1)
    return max(1, min(gpu.shared // shared, gpu.registers // registers, gpu.warps // warps))
