"""Says which tiled kernels the Gluon printer can have, and why not the others."""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable

from .. import tiled
from ..config import KernelConfig
from ..expressions import unaliased
from ..gates import DECAYED, gate_of
from ..interface import Buffer, Dtype, Signature
from ..plan import Loop
from ..tile import SQUARE, TIMES, Axis, Tile, TileOp
from .expressions import FUNCTIONS, OPERATORS
from .memory import MOST_SHARED, GluonKernel

CHUNK = 64  # rows of a product of one warp group, and tokens whose scores its registers can hold
_WIDTHS = (64, 128)  # channels that a tile of shared memory is swizzled for, and registers can hold
ROWS_OF_WARP = 16  # of a product's sums
_IN_CHUNKS = (TileOp.SUM, TileOp.ROWS, TileOp.MASK, TileOp.DECAY, TileOp.INVERSE)
NO_PRODUCTS = "it has no products"
_OPERATIONS = 64  # of a vector, those of its parts at each of their uses
_WARPS = (4, 8)  # that take one chunk's rows


def refusal(kernel: tiled.TiledKernel, signature: Signature, config: KernelConfig) -> str | None:
    """Why the printer cannot have `kernel`; None if it can."""
    why = _of_shape(kernel, signature, config) or _of_vectors(kernel)
    loaded = frozenset(s.value for s in kernel.statements if isinstance(s, tiled.Load))
    for s in kernel.statements:
        why = why or _of_statement(s, loaded)
    return why


def refusal_of_chunks(
    kernel: tiled.TiledKernel, signature: Signature, config: KernelConfig
) -> str | None:
    """Why the printer cannot have `kernel`, which is parallel over chunks; None if it can."""
    why = _of_program(kernel, signature)
    if config.warps not in _WARPS:
        why = why or f"its {config.warps} warps are no one or two warp groups"
    if not any(map(_multiplies, kernel.statements)):
        why = why or NO_PRODUCTS
    loaded = exact_loads(kernel)
    for s in kernel.statements:
        why = why or _of_chunk_statement(s)
        if isinstance(s, tiled.Compute) and s.value.op in DECAYED:
            why = why or _of_decayed(kernel, s.value, loaded)
    return why


def exact_loads(kernel: tiled.TiledKernel) -> frozenset[Tile]:
    """The tiles that are loaded in bfloat16."""
    loads = (s for s in kernel.statements if isinstance(s, tiled.Load))
    return frozenset(s.value for s in loads if s.dtype is Dtype.BFLOAT16)


def is_exact(x: Tile, loaded: Container[Tile]) -> bool:
    """Whether all numbers of `x` are those of bfloat16."""
    x = unaliased(x)
    if x.op is TileOp.FLOOR:
        (word,) = struct.unpack("<I", struct.pack("<f", x.attrs[0]))
        return word & 0xFFFF == 0 and is_exact(x.args[0], loaded)
    return x in loaded


def _multiplies(s: tiled.Statement) -> bool:
    decayed = isinstance(s, tiled.Compute) and s.value.op in DECAYED
    return decayed or isinstance(s, tiled.Product)


def _of_decayed(kernel: tiled.TiledKernel, x: Tile, loaded: Container[Tile]) -> str | None:
    if x.op is TileOp.DECAYED_CROSSING:
        return "it sums what crosses each token"
    gate = gate_of(x)
    if gate.exclusive or gate.factor or gate.axis is not Axis.K:
        return "its vector gate is no plain one of keys"
    if not is_exact(gate.log_decay, loaded):
        return "its log-decays are no operand in bfloat16"
    factors = x.args[:2] if x.op is TileOp.DECAYED_DOT else x.args[1:2]
    if not all(unaliased(y) in loaded for y in factors):
        return "it decays tiles that it computes"
    if 2 * kernel.block != kernel.chunk:
        return f"its decays are split within {kernel.block} of {kernel.chunk} tokens"
    return None


def too_large(printed: GluonKernel) -> GluonKernel | str:
    """`printed`, or that a program has no such shared memory."""
    if printed.shared <= MOST_SHARED:
        return printed
    return f"its tiles take {printed.shared // 1024} KB of shared memory"


def of_stores(buffers: Iterable[Buffer], *, matrices: bool = False) -> str | None:
    """Why TMA cannot write `buffers`: tiles of shared memory are bfloat16.

    `matrices`: that it writes those alone.
    """
    sent = (b for b in buffers if not matrices or len(b.axes) == 2)
    wide = next((b for b in sent if b.dtype is not Dtype.BFLOAT16), None)
    return wide and f"it stores {wide.name} in {wide.dtype.value}"


def _of_shape(kernel: tiled.TiledKernel, signature: Signature, config: KernelConfig) -> str | None:
    if kernel.scan is Loop.PARALLEL or kernel.by_token:
        return "it is no scan over chunks"
    if kernel.segments is not None:
        return "it scans segments of sequences"
    scores = any(isinstance(s, tiled.Product) and s.value.axes == SQUARE for s in kernel.statements)
    why = _of_program(kernel, signature, (CHUNK,) if scores else (CHUNK // 2, CHUNK))
    if why is not None:
        return why
    values = kernel.extents[Axis.V]
    if config.warps * ROWS_OF_WARP != values:
        return f"its {config.warps} warps take {ROWS_OF_WARP * config.warps} rows of {values}"
    if sum(isinstance(s, tiled.Begin) for s in kernel.statements) != 1:
        return "it carries several states"
    return None


def _of_program(
    kernel: tiled.TiledKernel, signature: Signature, chunks: tuple[int, ...] = (CHUNK,)
) -> str | None:
    keys, values = kernel.extents[Axis.K], kernel.extents[Axis.V]
    if signature.dtype is not Dtype.BFLOAT16:
        return f"its products are of {signature.dtype.value}, and the printer has those of bfloat16"
    if kernel.chunk not in chunks:
        return f"its chunks have {kernel.chunk} tokens, and tiles of a warp group have {CHUNK}"
    if any(kernel.is_padded(a) for a in (Axis.K, Axis.V)):
        return "K or V is padded to its tiles, and TMA would take a neighbour's channels for it"
    if keys not in _WIDTHS or values not in _WIDTHS:
        return f"its states' tiles are {keys} x {values}, and of 64 or 128 channels each they fit"
    return None


def _of_statement(s: tiled.Statement, loaded: frozenset[Tile]) -> str | None:
    if isinstance(s, tiled.Load):
        return _of_load(s)
    if isinstance(s, tiled.Compute):
        return _of_compute(s)
    if isinstance(s, tiled.Product):
        return _of_product(s, loaded)
    if isinstance(s, tiled.Store):
        of_state = Axis.K in s.axes
        whole = s.axes == (Axis.K, Axis.V) or (len(s.axes) == 2 and Axis.V in s.axes)
        same = {*s.use.axes} == {*s.axes} and s.use.value.op is not TileOp.CONST
        if not whole or not same or s.once:
            return f"it stores {s.buffer}, which is no tile of its part of the value axis"
        if of_state and s.use.value.op is not TileOp.CARRY:
            return f"it stores {s.buffer}, a state that it does not carry"
        return None
    if isinstance(s, tiled.Begin):
        return None if s.value.axes == (Axis.K, Axis.V) and not s.identity else _STATE
    if isinstance(s, tiled.Advance):
        return None if all(u.axes == (Axis.K, Axis.V) for _, u in s.ends) else _STATE
    if isinstance(s, tiled.Finish):
        return None
    return f"it has a statement for which there is no row: {type(s).__name__.lower()}"


def _of_vectors(kernel: tiled.TiledKernel) -> str | None:
    """Vectors are computed where they are used, in the layout of what uses them."""
    counts: dict[Tile, int] = {}
    for s in kernel.statements:
        if isinstance(s, tiled.Compute) and len(s.value.axes) < 2:
            counts[s.value] = 1 + sum(counts.get(u.value, 0) for u in s.args)
    most = max(counts.values(), default=0)
    return f"it would compute a vector by {most} operations" if most > _OPERATIONS else None


_STATE = "what it carries is no matrix of keys and values"


def _of_load(s: tiled.Load) -> str | None:
    axes = s.value.axes
    if s.source in (tiled.Source.HEADS, tiled.Source.NUMBER):
        return None if not axes else f"it loads {s.of}, a vector of channels per head"
    if len(axes) == 2 and (axes[0] not in TIMES or s.dtype is not Dtype.BFLOAT16):
        return f"it loads {s.of}, which is no tile of bfloat16 by tokens"
    if axes == (Axis.V,) or (axes == (Axis.K,) and s.source is not tiled.Source.BUFFER):
        return f"it loads {s.of}, a vector of channels"
    return None


def _of_compute(s: tiled.Compute) -> str | None:
    x = s.value
    axes = [a for a in x.axes if a not in TIMES]
    if len(x.axes) == 2 and axes == [Axis.K]:
        return "it computes a tile of keys, which its products take from shared memory"
    if x.axes in ((Axis.K,), (Axis.V,)):
        return "it computes vectors of channels"
    if x.op is TileOp.MAP and x.attrs[0] in (*FUNCTIONS, *OPERATORS):
        return None
    if x.op in (TileOp.ROWS, TileOp.MASK):
        return None
    name = x.attrs[0].name if x.op is TileOp.MAP else x.op.name  # type: ignore[union-attr]
    return f"it computes {name.lower()} within the scan"


def _of_product(s: tiled.Product, loaded: frozenset[Tile]) -> str | None:
    axes, right = s.value.axes, s.right.value
    if s.left.clean or s.right.clean or s.adds:
        return "it has a product of padded tiles"
    if s.over is Axis.V or len(axes) != 2 or (Axis.V not in axes and Axis.K in axes):
        return "it has a product that no warp group of rows of the value axis can take"
    if right not in loaded and right.axes != SQUARE:
        return "it has a product by a tile of channels that it computes"
    if Axis.V not in axes and not {s.left.value, right} <= loaded:
        return "it has scores of tiles that it computes"
    return None


def _of_chunk_statement(s: tiled.Statement) -> str | None:
    if isinstance(s, tiled.Load):
        of_state = s.value.axes == (Axis.K, Axis.V) and s.dtype is Dtype.BFLOAT16
        return None if of_state else _of_load(s)
    if isinstance(s, tiled.Product):
        clean = s.left.clean or s.right.clean
        rows = len(s.value.axes) == 2 and s.value.axes[0] in TIMES
        return "it has a product of padded tiles" if clean or not rows else None
    if isinstance(s, tiled.Store):
        own = {*s.use.axes} == {*s.axes} and s.use.value.op is not TileOp.CONST
        rows = not s.axes or s.axes[0] in TIMES or s.axes == (Axis.K,)
        return None if own and rows else f"it stores {s.buffer}, which is no tile of its rows"
    if isinstance(s, tiled.Compute):
        return _of_chunk_compute(s.value)
    return f"it has a statement for which there is no row: {type(s).__name__.lower()}"


def _of_chunk_compute(x: Tile) -> str | None:
    if x.axes == (Axis.V,):
        return "it computes vectors of channels"
    if x.op in _IN_CHUNKS or x.op in DECAYED:
        return None
    if x.op in (TileOp.CUMSUM, TileOp.FLOOR) and Axis.V not in x.axes:
        return None
    if x.op is TileOp.STEP and len(x.axes) < 2:
        return None
    if x.op is TileOp.MAP and x.attrs[0] in (*FUNCTIONS, *OPERATORS):
        return None
    name = x.attrs[0].name if x.op is TileOp.MAP else x.op.name  # type: ignore[union-attr]
    return f"it computes {name.lower()}"
