"""The configuration used where nothing was tuned: rules over the graph, dimensions and dtype."""

from __future__ import annotations

from . import tile
from .chunk import Body
from .config import Config, Dims, KernelConfig, padded
from .plan import Hoist, Plan
from .tile import TileOp


def default_config(body: Body, dims: Dims, *, wide_dtype: bool) -> Config:
    """A configuration that is right everywhere and good on an H100.

    `wide_dtype`: products of float32.
    """
    tiles = tile.topological(*(c.end for c in body.carried), *(t for _, t in body.outputs))
    solves = any(t.op is TileOp.INVERSE for t in tiles)
    vector = any(t.op is TileOp.DECAYED_DOT for t in tiles)
    gates = any(t.op is TileOp.CUMSUM for t in tiles)
    widest = max(padded(dims.K), padded(dims.V))
    chunk = 64
    if widest > 128 or (wide_dtype and widest > 64):
        chunk = 32
    hoist = Hoist.ALL if gates or solves else Hoist.NOTHING
    narrow = (
        32 if solves or gates else 64
    )  # measured: what has more to do per step wants more programs
    scan = KernelConfig(v_tile=narrow, warps=4, stages=3 if not solves else 2)
    gradients = (
        KernelConfig(v_tile=64, warps=8, stages=2) if gates or solves else KernelConfig(32, 4, 2)
    )
    if wide_dtype or widest > 128:
        scan = KernelConfig(v_tile=32 if widest <= 128 else 16, warps=4, stages=1)
        gradients = KernelConfig(v_tile=32 if widest <= 128 else 16, warps=8, stages=1)
    prep = KernelConfig(v_tile=64, warps=4, stages=1, k_tile=32)
    if vector:
        gradients = KernelConfig(v_tile=64, warps=4, stages=1, k_tile=32)
    sums = KernelConfig(v_tile=64 if not wide_dtype else 32, warps=8, stages=2 - wide_dtype)
    return Config(
        chunk=chunk,
        forward=Plan(hoist, outputs_in_scan=True),
        backward=Plan(hoist, values_apart=vector, sums_apart=vector),
        default=scan,
        kernels=(
            ("forward_prep", prep),
            ("backward_prep", prep),
            ("backward_values", KernelConfig(v_tile=64, warps=4, stages=2)),
            ("backward_sums", sums),
            ("backward_gradients", gradients),
        ),
    )
