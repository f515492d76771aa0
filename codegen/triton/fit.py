"""Makes a configuration fit a GPU's shared memory, by a bound that needs no compiler.

A pipelined loop keeps as many copies of the tiles that it loads as it has stages. Where the bound
exceeds what a program may use, a kernel gives up stages first, then narrows its value tile: a pure
function of form, dimensions and limit, the same on every rank. `audit` compiles to check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...dsl.normal_form import NormalForm
from ..config import Config, Dims, KernelConfig, Tiles, dims_of
from ..interface import Dtype
from ..phases import in_registers
from ..plan import Kernel, Loop
from ..programs import backward_program, chunk_program, forward_program
from ..tile import Axis, TileOp
from .defaults import default_config

_BESIDE_LOADS = 16 * 1024  # layout conversions, scans and reductions
H100_SHARED = 227 * 1024


def untuned_config(form: NormalForm, dims: Dims, dtype: Dtype, shared: int) -> Config:
    """The default configuration, fitted to `shared` bytes of shared memory per program."""
    wide = dtype is Dtype.FLOAT32
    config = default_config(chunk_program(form), dims, wide_dtype=wide)
    return fit(form, config, dims, dtype.itemsize, shared)


def fit(form: NormalForm, config: Config, dims: Dims, itemsize: int, shared: int) -> Config:
    """`config` with stages and value tiles reduced where `shared` bytes a program need it.

    `itemsize`: bytes of an element of a product's operand.
    """
    programs = (forward_program(form, config.forward), backward_program(form, config.backward))
    kernels = dict(config.kernels)
    for kernel in (k for program in programs for k in program.kernels):
        wanted = config.of(kernel.name)
        for rung in _ladder(wanted):
            if shared_bound(kernel, rung, config.chunk, dims, itemsize) <= shared:
                break
        if rung != wanted:
            kernels[kernel.name] = rung
    return replace(config, kernels=tuple(kernels.items()))


def shared_bound(
    kernel: Kernel, config: KernelConfig, chunk: int, dims: Dims, itemsize: int
) -> int:
    """About how many bytes of shared memory a program takes, rather too many than too few."""
    size = in_registers(dims_of(kernel, dims), Tiles(chunk, config.v_tile))
    buffers = kernel.buffers
    inside = outside = 0
    for t in kernel.order:
        if len(t.axes) == 2 and (t in buffers or t.op is TileOp.TOKEN):
            first, second = t.axes
            tile_bytes = size[first] * size[second] * itemsize
            if kernel.loop is Loop.PARALLEL and Axis.V not in t.axes:
                outside += tile_bytes
            else:
                inside += tile_bytes
    if kernel.segments is not None and any(p and p.matrix for p in kernel.segments.transitions):
        outside = max(outside, 4 * size[Axis.K] * (size[Axis.K] + size[Axis.V]))
    # what is loaded outside the loop reuses the room that the loop's tiles leave
    return max(config.stages * inside, outside) + _BESIDE_LOADS


def _ladder(wanted: KernelConfig) -> Iterator[KernelConfig]:
    for stages in range(wanted.stages, 0, -1):
        yield replace(wanted, stages=stages)
    v_tile = wanted.v_tile
    while v_tile > 16:
        v_tile //= 2
        yield replace(wanted, stages=1, v_tile=v_tile)
