"""Launches of printed kernels: grids, arguments and buffers, worked out once per layout of a call.

A training step repeats the layout of the step before, so that a call has only tensors to put in.

This file imports torch, triton and files of the same kind, because exported packages carry it as it
is.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from ..cannot_run import CannotRun
from ..packing import chunk_bound, chunk_table
from .descriptors import Block, block_of, multiprocessors, takes
from .kernels import Buffer, Kernel, Source

TABLES = ("cu_seqlens", "chunk_offsets", "chunk_table", "segment_table")
NO_TABLES = (None,) * len(TABLES)  # where sequences are not packed
STAGES = "STAGES"  # the parameter of scans that says how deep their loop is pipelined
_COMPILING = threading.Lock()
_INTERPRETED = triton.knobs.runtime.interpret  # kernels are then Python, and constants numbers

Given = Tensor | float | None  # what a kernel is given: a tensor, a float of the call, nothing


@dataclass(slots=True, eq=False)
class LoadedKernel:
    """A printed kernel and its function (a triton.JITFunction: Triton has no types).

    `stages`: of its pipelined loop; fewer than configured where shared memory turned out too small.
    `gluon`: the same kernel for Hopper GPUs and calls that `takes` admits.
    """

    kernel: Kernel
    function: Any
    stages: int = 0
    gluon: LoadedKernel | None = None

    def __post_init__(self) -> None:
        self.stages = self.stages or self.kernel.options["num_stages"]

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
                return self.function[grid](*arguments, **self._options)
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
        with contextlib.suppress(Exception):
            self.function.warmup(*arguments, grid=grid, **self._options)

    def identify(self) -> str:
        """Triton's hash of the kernel and of all that it calls, taken once."""
        return str(self.function.cache_key)

    @property
    def _options(self) -> dict[str, int | bool]:
        return {**self.kernel.options, "num_stages": self.stages}

    def _set_stages(self, arguments: list[object]) -> None:
        names = self.function.arg_names
        if STAGES in names:
            arguments[names.index(STAGES)] = self.stages


class OperandLayout(NamedTuple):
    """A tensor of the call: `strides` and `heads` of tokens; per-head operands have heads 0.

    A pool of states has strides of its slots, 0, of heads and channels.
    """

    name: str
    dtype: torch.dtype
    heads: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, x: Tensor, *, per_head: bool) -> OperandLayout:
        """That of an operand in rows."""
        heads, strides = (0, ()) if per_head else (x.shape[2], x.stride())
        return cls(name, x.dtype, heads, strides)

    def is_constant(self, axis: int, B: int) -> bool:
        """Whether the stride along an axis (batch, token, head) has no extent B or T in it.

        It has those of the axes that lie within, whose strides are smaller.
        """
        varying = {n for n, extent in enumerate((B, None)) if n != axis and extent != 1}
        return axis > 0 and not any(0 < self.strides[n] < self.strides[axis] for n in varying)


class Layout(NamedTuple):
    """What of a call decides its launches, all but what its tensors hold.

    A call's tensors are numbered in this order: operands, carries, tables, params.

    Attributes:
        T: rows of a sequence, or of all packed ones; N: sequences.
        chunk: rows of a chunk.
        segment: chunks of a segment, where scans run on segments; else 0.
        packed: the dtype of `cu_seqlens`; None where sequences are not packed.
        carries: what scans carry: name, shape, dtype of the first value; None where that is zero.
        pool: the slots of a pool, and of each of its sequences.
    """

    B: int
    T: int
    HV: int
    K: int
    V: int
    N: int
    chunk: int
    segment: int
    packed: torch.dtype | None
    device: torch.device
    operands: tuple[OperandLayout, ...]
    carries: tuple[tuple[str, tuple[int, ...], torch.dtype | None], ...]
    params: tuple[str, ...]
    pool: tuple[int, int] = (0, 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by letter, and numbers of programs; `chunks`, `segments`: of all sequences."""
        segments = self._pieces(self.segment * self.chunk) if self.segment else 0
        return {
            **{"B": self.B, "T": self.T, "HV": self.HV, "K": self.K, "V": self.V, "C": self.chunk},
            **{"chunks": self._pieces(self.chunk), "segments": segments, "sequences": self.N},
        }

    @property
    def pointed(self) -> tuple[int, ...]:
        """The numbers of what is a tensor."""
        given = [dtype for _, _, dtype in self.carries]
        given += [*[self.packed] * 3, self.packed if self.segment else None]  # as TABLES
        operands = len(self.operands)
        return (*range(operands), *(operands + n for n, x in enumerate(given) if x is not None))

    def _pieces(self, rows: int) -> int:
        if self.packed is not None:
            return chunk_bound(self.T, self.N, rows)
        return self.N * -(-self.T // rows)

    def tables(self, cu_seqlens: Tensor) -> tuple[Tensor | None, ...]:
        """The tables of packed sequences, as `TABLES` names them."""
        offsets, table = chunk_table(cu_seqlens, self.T, self.chunk)
        of_segments = None
        if self.segment:
            rows = self.segment * self.chunk
            _, of_segments = chunk_table(cu_seqlens, self.T, rows, least=1)
        return cu_seqlens, offsets, table, of_segments


class New(NamedTuple):
    """A tensor that a launch makes: `Buffer` says what its fields mean."""

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool = False
    scratch: bool = False

    @property
    def bytes(self) -> int:
        """Its size, rounded up so that what lies behind it is aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 256) * 256

    def maker(self, device: torch.device) -> Callable[[], Tensor]:
        """What makes such a tensor; by strides takes torch less time than by `torch.empty`."""
        if self.zeroed:
            return partial(torch.zeros, self.shape, dtype=self.dtype, device=device)
        return _maker(self.shape, self.dtype, device)


def _maker(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    strides = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


@dataclass(slots=True, eq=False)
class LaunchSpec:
    """The launch of a kernel for one layout: `slots` say which argument takes which tensor.

    `again`: launches the machine code that served it, given arguments and a stream, for calls
    whose pointers are aligned like those. `seen`: whether it was compiled for any call.
    `blocks`: arguments for TMA. `unaligned`: the launch instead for pointers that TMA cannot take.
    """

    loaded: LoadedKernel
    grid: tuple[int, int, int]
    values: tuple[object, ...]
    slots: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...] = ()
    unaligned: LaunchSpec | None = None
    again: Any = None
    seen: bool = False

    def compile(self, tensors: Sequence[Given]) -> None:
        """Compile for a call with these tensors, on the current device."""
        self.loaded.compile(self.grid, self.arguments(tensors))

    def run(self, tensors: Sequence[Given], *, aligned: bool) -> None:
        """Launch on the current device and stream; `aligned`: every pointer is."""
        compiled = self.loaded.launch(self.grid, self.arguments(tensors))
        if aligned and compiled is not None:
            self.again = compiled[self.grid]

    def arguments(self, given: Sequence[Given]) -> list[object]:
        """The kernel's arguments, of a call's tensors or of their addresses."""
        arguments = list(self.values)
        for argument, number in self.slots:
            arguments[argument] = given[number]
        for block in self.blocks:
            arguments[block.argument] = block.of(given[block.number])
        return arguments


@dataclass(slots=True, eq=False)
class LaunchPlan:
    """The launches of one direction, for calls of one layout.

    Attributes:
        device: where calls of that layout are; index: of a GPU, its number.
        pointed: the numbers of what is a tensor, of all that a call gives.
        new: the tensors that are new in each call, numbered behind those: buffers that only these
            kernels read come last.
        makers: what makes the others.
        scratch: makes one piece of memory for the last; None where there are none.
        places: of the last in that memory, in bytes.
        results: the numbers of the buffers and last states that callers take, by name.
        ready: whether each launch has machine code for aligned pointers.
    """

    device: torch.device
    index: int | None
    launches: tuple[LaunchSpec, ...]
    pointed: tuple[int, ...]
    new: tuple[New, ...]
    makers: tuple[Callable[[], Tensor], ...]
    scratch: Callable[[], Tensor] | None
    places: tuple[int, ...]
    results: Mapping[str, int]
    ready: bool = False

    def run(self, tensors: list[Any]) -> None:
        """Launch the kernels in order on the tensors of a call; the new ones are added to those.

        All tensors but operands are contiguous.
        """
        pointers, bits = tensors.copy(), 0
        for n in self.pointed:
            if tensors[n] is not None:  # a pool without numbers of accepted tokens
                pointers[n] = pointer = tensors[n].data_ptr()
                bits |= pointer
        aligned = not bits % 16
        if self.index is not None and torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                self._launch(tensors, pointers, aligned=aligned)
        else:
            self._launch(tensors, pointers, aligned=aligned)

    def _launch(self, tensors: list[Given], pointers: list[float | None], *, aligned: bool) -> None:
        if not (aligned and self.ready):
            tensors += [b.maker(self.device)() for b in self.new]
            specs = [x if aligned else x.unaligned or x for x in self.launches]
            _compile(specs, tensors, self.index)
            for spec in specs:
                spec.run(tensors, aligned=aligned)
            self.ready = all(spec.again is not None for spec in self.launches)
            return
        # one piece of memory for all that is no result, and numbers for arguments: less to do
        made = [make() for make in self.makers]
        tensors += made
        pointers += [x.data_ptr() for x in made]
        if self.scratch is not None:
            scratch = self.scratch()
            free = scratch.data_ptr()
            pointers += [free + place for place in self.places]
        stream = triton.runtime.driver.active.get_current_stream(self.index or 0)
        for spec in self.launches:
            spec.again(*spec.arguments(pointers), stream=stream)


def _compile(specs: Sequence[LaunchSpec], tensors: Sequence[Given], index: int | None) -> None:
    """Compile kernels that were not before, at the same time: passes and assembler are not Python.

    The first call of a direction then takes as long as its slowest kernel, or as there are cores.
    """
    if all(x.seen for x in specs):
        return

    def compile_one(spec: LaunchSpec) -> None:
        # each thread has a current device of its own
        with contextlib.nullcontext() if index is None else torch.cuda.device(index):
            spec.compile(tensors)

    with _COMPILING:  # a first call in another thread would hash while these are parsed
        fresh = [x for x in specs if not x.seen]
        if len(fresh) > 1 and not triton.knobs.runtime.interpret:
            for spec in fresh:
                spec.loaded.identify()
            with ThreadPoolExecutor(min(len(fresh), os.cpu_count() or 1)) as pool:
                list(pool.map(compile_one, fresh))
        for spec in fresh:
            spec.seen = True


@lru_cache(maxsize=1024)
def plan_launches(
    kernels: tuple[LoadedKernel, ...], layout: Layout, given: tuple[Buffer, ...] = ()
) -> LaunchPlan:
    """The launches of `kernels`, in order, for calls of `layout`.

    `given`: buffers that none of them stores (those of kernels left out): the first one's new.
    """
    operands = {o.name: o for o in layout.operands}
    shapes = {name: shape for name, shape, _ in layout.carries}
    sources: list[Source] = [("operand", name) for name in operands]
    sources += [("initial", name) for name in shapes]
    sources += [("table", name) for name in TABLES]
    sources += [("param", name) for name in layout.params]
    letters = {b.name: b.shape for b in given}
    letters |= {b.name: b.shape for x in kernels for b in x.kernel.stores}
    new: dict[Source, New] = {}
    for n, loaded in enumerate(kernels):
        kernel = loaded.kernel
        for b in kernel.stores if n else (*given, *kernel.stores):
            new.setdefault(("buffer", b.name), _new(b, layout, operands))
        for source in kernel.sources.values():
            if source[0] == "final":
                new[source] = New(source, shapes[source[1]], torch.float32)
    made = [b for b in new.values() if not b.scratch]
    buffers = [b for b in new.values() if b.scratch]
    sources += [b.source for b in (*made, *buffers)]
    number = {source: n for n, source in enumerate(sources)}
    ends = [*accumulate(b.bytes for b in buffers)]
    launches: list[LaunchSpec] = []
    for loaded in kernels:
        spec = _spec(loaded, layout, operands, number, letters)
        if loaded.gluon is not None and takes(loaded.gluon.kernel, layout):
            by_tma = _spec(loaded.gluon, layout, operands, number, letters)
            by_tma.unaligned, spec = spec, by_tma
        launches.append(spec)
    device = layout.device
    return LaunchPlan(
        device,
        device.index if device.type == "cuda" else None,
        tuple(launches),
        layout.pointed,
        new=(*made, *buffers),
        makers=tuple(b.maker(device) for b in made),
        scratch=_maker((ends[-1] // 4,), torch.float32, device) if ends else None,
        places=tuple(end - b.bytes for b, end in zip(buffers, ends, strict=True)),
        results={b.source[1]: number[b.source] for b in made},
    )


def _spec(
    loaded: LoadedKernel,
    layout: Layout,
    operands: Mapping[str, OperandLayout],
    number: Mapping[Source, int],
    letters: Mapping[str, tuple[str, ...]],
) -> LaunchSpec:
    kernel = loaded.kernel
    items = layout.sizes[kernel.programs] * layout.HV * kernel.parts
    fixed: dict[str, object] = {
        **kernel.constants,
        "TOKENS": layout.T,
        "chunks": -(-layout.T // layout.chunk),
        "items": items,
        "HV": layout.HV,
        "SEGMENT": layout.segment,
        "SEQUENCES": layout.N,
        **dict(zip(("SLOTS", "WIDTH"), layout.pool, strict=True)),
        "PACKED": layout.packed is not None,
        "EVEN": layout.packed is None and layout.T % layout.chunk == 0,
    }
    for parameter, (name, axis) in kernel.strides.items():
        stride = operands[name].strides[axis]
        is_constant = operands[name].is_constant(axis, layout.B)
        fixed[parameter] = tl.constexpr(stride) if is_constant and not _INTERPRETED else stride
    fixed |= {p: layout.HV // operands[name].heads for p, name in kernel.groups.items()}
    numbers = {name: number["table", name] for name in TABLES}
    numbers |= {parameter: number[source] for parameter, source in kernel.sources.items()}
    names = list(loaded.function.arg_names)
    return LaunchSpec(
        loaded,
        grid=(min(items, kernel.persistent * multiprocessors(layout.device) or items), 1, 1),
        values=tuple(fixed.get(name) for name in names),
        slots=tuple(
            (names.index(name), n)
            for name, n in numbers.items()
            if name in names and name not in kernel.blocks
        ),
        blocks=tuple(
            block_of(kernel, name, layout, names.index(name), numbers[name], letters)
            for name in kernel.blocks
        ),
    )


def _new(b: Buffer, layout: Layout, operands: Mapping[str, OperandLayout]) -> New:
    sizes = layout.sizes
    grouped = b.gradient_of is not None and operands[b.gradient_of].heads != layout.HV
    dtype = torch.float32 if grouped else b.dtype
    return New(("buffer", b.name), tuple(sizes[n] for n in b.shape), dtype, b.zeroed, b.scratch)
