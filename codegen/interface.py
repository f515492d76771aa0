"""What a kernel and its launcher agree on: dtypes, parameters, and the buffers between kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .buffers import BufferId, BufferKind
from .chunk import Carried
from .config import Dims, Precision
from .plan import Kernel
from .segments import Start
from .tile import TIMES, Axes, Axis, Tile, TileOp

_ENTRY = re.compile(r"_at\d+$")  # ends the name of a tuple's entry: `lower.entry_name`


class Dtype(Enum):
    """Element types by the names that torch, Triton and TVM give them."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is Dtype.FLOAT32 else 2


class Role(Enum):
    """What the launcher passes for a parameter of a kernel."""

    OPERAND = "a tensor of the call"
    STRIDE_BATCH = "its stride over batches"
    STRIDE_TOKEN = "its stride over tokens"
    STRIDE_HEAD = "its stride over heads"
    GROUP = "value heads per head of it"
    BUFFER = "an intermediate or result"
    INITIAL = "the carry's first value, or None"
    FINAL = "where the carry's last value goes, or None"
    PARAM = "a float of the call"
    POOL = "states, each in a slot, that the kernel reads and writes"
    STRIDE_KEY = "its stride over channels of Keys"
    STRIDE_VALUE = "its stride over channels of Values"
    SLOTS = "which slots a sequence's states are in, or how many of its tokens were accepted"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a printed kernel: `of` is a buffer, or names an operand, carry or float.

    `channels`: the channel axis of an operand, of which this is a stride.
    """

    name: str
    role: Role
    of: BufferId | str
    channels: Axis | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a kernel is printed for: dimensions, and the dtype of each operand.

    `dtype`: of products, of Keys and Values, and of the output.
    """

    dims: Dims
    dtype: Dtype
    dtypes: tuple[tuple[str, Dtype], ...]
    precision: Precision

    def of(self, operand: str) -> Dtype:
        """The dtype of an operand, or of an entry of a tuple (`lower.entry_name`)."""
        known = dict(self.dtypes)
        return known.get(operand) or known.get(_ENTRY.sub("", operand), self.dtype)


class Storage(NamedTuple):
    """How the kernels of a target keep intermediates.

    `wide`: in float32, gradients too, whatever the dtype of products. `transposed`: states as
    [V, K] in memory.
    """

    wide: bool
    transposed: bool


class Buffer(NamedTuple):
    """A buffer and what it is stored in; `axes` in the order in which they lie.

    `transposed`: the kernel holds states transposed, so that its axis K has the channels of Values.
    """

    name: BufferId
    axes: Axes
    dtype: Dtype
    transposed: bool = False

    @property
    def shape(self) -> tuple[str, ...]:
        """Its sizes by letter: a row per token (B, T), chunk or segment; HV; channels, or C.

        `chunks` and `segments` count those of all sequences.
        """
        times = [a for a in self.axes if a in TIMES][:1]
        keys, values = ("V", "K") if self.transposed else ("K", "V")
        size = {Axis.I: "C", Axis.J: "C", Axis.K: keys, Axis.V: values}
        rows: tuple[str, ...] = ("B", "T") if times else ("chunks",)
        if self.name.kind is BufferKind.SEGMENT_END:
            rows = ("segments",)
        return (*rows, "HV", *(size[a] for a in self.axes if a not in times))

    @property
    def is_partial(self) -> bool:
        """Whether it is a gradient in parts per chunk: programs beyond the last write none."""
        return self.name.kind is BufferKind.GRADIENT and "T" not in self.shape

    @property
    def is_result(self) -> bool:
        """Whether it is for the caller, not for later kernels alone."""
        return self.name.kind in (BufferKind.OUTPUT, BufferKind.GRADIENT)

    @property
    def is_saved(self) -> bool:
        """Whether the caller gives it to the forward, which fills it, and to the backward."""
        return self.name.kind is BufferKind.SAVED


def buffer(
    name: BufferId, t: Tile, signature: Signature, storage: Storage, *, transposed: bool = False
) -> Buffer:
    """The buffer that holds `t` under that name; `transposed`: of a kernel that holds states so.

    A gradient is in its operand's dtype where every value head has a head of it; where groups
    share one, launchers take float32 instead, and add up.
    """
    axes = t.axes[::-1] if storage.transposed and t.axes == (Axis.K, Axis.V) else t.axes
    if name.kind is BufferKind.OUTPUT:
        dtype = signature.dtype
    elif storage.wide:
        dtype = Dtype.FLOAT32
    elif name.kind in (BufferKind.INTERMEDIATE, BufferKind.SAVED):
        dtype = intermediate_dtype(t, signature.dtype)
    else:
        has_rows = Axis.I in t.axes or Axis.J in t.axes
        dtype = signature.of(name.of) if has_rows else Dtype.FLOAT32
    return Buffer(name, axes, dtype, transposed)


def intermediate_dtype(t: Tile, low: Dtype) -> Dtype:
    """Tiles of two axes are stored in the dtype of products; vectors and numbers in float32.

    So are prefix sums of gates: they are exponents, whose absolute error is a relative one.
    """
    return low if len(t.axes) == 2 and t.op is not TileOp.CUMSUM else Dtype.FLOAT32


def segment_end(carried: Carried, *, matrix: bool = False, transposed: bool = False) -> Buffer:
    """The buffer of what a carry is as each segment ends; `matrix`: of one that is K x K."""
    axes = (Axis.K, Axis.K) if matrix else carried.start.axes
    name = BufferId(BufferKind.SEGMENT_END, carried.name)
    return Buffer(name, axes, Dtype.FLOAT32, transposed)


def ends_stored(kernel: Kernel) -> tuple[Buffer, ...]:
    """What a scan for the ends of segments stores."""
    if kernel.segments is None or not kernel.segments.ends:
        return ()
    matrix = kernel.segments.start is Start.IDENTITY
    transposed = kernel.transposed
    return tuple(segment_end(c, matrix=matrix, transposed=transposed) for c in kernel.carried)


def ends_before(kernel: Kernel) -> tuple[Buffer, ...]:
    """The ends of segments that a scan of segments starts from."""
    if kernel.segments is None or kernel.segments.ends:
        return ()
    transitions = dict.fromkeys(p for p in kernel.segments.transitions if p is not None)
    ends = [(c, False) for c in kernel.carried] + [(p.carried, p.matrix) for p in transitions]
    transposed = kernel.transposed
    return tuple(segment_end(c, matrix=matrix, transposed=transposed) for c, matrix in ends)


def stored(kernel: Kernel, signature: Signature, storage: Storage) -> tuple[Buffer, ...]:
    """The buffers that a kernel stores."""
    transposed = kernel.transposed
    own = (buffer(n, t, signature, storage, transposed=transposed) for n, t in kernel.stores)
    return (*own, *ends_stored(kernel))


def loaded(kernel: Kernel, signature: Signature, storage: Storage) -> tuple[Buffer, ...]:
    """The buffers that a kernel finds stored by others, and loads."""
    found = (
        buffer(n, t, signature, storage, transposed=kernel.transposed)
        for t, n in kernel.buffers.items()
    )
    return (*found, *ends_before(kernel))
