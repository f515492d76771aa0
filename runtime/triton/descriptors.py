"""Tensors as matrices that Hopper's TMA moves blocks of, and the calls for which they are such.

This file imports torch, triton and files of the same kind, because exported packages carry it as it
is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .kernels import Kernel

if TYPE_CHECKING:
    from .launch_plan import Layout, OperandLayout

_HOPPER = (9, 0)
_ALIGNED = 8  # elements of 16 bits in 16 bytes


class _Address(NamedTuple):
    """What Triton asks of a tensor that it describes."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class Block(NamedTuple):
    """An argument that describes the matrix which tensor `number` is.

    `matrix`: a `TensorDescriptor` of no tensor (Triton has no types).
    """

    argument: int
    number: int
    matrix: Any

    def of(self, given: Any) -> Any:
        """The description of a tensor, or of what lies at an address."""
        made = copy(self.matrix)
        address = given if isinstance(given, int) else given.data_ptr()
        made.base = _Address(address, torch.bfloat16)
        return made


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of `device`; that of an H100 where it is no GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def takes(kernel: Kernel, layout: Layout) -> bool:
    """Whether a kernel in Gluon can serve calls of `layout`.

    It can on a GPU of compute capability 9.0, if the heads of each operand lie within the rows of
    tokens that TMA takes it for, and scans do not run on segments.
    """
    if not is_hopper(layout.device):
        return False
    if layout.segment or not layout.T:
        return False
    named = {kernel.sources[p] for p in kernel.blocks}
    loaded = [o for o in layout.operands if ("operand", o.name) in named]
    return all(is_matrix(o, layout.B) for o in loaded)


def is_matrix(o: OperandLayout, B: int) -> bool:
    """Whether TMA can take an operand of B sequences for a matrix of tokens' rows."""
    batch, token, head, channel = o.strides
    within = (o.heads - 1) * head < token
    return within and channel == 1 and token % _ALIGNED == 0 and (B == 1 or batch % token == 0)


def block_of(
    kernel: Kernel,
    name: str,
    layout: Layout,
    argument: int,
    number: int,
    letters: Mapping[str, tuple[str, ...]],
) -> Block:
    """The argument for the parameter `name`, tensor `number` of a call.

    An operand has a row per token of the call, a buffer one per token or, of chunks, per entry of
    all its axes but the last. `letters`: the sizes of buffers by letter.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = list(kernel.blocks[name])
    kind, of = kernel.sources[name]
    if kind == "operand":
        (operand,) = (o for o in layout.operands if o.name == of)
        batch, columns, *_ = operand.strides
        rows = (layout.B - 1) * (batch // columns) + layout.T
    else:
        shape = [layout.sizes[n] for n in letters[of]]
        cut = 2 if letters[of][0] == "B" else len(shape) - 1
        rows, columns = math.prod(shape[:cut]), math.prod(shape[cut:])
    base = _Address(0, torch.bfloat16)
    arrangement = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    matrix = TensorDescriptor(base, [rows, columns], [columns, 1], block, arrangement)
    return Block(argument, number, matrix)
