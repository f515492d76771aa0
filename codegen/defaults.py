"""The configuration used where nothing was tuned: rules over the graph, the dimensions and the dtype."""

from __future__ import annotations

from . import tile
from .chunk import Body
from .config import Config, Dims, KernelConfig, padded
from .plan import Hoist, Plan
from .tile import TileOp


def default_config(body: Body, dims: Dims, *, wide_dtype: bool) -> Config:
    """A configuration that is right everywhere and good on an H100. `wide_dtype`: float32 products."""
    tiles = tile.topological(*(c.end for c in body.carried), *(t for _, t in body.outputs))
    solves = any(t.op is TileOp.INVERSE for t in tiles)
    vector = any(t.op is TileOp.DECAYED_DOT for t in tiles)
    widest = max(padded(dims.K), padded(dims.V))
    chunk = 64
    if widest > 128 or (wide_dtype and widest > 64) or (vector and wide_dtype):
        chunk = 32
    v_tile = 64 if widest <= 128 and not wide_dtype else 32
    gates = any(t.op is TileOp.CUMSUM for t in tiles)
    hoist = Hoist.ALL if solves or vector else (Hoist.PREFIXES if gates else Hoist.NOTHING)
    wide = KernelConfig(v_tile=min(v_tile, 64), warps=8 if widest > 64 else 4, stages=1)
    return Config(
        chunk=chunk,
        forward=Plan(hoist, outputs_in_scan=True),
        backward=Plan(hoist),
        default=KernelConfig(v_tile=v_tile, warps=4, stages=1 if wide_dtype else 2),
        kernels=(
            ("forward_prep", KernelConfig(v_tile=64, warps=4, stages=1)),
            ("backward_prep", KernelConfig(v_tile=64, warps=4, stages=1)),
            ("backward_gradients", wide),
        ),
    )
