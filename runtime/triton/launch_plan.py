"""What one direction of a call launches: grids, arguments and buffers, once per layout of a call.

A training step repeats the layout of the step before, so that a call has only tensors to put in.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from ...codegen.buffers import BufferId, BufferKind
from ...codegen.interface import Buffer, Role
from ...codegen.plan import Loop
from ...codegen.triton.kernel import STAGES, TritonKernel
from ..engines import CannotRun
from ..printed import TORCH

TABLES = ("cu_seqlens", "chunk_offsets", "chunk_table", "segment_table")


@dataclass(slots=True, eq=False)
class Bound:
    """An emitted kernel and its function (a triton.JITFunction: Triton has no types).

    `stages`: of its pipelined loop; fewer than configured where shared memory turned out too small.
    """

    kernel: TritonKernel
    function: Any
    stages: int = 0

    def __post_init__(self) -> None:
        self.stages = self.stages or self.kernel.config.stages

    def launch(self, grid: tuple[int, int, int], arguments: list[object]) -> Any:
        """Compile if need be, and launch; the machine code that served (None if interpreted).

        The bound by which configurations are made to fit (codegen/triton/fit.py) is no guarantee:
        fewer stages keep the tiles and the results.

        Raises:
            CannotRun: one stage is too much as well, or Triton does not compile the kernel.
        """
        while True:
            self._set_stages(arguments)
            try:
                return self.function[grid](*arguments, **self.kernel.config.options(self.stages))
            except OutOfResources as lack:
                if self.stages == 1:
                    name = self.kernel.name
                    raise CannotRun(f"{name} does not fit this GPU: {lack}") from lack
                self.stages -= 1
            except TritonError as why:
                raise CannotRun(f"{self.kernel.name} does not compile: {why}") from why

    def compile(self, grid: tuple[int, int, int], arguments: list[object]) -> None:
        """Compile ahead of `launch`, which tries again, and says what is wrong.

        Python's own parser fails now and then where several threads are in it. `identify` first:
        Triton keeps what it hashes meanwhile, whole or not.
        """
        self._set_stages(arguments)
        options = self.kernel.config.options(self.stages)
        with contextlib.suppress(Exception):
            self.function.warmup(*arguments, grid=grid, **options)

    def identify(self) -> str:
        """Triton's hash of the kernel and of all that it calls, taken once."""
        return str(self.function.cache_key)

    def _set_stages(self, arguments: list[object]) -> None:
        names = self.function.arg_names
        if STAGES in names:
            arguments[names.index(STAGES)] = self.stages


class OperandLayout(NamedTuple):
    """A tensor of the call: `strides` and `heads` of tokens; per-head operands have heads 0."""

    name: str
    dtype: torch.dtype
    heads: int
    strides: tuple[int, ...]


class Layout(NamedTuple):
    """What of a call decides its launches, all but what its tensors hold.

    `chunks`, `segments`: of all sequences together; `segment`: chunks of one of these; `packed`:
    the dtype of `cu_seqlens`; `carries`: name, shape of the state, dtype of the first value if one
    is given. In the order in which a call's tensors are numbered: operands, carries, tables,
    params.
    """

    B: int
    T: int
    HV: int
    K: int
    V: int
    N: int
    chunk: int
    chunks: int
    segment: int
    segments: int
    packed: torch.dtype | None
    dtype: torch.dtype
    device: torch.device
    operands: tuple[OperandLayout, ...]
    carries: tuple[tuple[str, tuple[int, ...], torch.dtype | None], ...]
    params: tuple[str, ...]


class New(NamedTuple):
    """A tensor that a kernel is first to write; `zeroed` where it does not write all of it.

    `scratch`: only kernels of the same direction read it.
    """

    name: BufferId | str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool = False
    scratch: bool = False

    @property
    def bytes(self) -> int:
        """Its size, rounded up so that what lies behind it is aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 256) * 256


@dataclass(slots=True, eq=False)
class Launched:
    """A kernel of a known layout: `slots` say which argument takes which of the call's tensors.

    `again`: launches the machine code that served it, given arguments and a stream, for calls
    whose pointers are aligned like those. `seen`: whether it was compiled for any call.
    """

    bound: Bound
    grid: tuple[int, int, int]
    values: tuple[object, ...]
    slots: tuple[tuple[int, int], ...]
    new: tuple[New, ...]
    again: Any = None
    seen: bool = False

    def compile(self, tensors: Sequence[Tensor | float | None]) -> None:
        """Compile for a call with these tensors, on the current device."""
        self.bound.compile(self.grid, self._arguments(tensors))

    def run(self, tensors: Sequence[Tensor | float | None], *, aligned: bool) -> None:
        """Launch on the current device and stream; `aligned`: every pointer is."""
        compiled = self.bound.launch(self.grid, self._arguments(tensors))
        if aligned and compiled is not None:
            self.again = compiled[self.grid]

    def _arguments(self, given: Sequence[Tensor | float | None]) -> list[object]:
        arguments = list(self.values)
        for argument, number in self.slots:
            arguments[argument] = given[number]
        return arguments


@dataclass(frozen=True, slots=True, eq=False)
class LaunchPlan:
    """The launches of one direction; `buffers` and `ends`: where its results are numbered.

    `scratch`: bytes of the buffers that are none.
    """

    launches: tuple[Launched, ...]
    buffers: tuple[tuple[BufferId, int], ...]
    ends: tuple[tuple[str, int], ...]
    scratch: int

    @property
    def compiled(self) -> bool:
        """Whether every kernel has run before."""
        return None not in [x.again for x in self.launches]


@lru_cache(maxsize=1024)
def plan_launches(
    kernels: tuple[Bound, ...], layout: Layout, given: tuple[Buffer, ...] = ()
) -> LaunchPlan:
    """The launches of `kernels`, in order, for calls of `layout`.

    `given`: buffers that none of them stores (those of kernels left out): the first one's new.
    """
    operands = {o.name: o for o in layout.operands}
    number: dict[tuple[Role | None, BufferId | str], int] = {}
    for role, names in (
        (Role.OPERAND, [o.name for o in layout.operands]),
        (Role.INITIAL, [name for name, _, _ in layout.carries]),
        (None, TABLES),
        (Role.PARAM, layout.params),
    ):
        for name in names:
            number[role, name] = len(number)
    shapes = {name: shape for name, shape, _ in layout.carries}
    launches = []
    for bound in kernels:
        kernel = bound.kernel
        buffers = (*given, *kernel.stores) if bound is kernels[0] else kernel.stores
        new = [_buffer(b, layout, operands) for b in buffers]
        new = [b for b in new if (Role.BUFFER, b.name) not in number]
        for b in new:
            number[Role.BUFFER, b.name] = len(number)
        for p in kernel.parameters:
            if p.role is Role.FINAL:
                number[Role.FINAL, p.of] = len(number)
                new.append(New(p.of, shapes[str(p.of)], torch.float32))
        launches.append(_launched(bound, layout, operands, number, tuple(new)))
    made = [b for x in launches for b in x.new]
    return LaunchPlan(
        tuple(launches),
        tuple(
            (b.name, number[Role.BUFFER, b.name])
            for b in made
            if not b.scratch and isinstance(b.name, BufferId)
        ),
        tuple((str(name), i) for (role, name), i in number.items() if role is Role.FINAL),
        sum(b.bytes for b in made if b.scratch),
    )


def _launched(
    bound: Bound,
    layout: Layout,
    operands: dict[str, OperandLayout],
    number: dict[tuple[Role | None, BufferId | str], int],
    new: tuple[New, ...],
) -> Launched:
    kernel = bound.kernel
    fixed: dict[str, object] = {
        **dict(kernel.constants),
        "TOKENS": layout.T,
        "chunks": -(-layout.T // layout.chunk),
        "HV": layout.HV,
        "SEGMENT": layout.segment,
        "PACKED": layout.packed is not None,
    }
    tensors = {name: number[None, name] for name in TABLES}
    for p in kernel.parameters:
        if p.role in _STRIDES:
            fixed[p.name] = operands[str(p.of)].strides[_STRIDES[p.role]]
        elif p.role is Role.GROUP:
            fixed[p.name] = layout.HV // operands[str(p.of)].heads
        else:
            tensors[p.name] = number[p.role, p.of]
    names = list(bound.function.arg_names)
    programs = layout.chunks if kernel.loop is Loop.PARALLEL else layout.N
    programs = layout.segments if kernel.segments else programs
    return Launched(
        bound=bound,
        grid=(programs * layout.HV * kernel.v_programs, 1, 1),
        values=tuple(fixed.get(name) for name in names),
        slots=tuple((names.index(name), i) for name, i in tensors.items() if name in names),
        new=new,
    )


_STRIDES = {Role.STRIDE_BATCH: 0, Role.STRIDE_TOKEN: 1, Role.STRIDE_HEAD: 2}


def _buffer(buffer: Buffer, layout: Layout, operands: dict[str, OperandLayout]) -> New:
    size = {
        **{"B": layout.B, "T": layout.T, "HV": layout.HV, "K": layout.K, "V": layout.V},
        **{"C": layout.chunk, "chunks": layout.chunks, "segments": layout.segments},
    }
    shape, dtype = tuple(size[n] for n in buffer.shape), TORCH[buffer.dtype]
    if buffer.name.kind is BufferKind.GRADIENT and not buffer.is_partial:
        grouped = operands[buffer.name.of].heads != layout.HV
        dtype = torch.float32 if grouped else dtype
    scratch = not buffer.is_result
    return New(buffer.name, shape, dtype, zeroed=buffer.is_partial, scratch=scratch)
