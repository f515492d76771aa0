"""TileIR as Triton: one kernel per Kernel of a program, self-contained and meant to be read.

A scan keeps the state transposed, S[v, k], in registers, and is split over tiles of the value axis.
A kernel parallel over chunks that sums over a channel axis loops over its tiles. Everything is
addressed from 64-bit bases; tails of sequences and of channels are masked, nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .. import tile
from ..config import Config, KernelConfig, dims_of, padded
from ..expressions import Names, identifier, unaliased
from ..interface import Buffer, Parameter, Role, Signature, Storage, stored
from ..plan import Kernel, Loop, sums_over
from ..segments import Segments
from ..tile import Axis, Tile, TileOp
from . import library as triton_library
from .memory import RANGE, TritonMemory

STORAGE = Storage(wide=False, transposed=True)
STAGES = "STAGES"  # the parameter of scans that says how deep their loop is pipelined
_SCAN_ORDER = (Axis.V, Axis.I, Axis.J, Axis.K)
_PARALLEL_ORDER = (Axis.I, Axis.J, Axis.V, Axis.K)
_LEAVES = (TileOp.TOKEN, TileOp.HEAD, TileOp.CARRY, TileOp.PARAM)
_RESERVED = frozenset(triton_library.FUNCTIONS).union(
    ("tl", "triton", "pid", "n", "h", "index", "chunk", "chunks", "first", "length", "batch"),
    ("at", "row", "rows", "step", "i", "oi", "oj", "ok", "ov", "i_v", "K", "V", "C", "BK", "BV"),
    ("HV", "NV", "TOKENS", "PACKED", "cu_seqlens", "chunk_offsets", "chunk_table"),
    ("part", "segment", "segments", "segment_table", "SEGMENT", "begin", "end", "before"),
)  # fmt: skip


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


def print_triton(kernel: Kernel, signature: Signature, config: Config) -> TritonKernel:
    """`kernel` as a Triton kernel for `signature`."""
    return _KernelPrinter(kernel, signature, config).print()


@dataclass(slots=True)
class _Phases:
    """The tiles of a kernel by when they are computed around a loop over value tiles."""

    before: list[Tile] = field(default_factory=list)
    during: list[Tile] = field(default_factory=list)
    after: list[Tile] = field(default_factory=list)


class _KernelPrinter(TritonMemory):
    def __init__(self, kernel: Kernel, signature: Signature, config: Config) -> None:
        order = _PARALLEL_ORDER if kernel.loop is Loop.PARALLEL else _SCAN_ORDER
        signature = replace(signature, dims=dims_of(kernel, signature.dims))
        super().__init__(order, Names(_RESERVED), signature, config.chunk)
        self._kernel = kernel
        self._loop_kind, self._segments = kernel.loop, kernel.segments
        self._to_store = kernel.stores
        self._config = config.of(kernel.name)
        dims = signature.dims
        tiles = kernel.order
        self._buffers = kernel.buffers
        parallel = kernel.loop is Loop.PARALLEL
        uses_v = any(Axis.V in t.axes for t in tiles)
        sums_v = any(t not in self._buffers and sums_over(t, Axis.V) for t in tiles)
        self._BK, self._BV = padded(dims.K), min(self._config.v_tile, padded(dims.V))
        if sums_v and (not parallel or self._varies_after_sum(tiles, Axis.V)):
            self._BV = padded(dims.V)  # a sum over the value axis feeds what varies along it
        if sums_v and self._BV < dims.V:
            self._loop = Axis.V
        elif parallel and not uses_v and not self._varies_after_sum(tiles, Axis.K):
            self._BK = min(self._config.k_tile, self._BK)
            self._loop = Axis.K if self._BK < dims.K else None
        looped = self._loop is Axis.V
        self._v_programs = -(-dims.V // self._BV) if uses_v and not looped else 1
        self._accumulators: set[Tile] = set()

    def _varies_after_sum(self, tiles: list[Tile], axis: Axis) -> bool:
        """Whether something along `axis` needs a sum over `axis`: then it cannot be tiled."""
        after: set[Tile] = set()
        for t in tiles:
            if t in self._buffers:
                continue
            if sums_over(t, axis) or any(a in after for a in t.args):
                after.add(t)
                if axis in t.axes:
                    return True
        return False

    def print(self) -> TritonKernel:
        kernel = self._kernel
        order = kernel.order
        for t in order:  # operands get their names first
            if t.op in _LEAVES or t in self._buffers:
                name = self._buffers[t].label if t in self._buffers else str(t.attrs[0])
                self.known[t] = self.names.fresh(identifier(name))
        roots = [t for _, t in kernel.stores] + [c.end for c in kernel.carried]
        computed = [t for t in order if t not in self.known]
        self.count(computed, roots)
        self._find_accumulating_dots(computed)
        if kernel.loop is Loop.PARALLEL:
            body = self._parallel_body(order)
        else:
            body = self._scan_body(order)
        source = self._header(body)
        NV = -(-self._signature.dims.V // self._BV)
        constants = {
            "K": self._signature.dims.K,
            "V": self._signature.dims.V,
            "C": self._chunk,
            "BK": self._BK,
            "BV": self._BV,
            "NV": NV,
        }
        return TritonKernel(
            name=kernel.name,
            loop=kernel.loop,
            source=source,
            parameters=tuple(self._parameters.values()),
            v_programs=self._v_programs,
            constants=tuple(constants.items()),
            config=self._config,
            stores=stored(kernel, self._signature, STORAGE),
            segments=kernel.segments is not None,
            functions=frozenset(self._used_functions),
        )

    def _header(self, body: list[str]) -> str:
        segments = self._kernel.segments
        tables, sizes, lengths = "", "", ""
        if segments is not None:
            tables, sizes, lengths = " segment_table,", " SEGMENT,", ', "SEGMENT"'
        names = ", ".join(p.name for p in self._parameters.values())
        text = "\n".join(f"    {line}" if line else "" for line in body)
        stores = ", ".join(str(n) for n, _ in self._kernel.stores) or "nothing"
        if segments is not None and segments.ends:
            stores = f"what a segment ends with: {', '.join(c.name for c in self._kernel.carried)}"
        stages = "" if self._kernel.loop is Loop.PARALLEL else " STAGES: tl.constexpr,"
        loop = "a scan over tokens" if self._by_token else self._kernel.loop.value
        return (
            f'@triton.jit(do_not_specialize=["TOKENS", "chunks"{lengths}])\n'
            f"def {self._kernel.name}(\n"
            f"    {names},\n"
            f"    cu_seqlens, chunk_offsets, chunk_table,{tables} TOKENS, chunks,{sizes} HV,\n"
            "    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, "
            f"BV: tl.constexpr,\n    NV: tl.constexpr, PACKED: tl.constexpr,{stages}\n"
            "):\n"
            f'    """{loop}; stores {stores}."""\n'
            f"{text}\n"
        )

    @property
    def _by_token(self) -> bool:
        """Whether a chunk is one token, so that what tokens have has no axis for time.

        A scan of chunks may have no such axis either, where all its rows are hoisted.
        """
        tokens = [t for t in self._kernel.order if t.op is TileOp.TOKEN]
        return any(Axis.I not in t.axes for t in tokens)

    def _ranges(self) -> list[str]:
        lines = [] if self._by_token else ["oi = tl.arange(0, C)", "oj = tl.arange(0, C)"]
        if self._loop is not Axis.K:
            lines.append("ok = tl.arange(0, BK)")
        if self._loop is not Axis.V:
            start = "i_v * BV + " if self._v_programs > 1 else ""
            lines.append(f"ov = {start}tl.arange(0, BV)")
        return lines

    def _parallel_body(self, order: list[Tile]) -> list[str]:
        lines = ["pid = tl.program_id(0)"]
        if self._v_programs > 1:
            lines += ["i_v = pid % NV", "pid = pid // NV"]
        lines += [
            "h = (pid % HV).to(tl.int64)",
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
            "rows = chunk * C + oi < length",
            "row = batch * TOKENS + at",
            "",
        ]
        phases = self._phases(order)
        lines += self._run(phases.before)
        if self._loop is not None:
            for t in phases.during:
                if sums_over(t, self._loop) and t not in self.known:
                    name = self.names.fresh(t.hint or "x")
                    self.known[t] = name
                    self._accumulators.add(t)
                    shape = self._shape(t)
                    zero = f"tl.zeros({shape}, dtype=tl.float32)" if t.axes else "0.0"
                    lines.append(f"{name} = {zero}")
            K_or_V = self._loop.value.upper()
            lines.append(f"for i in range(tl.cdiv({K_or_V}, B{K_or_V})):")
            channels = f"{RANGE[self._loop]} = i * B{K_or_V} + tl.arange(0, B{K_or_V})"
            inner = [channels, *self._run(phases.during)]
            inner += self._stores([t for t in phases.during if t not in self._accumulators])
            lines += [f"    {line}" for line in inner]
            lines += self._run(phases.after)
            summed = [t for t in phases.during if t in self._accumulators]
            lines += self._stores([*phases.before, *summed, *phases.after])
        else:
            lines += self._run(phases.during) + self._run(phases.after)
            lines += self._stores(order)
        return lines

    def _phases(self, order: list[Tile]) -> _Phases:
        """When each tile is computed: as late as possible, so that little stays in registers."""
        axis = self._loop or Axis.V
        after: set[Tile] = set()
        during: set[Tile] = set()
        summed = {t for t in order if t not in self._buffers and sums_over(t, axis)}
        for t in order:
            if any(a in after or a in summed for a in self._inputs(t)):
                after.add(t)
            elif axis in t.axes or t in summed:
                during.add(t)
        needed = {
            a
            for t in during
            for a in tile.topological(*self._inputs(t), stop=frozenset(self._buffers))
        }
        phases = _Phases()
        for t in order:
            if t in during:
                phases.during.append(t)
            elif t in needed:
                phases.before.append(t)
            else:
                phases.after.append(t)
        return phases

    def _inputs(self, t: Tile) -> tuple[Tile, ...]:
        return () if t in self._buffers else t.args

    def _scan_body(self, order: list[Tile]) -> list[str]:
        reverse = self._kernel.loop is Loop.REVERSE
        segments = self._kernel.segments
        lines = ["pid = tl.program_id(0)"]
        if self._v_programs > 1:
            lines += ["i_v = pid % NV", "pid = pid // NV"]
        lines.append("h = (pid % HV).to(tl.int64)")
        lines += _OF_SEQUENCE if segments is None else _OF_SEGMENT
        lines += self._ranges()
        for c in self._kernel.carried:
            lines += self._first_carry(c.start)
        if segments is not None and not segments.ends:
            lines += self._ends_before(segments)
        constants = [t for t in order if not self._varies(t)]
        lines += self._run(constants)
        if self._by_token:
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
                "rows = chunk * C + oi < length",
                "row = batch * TOKENS + at",
            ]
        inner += self._stores([c.start for c in self._kernel.carried])
        inner += self._run([t for t in order if self._varies(t)])
        starts = {c.start for c in self._kernel.carried}
        inner += self._stores([t for t in order if t not in starts])
        several = len(self._kernel.carried) > 1  # then no end may see another's new value
        ends = [
            (self.known[c.start], self._carry_end(c.end, several)) for c in self._kernel.carried
        ]
        inner += self.flush()
        inner += [f"{name} = {end}" for name, end in ends if name != end]
        lines += [f"    {line}" for line in inner]
        for c in self._kernel.carried:
            lines += self._last_carry(c)
        return lines

    def _ends_before(self, segments: Segments) -> list[str]:
        """Bring the carries from the sequence's start to the segment's, by what others end with."""
        reverse = self._kernel.loop is Loop.REVERSE
        loop = "segments - 1, segment, -1" if reverse else "0, segment"
        lines = [
            f"for before in tl.range({loop}, num_stages=1):",
            "    at = (part - segment + before) * HV + h",
        ]
        for c, passage in zip(self._kernel.carried, segments.passages, strict=True):
            name, added = self.known[c.start], self._load_end(c)
            if passage is None:
                lines.append(f"    {name} += {added}")
            elif passage.matrix:
                lines.append(f"    {name} = {self._passed(name, passage.carried, added)}")
            else:
                log = self._load_end(passage.carried)
                axes, layout = passage.carried.start.axes, self.layout(c.start)
                kept = self.place(f"tl.exp({log})", axes, layout)
                lines.append(f"    {name} = {kept} * {name} + {added}")
        return lines

    def _varies(self, t: Tile) -> bool:
        """Whether a value changes from chunk to chunk (a per-head operand does not)."""
        return t.op not in (TileOp.HEAD, TileOp.PARAM, TileOp.CONST, TileOp.EXTENT)

    def _carry_end(self, end: Tile, assign: bool) -> str:
        value = unaliased(end)
        if value.op is TileOp.CONST:
            return f"tl.full({self._shape(end)}, {value.value}, dtype=tl.float32)"
        text = self.known.get(value) or (self.assign(value) if assign else self.text(value))
        for axis in value.axes:  # carries have zeros beyond the last channel, like what is loaded
            text = self._clean(value, axis, text)
        return text

    def _run(self, tiles: list[Tile]) -> list[str]:
        for t in tiles:
            if t in self._buffers:
                self._load_buffer(t)
            elif t.op is TileOp.TOKEN:
                self._load_token(t)
            elif t.op is TileOp.HEAD:
                self._load_head(t)
            elif t.op is TileOp.PARAM:
                self._parameter(self.known[t], Role.PARAM, str(t.attrs[0]))
            elif t in self._accumulators:
                self._accumulate(t)
            elif t.op is not TileOp.CARRY and t not in self._inline_dots:
                self.define(t)
        return self.flush()

    def _accumulate(self, t: Tile) -> None:
        name = self.known.pop(t)
        if t.op is TileOp.DOT:
            self.lines.append(f"{name} = {self._dot(t, name)}")
        else:
            self.lines.append(f"{name} += {self.structural(t)}")
        self.known[t] = name


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
