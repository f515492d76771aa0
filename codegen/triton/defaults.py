"""The configuration used where nothing was tuned: rules over the graph, dimensions and dtype.

The rules come from sweeps on an H100 (docs/measured.md); a tuner replaces them by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...dsl.ir import Op
from .. import tile
from ..chunk import ChunkProgram
from ..config import Config, Dims, KernelConfig, padded
from ..gates import DECAYED
from ..plan import Hoist, Kernel, Plan, sums_over_values
from ..scans import has_gradient_scans
from ..tile import SQUARE, Axis, TileOp, summed_axes


@dataclass(frozen=True, slots=True)
class Features:
    """What of a chunk decides its kernels' shapes."""

    gated: bool
    vector_gated: bool
    solves: bool
    scores: int  # C x C products of operands
    turns: bool  # states turn by angles


def features(body: ChunkProgram) -> Features:
    """Read the features off the graph of `body`."""
    tiles = tile.topological(*(c.end for c in body.carried), *(t for _, t in body.outputs))
    ops = {t.op for t in tiles}
    return Features(
        gated=TileOp.CUMSUM in ops,
        vector_gated=not ops.isdisjoint(DECAYED),
        solves=TileOp.INVERSE in ops,
        scores=sum(t.op is TileOp.DOT and t.axes == SQUARE for t in tiles),
        turns=any(t.is_map(Op.COS) for t in tiles),
    )


def default_config(body: ChunkProgram, dims: Dims, *, wide_dtype: bool) -> Config:
    """A configuration that is right everywhere and good on an H100.

    `wide_dtype`: products of float32.
    """
    f = features(body)
    config = _config(body, f, dims, wide_dtype=wide_dtype)
    # rows of several writes and reads have a C x C tile for every pair
    shortest = next((chunk for scores, chunk in _SCORES if f.scores > scores), config.chunk)
    return replace(config, chunk=min(config.chunk, shortest))


def kept(body: ChunkProgram, dims: Dims) -> Hoist:
    """What a forward keeps for the backward on a Hopper GPU, in products of 16 bits (decision 95).

    What both would prepare: T where a system is solved, scores with it under a gate, scores under
    a vector gate. A tile of C x C takes 2 C bytes per token and value head.
    """
    f = features(body)
    if len(body.carried) > 1 or max(padded(dims.K), padded(dims.V)) > 128:  # not measured
        return Hoist.NOTHING
    if f.vector_gated or (f.gated and f.solves):
        return Hoist.SOLVES | Hoist.PRODUCTS
    return Hoist.SOLVES if f.solves else Hoist.NOTHING


_SCORES = ((9, 16), (4, 32))  # with more such tiles, chunks of so many rows at most


def _config(body: ChunkProgram, f: Features, dims: Dims, *, wide_dtype: bool) -> Config:
    hoist = Hoist.ALL if f.gated or f.solves else Hoist.NOTHING
    widest = max(padded(dims.K), padded(dims.V))
    # what holds too many float32 tiles at once is cut where it can be (decision 12)
    apart = f.vector_gated or wide_dtype or (f.solves and widest > 128)
    # a scan that sums over the value axis is not split along it
    late = sums_over_values(body)
    forward = Plan(hoist, outputs_in_scan=not late, sums_apart=late and apart, norms_apart=apart)
    backward = Plan(hoist, values_apart=apart, sums_apart=apart, norms_apart=apart)
    if widest <= 64 and not wide_dtype:
        # where states are small, scans in one launch hide more of one another's waiting
        backward = replace(backward, together=not apart)
    if widest <= 128 and not wide_dtype and has_gradient_scans(body):
        backward = Plan(hoist, outputs_in_scan=True, scans_apart=True, together=True)
    if 128 < widest <= 256 and not wide_dtype and len(body.carried) == 1:
        return _wide(forward, backward, f)
    if wide_dtype or widest > 128:
        # with 32 rows, wide kernels of half precision took up to twelve times as long as with 64
        short = f.vector_gated if not wide_dtype else widest > 64 or (f.vector_gated and f.solves)
        return _cautious(forward, backward, widest, 32 if short else 64)
    if f.vector_gated:
        return _vector_gated(forward, backward)
    matrices = sum(len(c.start.axes) == 2 for c in body.carried)
    held = matrices * padded(dims.K) * padded(dims.V)
    if held > _HELD:
        return _several(forward, backward, KernelConfig(64, 8, 2))
    if f.turns and held == _HELD:
        return _several(forward, backward, KernelConfig(64, 4, 3))
    narrow = widest <= 64
    # a delta step does more in sequence: where states are small, more programs hide more of it
    scan = KernelConfig(32 if f.solves and narrow else 64, 4, 3)
    if narrow and f.solves and f.gated:
        gradients = KernelConfig(32, 8, 3)
    elif narrow:
        gradients = KernelConfig(16 if f.solves else 32, 4, 4)
    elif f.solves or f.gated:
        gradients = KernelConfig(64, 8, 3)
    else:
        gradients = KernelConfig(32, 4, 2)
    kernels = [
        ("forward_prep", KernelConfig(64, 4, 1)),
        ("backward_prep", KernelConfig(64, 4, 1)),
        ("backward_gradients", gradients),
    ]
    if f.solves and not narrow:
        kernels.append(("backward_reverse", KernelConfig(64, 8, 3)))
    return Config(64, forward, backward, scan, tuple(kernels))


_HELD = 128 * 128  # numbers of states that the registers of a program of 64 columns have room for


def _several(forward: Plan, backward: Plan, scan: KernelConfig) -> Config:
    """For states that fill what registers there are: short chunks, and gradients by eight warps."""
    prep = KernelConfig(64, 4, 1)
    gradients = KernelConfig(64, 8, 1)
    kernels = (("forward_prep", prep), ("backward_prep", prep), ("backward_gradients", gradients))
    return Config(32, forward, backward, scan, kernels)


def token_config(kernel: Kernel, dims: Dims) -> Config:
    """For a kernel that takes one token at a time: many programs, each with few columns of a state.

    A warp then holds 32 numbers a thread; where sums over the value axis need all of its columns,
    eight warps do.
    """
    whole = kernel.shares_vectors or any(Axis.V in summed_axes(t) for t in kernel.order)
    tile = max(8, min(padded(dims.V), 512 // padded(dims.K)))
    nothing = Plan(Hoist.NOTHING, outputs_in_scan=True)
    return Config(1, nothing, nothing, KernelConfig(tile, 8 if whole else 1, 3))


def _vector_gated(forward: Plan, backward: Plan) -> Config:
    """Decayed products take many registers: short chunks, few keys at a time."""
    products = KernelConfig(64, 2, 1, k_tile=32)
    kernels = (
        ("forward_prep", products),
        ("backward_prep", products),
        ("backward_values", KernelConfig(64, 4, 2)),
        ("backward_sums", KernelConfig(128, 8, 2)),
        ("backward_gradients", KernelConfig(64, 2, 1, k_tile=16)),
        *_after_sums(forward, KernelConfig(128, 8, 2), products),
    )
    return Config(32, forward, backward, KernelConfig(64, 4, 3), kernels)


def _wide(forward: Plan, backward: Plan, f: Features) -> Config:
    """For one state of up to 256 channels in half precision: 64 of its columns on eight warps.

    A scan then has products of warp groups, and four programs read what it loads, not sixteen.
    """
    prep, sums = KernelConfig(64, 8, 3, k_tile=64), KernelConfig(32, 8, 1)
    gradients = KernelConfig(64, 8, 1)
    if f.vector_gated:
        prep = gradients = KernelConfig(64, 4, 1, k_tile=32)
        sums = sums if f.solves else KernelConfig(64, 8, 1)
    elif f.solves:
        prep = KernelConfig(64, 4, 2, k_tile=64)
        gradients = KernelConfig(64, 8, 2, k_tile=64) if f.gated else KernelConfig(64, 4, 3, 32)
    kernels = [
        ("forward_prep", prep),
        ("backward_prep", prep),
        ("backward_values", KernelConfig(64, 4, 2)),
        ("backward_sums", sums),
        ("backward_gradients", gradients),
        *_after_sums(forward, sums, prep),
    ]
    # a kernel for all gradients spills, one without those along the value axis does not
    if f.gated:
        backward = replace(backward, values_apart=True)
    elif not f.solves:  # with scores at hand more programs, of fewer columns, are faster
        forward = replace(forward, hoist=Hoist.PRODUCTS)
        kernels.append(("forward_scan", KernelConfig(32, 4, 2)))
    scan = KernelConfig(64, 8, 2)
    return Config(32 if f.vector_gated else 64, forward, backward, scan, tuple(kernels))


def _cautious(forward: Plan, backward: Plan, widest: int, chunk: int) -> Config:
    """Small tiles, for states or dtypes that fill registers and shared memory quickly."""
    v_tile = 32 if widest <= 128 else 16
    prep = KernelConfig(64, 4, 1, k_tile=32)
    parallel = KernelConfig(v_tile, 8, 1, k_tile=32)
    kernels = (
        ("forward_prep", prep),
        ("backward_prep", prep),
        ("backward_values", parallel),
        ("backward_sums", parallel),
        ("backward_gradients", parallel),
        *_after_sums(forward, parallel, prep),
    )
    return Config(chunk, forward, backward, KernelConfig(v_tile, 4, 1), kernels)


def _after_sums(
    forward: Plan, sums: KernelConfig, rest: KernelConfig
) -> tuple[tuple[str, KernelConfig], ...]:
    """The tiles of a forward's kernels behind its scan, where sums over V have one of their own."""
    return (("forward_sums", sums), ("forward_post", rest)) if forward.sums_apart else ()
