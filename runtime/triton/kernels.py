"""What launches have to know of printed kernels: their parameters, and the buffers between them.

This file imports torch only, because exported packages carry it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

# what a parameter is given: an "operand", "initial" state, "table", "param" (a float), "buffer" or
# "final" state, and which one
Source = tuple[str, str]


class Buffer(NamedTuple):
    """A buffer that a kernel is the first to write.

    Attributes:
        shape: its sizes by letter: B, T, HV, K, V, C (rows of a chunk), chunks, segments.
        gradient_of: the operand whose gradient it has for every row and value head: in float32
            where several value heads share a head of that.
        zeroed: whether kernels do not write all of it.
        scratch: whether only kernels of the same direction read it.
    """

    name: str
    shape: tuple[str, ...]
    dtype: torch.dtype
    gradient_of: str | None = None
    zeroed: bool = False
    scratch: bool = False


class Kernel(NamedTuple):
    """What its launch has to know of a printed kernel.

    Attributes:
        programs: what the grid counts beside value heads: "chunks", "sequences" or "segments".
        parts: programs along the value axis.
        constants: values of parameters that are the same in every call.
        options: Triton's, with `num_stages` as configured.
        sources: what other parameters are given.
        strides: of which operand, along which axis, by parameter.
        groups: the operand whose heads the value heads share, by parameter.
        blocks: rows and columns of the blocks that TMA moves, by parameter: it is a descriptor.
        persistent: programs of a multiprocessor that take all that there is in turns; 0: each one.
    """

    name: str
    programs: str
    parts: int
    constants: Mapping[str, int]
    options: Mapping[str, int | bool]
    sources: Mapping[str, Source]
    strides: Mapping[str, tuple[str, int]]
    groups: Mapping[str, str]
    stores: tuple[Buffer, ...]
    blocks: Mapping[str, tuple[int, int]] = MappingProxyType({})
    persistent: int = 0
