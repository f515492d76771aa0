"""What a printed Triton kernel is, as data: its parameters, what it was printed for, its source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .config import Dims, KernelConfig, Precision
from .plan import Loop
from .tile import Axes, Tile, TileOp

STAGES = "STAGES"  # the parameter of scans that says how deep their loop is pipelined


class Dtype(Enum):
    """Element types by their Triton names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


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


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a printed kernel: `of` names the operand, buffer, carry or float."""

    name: str
    role: Role
    of: str


class Buffer(NamedTuple):
    """An intermediate or result of a kernel: its axes, and what it is stored in.

    `per_segment`: one for each segment of a sequence, as users see states; else for each chunk or
    token.
    """

    name: str
    axes: Axes
    dtype: Dtype
    per_segment: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """What a kernel is printed for: dimensions, and the dtype of each operand."""

    dims: Dims
    dtype: Dtype
    dtypes: tuple[tuple[str, Dtype], ...]
    precision: Precision

    def of(self, operand: str) -> Dtype:
        return dict(self.dtypes).get(operand, self.dtype)


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """A printed kernel.

    `v_programs`: programs along the value axis; `segments`: whether it is a scan of segments.
    """

    name: str
    loop: Loop
    source: str
    parameters: tuple[Parameter, ...]
    v_programs: int
    constants: tuple[tuple[str, int], ...]
    config: KernelConfig
    stores: tuple[Buffer, ...]
    functions: frozenset[str]
    segments: bool = False


def buffer_dtype(t: Tile, low: Dtype) -> Dtype:
    """Tiles of two axes are stored in the dtype of products; vectors and numbers in float32.

    So are prefix sums of gates: they are exponents, whose absolute error is a relative one.
    """
    return low if len(t.axes) == 2 and t.op is not TileOp.CUMSUM else Dtype.FLOAT32
