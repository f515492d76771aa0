"""Kernels as data: what is loaded, computed and stored, where and when; printers write it down.

A program runs for one chunk, sequence or segment, one value head and one part of the value axis:

    TiledKernel   name, grid, loop, tiles' extents; statements before, inside and after the loop
      grid        CHUNK | SEQUENCE | SEGMENT of a sequence, x heads, x `v_parts`
      loop        none | over time, a chunk or token at a time | over tiles of a channel axis
      value       a tile of TileIR: its axes are C, BK and BV long; float32 but as loaded
      use         a value, the names of its axes there, the axes in whose padding it must be zero
      statement   Load      value <- an operand, number or buffer; zero where the mask says
                  Zero      value <- 0, which statements inside the loop add to
                  Compute   value <- (or +=) an op of TileIR of other values
                  Product   value <- (or +=) a matrix product, added to another value or not
                  Clean     value <- itself, zero in the padding of an axis
                  Store     buffer <- value, but what the mask leaves out
                  Begin     state <- what the call gives, zero or the identity
                  Arrive    state <- what the segments before this one make of it
                  Advance   states <- values, all at once
                  Finish    the call's final state, or the segment's end <- state

A mask names the axes of a tile along which entries may not exist: rows beyond the sequence's end,
channels beyond the operand's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

from .buffers import BufferId
from .config import Dims, Precision
from .interface import Dtype
from .plan import Loop
from .segments import Segments
from .tile import Axes, Axis, Tile


class Source(Enum):
    """Where a value is loaded from."""

    TOKENS = "an operand of the call, a row per token"
    HEADS = "an operand of the call, one per value head"
    NUMBER = "a float of the call"
    BUFFER = "what a kernel before stored"


class Use(NamedTuple):
    """A value as a statement uses it, its time axis under one name or the other.

    `clean`: along these axes it must be zero beyond the last channel, and may not be.
    """

    value: Tile
    axes: Axes
    clean: Axes = ()


@dataclass(frozen=True, slots=True)
class Load:
    """`value`, kept in `dtype`, from the operand or number of that name, or the buffer."""

    value: Tile
    source: Source
    of: BufferId | str
    dtype: Dtype
    mask: Axes


@dataclass(frozen=True, slots=True)
class Zero:
    """Zeros: what statements inside the loop add to."""

    value: Tile


@dataclass(frozen=True, slots=True)
class Compute:
    """The op of `value` of other values; `adds`: to what `value` holds.

    `dtype`: of the factors of its products, if it is made from any.
    """

    value: Tile
    args: tuple[Use, ...]
    dtype: Dtype
    adds: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix product of two values over an axis, factors in `dtype`, summed in float32.

    `left` has the product's rows. `start`: what it is added to; `adds`: to what `value` holds.
    """

    value: Tile
    left: Use
    right: Use
    over: Axis
    dtype: Dtype
    start: Use | None = None
    adds: bool = False


@dataclass(frozen=True, slots=True)
class Clean:
    """`value` as before, but zero beyond the last channel of an axis."""

    value: Tile
    axis: Axis


@dataclass(frozen=True, slots=True)
class Store:
    """A value to its buffer, repeated along those of `axes` that it lacks.

    `once`: by the program of the first part of the value axis alone.
    """

    buffer: BufferId
    use: Use
    axes: Axes
    mask: Axes
    once: bool


@dataclass(frozen=True, slots=True)
class Begin:
    """A carry as the loop begins. `from_call`: what the call gives, if anything, else zero."""

    value: Tile
    mask: Axes
    from_call: bool
    identity: bool


class Passed(NamedTuple):
    """What segments make of a carry: it is scaled by e^factor or multiplied by it, and added to.

    `end` and `factor`: buffers of what segments end with; `axes`: the factor's; `mask`: of the
    carry.
    """

    value: Tile
    end: BufferId
    mask: Axes
    factor: BufferId | None = None
    axes: Axes = ()
    is_matrix: bool = False


@dataclass(frozen=True, slots=True)
class Arrive:
    """The carries, from the sequence's start to this segment's: past each segment before it."""

    carries: tuple[Passed, ...]
    precision: Precision


@dataclass(frozen=True, slots=True)
class Advance:
    """Every carry as the next chunk begins, by what it ends this one as; all at once."""

    ends: tuple[tuple[Tile, Use], ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """A carry after the loop: to a buffer of segments' ends; else to the call, if it asks.

    `last`: by the segment that the scan ends with alone.
    """

    value: Tile
    end: BufferId | None
    mask: Axes
    once: bool
    last: bool


Statement: TypeAlias = (
    Load | Zero | Compute | Product | Clean | Store | Begin | Arrive | Advance | Finish
)


@dataclass(frozen=True, slots=True)
class TiledKernel:
    """A kernel, decided.

    Attributes:
        scan: over time, and in which direction; else one program per chunk.
        by_token: whether the scan takes single tokens, whose tiles have no axis of time.
        segments: of a scan of segments of sequences.
        channels: the channel axis that a loop takes tile by tile.
        dims: channels, as tiles hold states; `extents`: of a tile along each axis, maybe more.
        transposed: whether states of the call are held transposed.
        v_parts: programs along the value axis.
        order: how the axes of a tile lie, rows first.
        precision: of products of float32 factors.
        pooled: whether states are read from a pool and written there after each token.
        block: tokens of a block within which decays of a vector gate are split; 0: there are none.
    """

    name: str
    scan: Loop
    by_token: bool
    segments: Segments | None
    channels: Axis | None
    dims: Dims
    transposed: bool
    extents: dict[Axis, int]
    v_parts: int
    order: Axes
    precision: Precision
    block: int
    pooled: bool
    before: tuple[Statement, ...]
    inside: tuple[Statement, ...]
    after: tuple[Statement, ...]

    @property
    def statements(self) -> tuple[Statement, ...]:
        """All of them, in order."""
        return (*self.before, *self.inside, *self.after)

    @property
    def chunk(self) -> int:
        """Tokens in a chunk."""
        return self.extents[Axis.I]

    @property
    def turns(self) -> int:
        """Of the loop over channels; 0 without one."""
        if self.channels is None:
            return 0
        channels = self.dims.K if self.channels is Axis.K else self.dims.V
        return -(-channels // self.extents[self.channels])

    def is_padded(self, axis: Axis) -> bool:
        """Whether tiles reach beyond the last channel of `axis`."""
        return is_padded(self.dims, self.extents, axis)


def uses(statement: Statement) -> Iterator[Use]:
    """The uses of values by a statement, those that it changes aside."""
    if isinstance(statement, Compute):
        yield from statement.args
    elif isinstance(statement, Product):
        yield from (statement.left, statement.right)
        if statement.start is not None:
            yield statement.start
    elif isinstance(statement, Store):
        yield statement.use
    elif isinstance(statement, Advance):
        yield from (use for _, use in statement.ends)


def is_padded(dims: Dims, extents: dict[Axis, int], axis: Axis) -> bool:
    """Whether tiles with `extents` reach beyond the last channel of `axis`."""
    channels = {Axis.K: dims.K, Axis.V: dims.V}
    return axis in channels and channels[axis] % extents[axis] != 0
