"""TileIR as Triton: one kernel per Kernel of a program, self-contained and meant to be read.

A scan keeps the state transposed, S[v, k], in registers, and is split over tiles of the value axis.
A kernel parallel over chunks that sums over a channel axis loops over its tiles. Everything is
addressed from 64-bit bases; tails of sequences and of channels are masked, nothing is padded.
Numbers that a model fixes are constants: heads, heads that share one, strides that no B or T is in;
where no chunk has a tail (EVEN), the masks of rows are constant too, and vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import tiled
from ..config import Config, KernelConfig
from ..expressions import Names
from ..interface import Buffer, Parameter, Role, Signature, Storage, stored
from ..plan import Kernel, Loop
from ..tile import Axis, Tile, TileOp
from ..tiling import tile
from . import library as triton_library
from .expressions import FARTHEST, HALVED
from .memory import RANGE, TritonMemory

STORAGE = Storage(wide=False, transposed=True)
_ROWS_THERE = "rows = tl.full((C,), True, tl.int1) if EVEN else chunk * C + oi < length"
STAGES = "STAGES"  # the parameter of scans that says how deep their loop is pipelined
_RESERVED = frozenset(triton_library.FUNCTIONS).union(
    ("tl", "triton", "pid", "n", "h", "index", "chunk", "chunks", "first", "length", "batch"),
    ("at", "row", "rows", "step", "i", "oi", "oj", "ok", "ov", "i_v", "K", "V", "C", "BK", "BV"),
    ("HV", "NV", "TOKENS", "PACKED", "EVEN", "cu_seqlens", "chunk_offsets", "chunk_table"),
    ("turns", "again", FARTHEST, HALVED),
    ("part", "segment", "segments", "segment_table", "SEGMENT", "begin", "end", "before"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """A printed kernel.

    `v_programs`: programs along the value axis; `segments`: whether it is a scan of segments;
    `calls`: the names of scans that it runs at once (codegen/triton/together.py).
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
    blocks: tuple[tuple[str, tuple[int, int]], ...] = ()  # loads and stores have pointers
    calls: tuple[str, ...] = ()
    persistent: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options."""
        return self.config.options(self.config.stages)


def print_triton(
    kernel: Kernel, signature: Signature, config: Config, *, called: bool = False
) -> TritonKernel:
    """`kernel` as a Triton kernel for `signature`.

    `called`: as a function of the program's number, which a kernel of several calls.
    """
    return _KernelPrinter(kernel, signature, config, called).print()


class _KernelPrinter(TritonMemory):
    def __init__(self, kernel: Kernel, signature: Signature, config: Config, called: bool) -> None:
        super().__init__(tile(kernel, signature, config.tiles(kernel.name)), Names(_RESERVED))
        self._kernel, self._signature = kernel, signature
        self._config, self._called = config.of(kernel.name), called

    def print(self) -> TritonKernel:
        kernel, own = self._kernel, self.tiled
        self._name_leaves(kernel)
        self.uses.update(use.value for s in own.statements for use in tiled.uses(s))
        body = self._parallel_body() if kernel.loop is Loop.PARALLEL else self._scan_body()
        source = self._header(body)
        dims, BK, BV = own.dims, own.extents[Axis.K], own.extents[Axis.V]
        sizes = {"K": dims.K, "V": dims.V, "C": own.chunk, "BK": BK, "BV": BV}
        return TritonKernel(
            name=kernel.name,
            loop=kernel.loop,
            source=source,
            parameters=tuple(self.parameters.values()),
            v_programs=own.v_parts,
            constants=(*sizes.items(), ("NV", -(-dims.V // BV))),
            config=self._config,
            stores=stored(kernel, self._signature, STORAGE),
            segments=kernel.segments is not None,
            functions=frozenset(self.used_functions),
        )

    def _header(self, body: list[str]) -> str:
        segments = self._kernel.segments
        tables, sizes, lengths = "", "", ""
        if segments is not None:
            tables, sizes, lengths = " segment_table,", " SEGMENT,", ', "SEGMENT"'
        elif self.tiled.pooled:
            sizes, lengths = " SLOTS, WIDTH,", ', "SLOTS", "WIDTH"'
        constant = {p for p in self.parameters.values() if p.role is Role.GROUP}
        names = ", ".join(
            p.name + ": tl.constexpr" * (p in constant) for p in self.parameters.values()
        )
        text = "\n".join(f"    {line}" if line else "" for line in body)
        stores = ", ".join(str(n) for n, _ in self._kernel.stores) or "nothing"
        if segments is not None and segments.ends:
            stores = f"what a segment ends with: {', '.join(c.name for c in self._kernel.carried)}"
        stages = "" if self._kernel.loop is Loop.PARALLEL else " STAGES: tl.constexpr,"
        loop = "a scan over tokens" if self.tiled.by_token else self._kernel.loop.value
        head = f'@triton.jit(do_not_specialize=["TOKENS", "chunks"{lengths}])'
        if self._called:
            head, names = "@triton.jit", f"pid, {names}"
        return (
            f"{head}\n"
            f"def {self._kernel.name}(\n"
            f"    {names},\n"
            f"    cu_seqlens, chunk_offsets, chunk_table,{tables} TOKENS, chunks,{sizes} "
            "HV: tl.constexpr,\n    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, "
            "BK: tl.constexpr, BV: tl.constexpr,\n    NV: tl.constexpr, PACKED: tl.constexpr, "
            f"EVEN: tl.constexpr,{stages}\n"
            "):\n"
            f'    """{loop}; stores {stores}."""\n'
            f"{text}\n"
        )

    def _run(self, statements: Iterable[tiled.Statement]) -> list[str]:
        """The lines of `statements`."""
        for s in statements:
            _ROWS[type(s)](self, s)
        return self.flush()

    def compute(self, s: tiled.Compute | tiled.Product) -> None:
        """An assignment, or nothing where it is printed where it is used."""
        if not s.adds:
            self.define(s.value)
            return
        name = self.known.pop(s.value)
        if isinstance(s, tiled.Product):
            self.lines.append(f"{name} = {self.product(s, name)}")
        else:
            self.lines.append(f"{name} += {self.structural(s.value)}")
        self.known[s.value] = name

    def zero(self, s: tiled.Zero) -> None:
        """What a loop adds to."""
        self.known[s.value] = name = self.names.fresh(s.value.hint or "x")
        self.lines.append(f"{name} = {self.zeros(s.value.axes)}")

    def clean(self, s: tiled.Clean) -> None:
        """Another name for a value, which later statements know it by."""
        x = s.value
        name = self.names.fresh(x.hint or "x")
        use = tiled.Use(x, x.axes, (s.axis,))
        self.lines.append(f"{name} = {self.cleaned(use, self.text(x))}")
        self.known[x] = name
        self.dtypes.pop(x, None)

    def advance(self, s: tiled.Advance) -> None:
        """The next carries; where there are several, none may see another's new value."""
        several = len(s.ends) > 1
        ends = [(self.known[start], self._next(start, use, several)) for start, use in s.ends]
        self.lines += [f"{name} = {end}" for name, end in ends if name != end]

    def _next(self, start: Tile, use: tiled.Use, assign: bool) -> str:
        x = use.value
        if x.op is TileOp.CONST:
            return f"tl.full({self.shape(start.axes)}, {x.value}, dtype=tl.float32)"
        text = self.known.get(x) or (self.assign(x) if assign else self.text(x))
        return self.cleaned(use, text)

    def _program(self) -> list[str]:
        part = ["i_v = pid % NV", "pid = pid // NV"] if self.tiled.v_parts > 1 else []
        program = [] if self._called else ["pid = tl.program_id(0)"]
        return [*program, *part, "h = (pid % HV).to(tl.int64)"]

    def _ranges(self) -> list[str]:
        lines = [] if self.tiled.by_token else ["oi = tl.arange(0, C)", "oj = tl.arange(0, C)"]
        if self.tiled.channels is not Axis.K:
            lines.append("ok = tl.arange(0, BK)")
        if self.tiled.channels is not Axis.V:
            start = "i_v * BV + " if self.tiled.v_parts > 1 else ""
            lines.append(f"ov = {start}tl.arange(0, BV)")
        return lines

    def _parallel_body(self) -> list[str]:
        lines = [
            *self._program(),
            "index = (pid // HV).to(tl.int64)  # of the chunk, over all sequences",
            "if PACKED:",
            "    n = tl.load(chunk_table + 2 * index).to(tl.int64)",
            "    if n < 0:",
            "        return",
            "    chunk = tl.load(chunk_table + 2 * index + 1).to(tl.int64)",
            "    first = tl.load(cu_seqlens + n).to(tl.int64)",
            "    length = tl.load(cu_seqlens + n + 1) - first",
            "    batch = n * 0",
            "else:",
            "    n = index // chunks",
            "    chunk = index % chunks",
            "    first = n * 0",
            "    length = TOKENS",
            "    batch = n",
            *self._ranges(),
            "at = first + chunk * C",
            _ROWS_THERE,
            "row = batch * TOKENS + at",
            "",
        ]
        lines += self._run(self.tiled.before)
        if self.tiled.channels is not None:
            size = self.tiled.channels.value.upper()
            turns = f"tl.cdiv({size}, B{size})"
            splits = self.tiled.block > 0 and self.tiled.channels is Axis.K
            self.halved = HALVED if splits else "True"
            body = [f"{RANGE[self.tiled.channels]} = i * B{size} + tl.arange(0, B{size})"]
            body += self._run(self.tiled.inside)
            self.halved = "True"
            lines += self._twice(turns, body) if splits else _loop(f"i in range({turns})", body)
        return lines + self._run(self.tiled.after)

    def _twice(self, turns: str, body: list[str]) -> list[str]:
        """A loop that splits all decays, and runs again where a block has decayed by too much.

        Twice in the text of the machine: code that is seldom needed would slow the other's.
        """
        sums = [self.known[s.value] for s in self.tiled.before if isinstance(s, tiled.Zero)]
        after = [
            f"again = tl.max({FARTHEST}, 0) >= 1.0",
            "turns = tl.where(again, turns, 0)",
            *(f"{x} = tl.where(again, 0.0, {x})" for x in sums),
            "tl.debug_barrier()  # what is stored again is stored after this",
        ]
        inner = [*_loop("i in range(turns)", body), f"if not {HALVED}:"]
        inner += [f"    {line}" for line in after]
        return [
            f"{FARTHEST} = tl.zeros((C,), dtype=tl.float32)",
            f"turns = {turns}",
            *_loop(f"{HALVED} in tl.static_range(2)", inner),
        ]

    def _scan_body(self) -> list[str]:
        reverse = self._kernel.loop is Loop.REVERSE
        segments = self._kernel.segments
        pooled = self.tiled.pooled
        lines = [*self._program(), *(_OF_SEQUENCE if segments is None else _OF_SEGMENT)]
        lines += [*self._ranges(), *(self.find_slot() if pooled else ())]
        lines += self._run(self.tiled.before)
        if self.tiled.by_token:
            lines.append("for chunk in tl.range(0, length, num_stages=STAGES):")
            inner = ["at = first + chunk"]
        else:
            bounds, last = "0, tl.cdiv(length, C)", "tl.cdiv(length, C) - 1"
            if segments is not None:
                bounds, last = "begin, end", "begin + end - 1"
            lines.append(f"for step in tl.range({bounds}, num_stages=STAGES):")
            inner = [
                f"chunk = {last} - step" if reverse else "chunk = step",
                "at = first + chunk * C",
                _ROWS_THERE,
                "row = batch * TOKENS + at",
            ]
        inner += [*self._run(self.tiled.inside), *(self.keep_states() if pooled else ())]
        lines += [f"    {line}" for line in inner]
        return lines + self._run(self.tiled.after)


def _loop(head: str, body: list[str]) -> list[str]:
    return [f"for {head}:", *(f"    {line}" for line in body)]


_ROWS: Mapping[type, Callable[[_KernelPrinter, Any], None]] = {
    tiled.Load: _KernelPrinter.load,
    tiled.Zero: _KernelPrinter.zero,
    tiled.Compute: _KernelPrinter.compute,
    tiled.Product: _KernelPrinter.compute,
    tiled.Clean: _KernelPrinter.clean,
    tiled.Store: _KernelPrinter.store,
    tiled.Begin: _KernelPrinter.begin,
    tiled.Arrive: _KernelPrinter.arrive,
    tiled.Advance: _KernelPrinter.advance,
    tiled.Finish: _KernelPrinter.finish,
}
_OF_SEQUENCE = [
    "n = (pid // HV).to(tl.int64)  # the sequence",
    "if PACKED:",
    "    first = tl.load(cu_seqlens + n).to(tl.int64)",
    "    length = (tl.load(cu_seqlens + n + 1) - first).to(tl.int32)",
    "    batch = n * 0",
    "    index = tl.load(chunk_offsets + n).to(tl.int64)",
    "else:",
    "    first = n * 0",
    "    length = TOKENS",
    "    batch = n",
    "    index = n * chunks",
]
_OF_SEGMENT = [
    "part = (pid // HV).to(tl.int64)  # the segment, over all sequences",
    "if PACKED:",
    "    n = tl.load(segment_table + 2 * part).to(tl.int64)",
    "    if n < 0:",
    "        return",
    "    segment = tl.load(segment_table + 2 * part + 1)",
    *_OF_SEQUENCE[2:6],
    "else:",
    "    n = part // tl.cdiv(chunks, SEGMENT)",
    "    segment = (part % tl.cdiv(chunks, SEGMENT)).to(tl.int32)",
    *_OF_SEQUENCE[7:],
    "segments = tl.maximum(tl.cdiv(tl.cdiv(length, C), SEGMENT), 1)  # an empty sequence has one",
    "begin = segment * SEGMENT",
    "end = tl.minimum(begin + SEGMENT, tl.cdiv(length, C))",
]
