"""TileIR as Triton: one kernel per Kernel of a program, self-contained and meant to be read.

A scan keeps the state transposed, S[v, k], in registers, and is split over tiles of the value axis.
A kernel parallel over chunks that sums over the value axis loops over its tiles. Everything is
addressed from 64-bit bases; tails of sequences and of channels are masked, nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..dsl.ir import Op
from . import tile, triton_library
from .config import Config, Dims, KernelConfig, Precision, padded
from .expressions import Expressions, Names, unaliased
from .padding import Padding, padding
from .plan import Kernel, Loop, sums_over
from .tile import Axes, Axis, Tile, TileOp, Which

_FUNCTIONS = {
    Op.MAXIMUM: "tl.maximum",
    Op.MINIMUM: "tl.minimum",
    Op.EXP: "tl.exp",
    Op.LOG: "tl.log",
    Op.EXPM1: "expm1",
    Op.LOG1P: "log1p",
    Op.SIGMOID: "tl.sigmoid",
    Op.LOGSIGMOID: "logsigmoid",
    Op.SOFTPLUS: "softplus",
    Op.TANH: "tanh",
    Op.SQRT: "tl.sqrt",
    Op.RSQRT: "tl.rsqrt",
    Op.ABS: "tl.abs",
}
_SCAN_ORDER = (Axis.V, Axis.I, Axis.J, Axis.K)
_PARALLEL_ORDER = (Axis.I, Axis.J, Axis.V, Axis.K)
_RANGE = {Axis.I: "oi", Axis.J: "oj", Axis.V: "ov", Axis.K: "ok"}
_LEAVES = (TileOp.TOKEN, TileOp.HEAD, TileOp.CARRY, TileOp.PARAM)
_RESERVED = frozenset(triton_library.FUNCTIONS).union(
    ("tl", "triton", "pid", "n", "h", "index", "chunk", "chunks", "first", "length", "batch"),
    ("at", "row", "rows", "step", "i", "oi", "oj", "ok", "ov", "i_v", "K", "V", "C", "BK", "BV"),
    ("HV", "NV", "TOKENS", "PACKED", "cu_seqlens", "chunk_offsets", "chunk_table"),
)  # fmt: skip


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
    """A printed kernel. `v_programs`: programs along the value axis."""

    name: str
    loop: Loop
    source: str
    parameters: tuple[Parameter, ...]
    v_programs: int
    constants: tuple[tuple[str, int], ...]
    config: KernelConfig
    stores: tuple[tuple[str, Axes], ...]
    functions: frozenset[str]


def print_triton(kernel: Kernel, signature: Signature, config: Config) -> TritonKernel:
    """`kernel` as a Triton kernel for `signature`."""
    return _KernelPrinter(kernel, signature, config).print()


@dataclass(slots=True)
class _Phases:
    """The tiles of a kernel by when they are computed around a loop over value tiles."""

    before: list[Tile] = field(default_factory=list)
    during: list[Tile] = field(default_factory=list)
    after: list[Tile] = field(default_factory=list)


class _KernelPrinter(Expressions):
    functions = _FUNCTIONS
    where = "tl.where"
    scalar_tiles = False

    def __init__(self, kernel: Kernel, signature: Signature, config: Config) -> None:
        order = _PARALLEL_ORDER if kernel.loop is Loop.PARALLEL else _SCAN_ORDER
        super().__init__(order, Names(_RESERVED))
        self._kernel = kernel
        self._signature = signature
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
        self._loop: Axis | None = None  # the channel axis that a kernel takes tile by tile
        if sums_v and self._BV < dims.V:
            self._loop = Axis.V
        elif parallel and not uses_v and not self._varies_after_sum(tiles, Axis.K):
            self._BK = min(self._config.k_tile, self._BK)
            self._loop = Axis.K if self._BK < dims.K else None
        looped = self._loop is Axis.V
        self._v_programs = -(-dims.V // self._BV) if uses_v and not looped else 1
        self._chunk = config.chunk
        self._parameters: dict[str, Parameter] = {}
        self._used_functions: set[str] = set()
        self._raw: dict[Tile, Dtype] = {}
        self._accumulators: set[Tile] = set()
        self._cleaned: set[Tile] = set()
        self._inline_dots: set[Tile] = set()

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

    # ---- the kernel ----------------------------------------------------------------------------

    def print(self) -> TritonKernel:
        kernel = self._kernel
        order = kernel.order
        for t in order:  # operands get their names first
            if t.op in _LEAVES or t in self._buffers:
                name = self._buffers.get(t, str(t.attrs[0]) if t.attrs else t.hint)
                self.known[t] = self.names.fresh(name.removesuffix("_chunk"))
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
            stores=tuple((name, t.axes) for name, t in kernel.stores),
            functions=frozenset(self._used_functions),
        )

    def _header(self, body: list[str]) -> str:
        names = ", ".join(self._parameters)
        text = "\n".join(f"    {line}" if line else "" for line in body)
        stores = ", ".join(n for n, _ in self._kernel.stores) or "nothing"
        return (
            '@triton.jit(do_not_specialize=["TOKENS", "chunks"])\n'
            f"def {self._kernel.name}(\n"
            f"    {names},\n"
            "    cu_seqlens, chunk_offsets, chunk_table, TOKENS, chunks, HV,\n"
            "    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, "
            "BV: tl.constexpr,\n    NV: tl.constexpr, PACKED: tl.constexpr,\n"
            "):\n"
            f'    """{self._kernel.loop.value}; stores {stores}."""\n'
            f"{text}\n"
        )

    def _ranges(self) -> list[str]:
        lines = ["oi = tl.arange(0, C)", "oj = tl.arange(0, C)"]
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
            channels = f"{_RANGE[self._loop]} = i * B{K_or_V} + tl.arange(0, B{K_or_V})"
            inner = [channels, *self._run(phases.during)]
            inner += self._stores(phases.during)
            lines += [f"    {line}" for line in inner]
            lines += self._run(phases.after)
            lines += self._stores([*phases.before, *phases.after])
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
        lines = ["pid = tl.program_id(0)"]
        if self._v_programs > 1:
            lines += ["i_v = pid % NV", "pid = pid // NV"]
        lines += [
            "h = (pid % HV).to(tl.int64)",
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
            *self._ranges(),
        ]
        for c in self._kernel.carried:
            lines += self._first_carry(c.start)
        constants = [t for t in order if not self._varies(t)]
        lines += self._run(constants)
        steps = f"tl.range(0, tl.cdiv(length, C), num_stages={self._config.stages})"
        lines.append(f"for step in {steps}:")
        chunk = "tl.cdiv(length, C) - 1 - step" if reverse else "step"
        inner = [
            f"chunk = {chunk}",
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
        inner += self._flush()
        inner += [f"{name} = {end}" for name, end in ends if name != end]
        lines += [f"    {line}" for line in inner]
        for c in self._kernel.carried:
            lines += self._last_carry(c.start)
        return lines

    def _varies(self, t: Tile) -> bool:
        """Whether a value changes from chunk to chunk (a per-head operand does not)."""
        return t.op not in (TileOp.HEAD, TileOp.PARAM, TileOp.CONST, TileOp.EXTENT)

    def _carry_end(self, end: Tile, assign: bool) -> str:
        value = unaliased(end)
        if value.op is TileOp.CONST:
            return f"tl.full({self._shape(end)}, {value.value}, dtype=tl.float32)"
        if value in self.known:
            return self.known[value]
        return self.assign(value) if assign else self.text(value)

    def _first_carry(self, start: Tile) -> list[str]:
        name = self.known[start]
        pointer = self._parameter(f"{name}_first", Role.INITIAL, str(start.attrs[0]))
        load = self._load_at(f"{pointer} + (n * HV + h) * {self._carry_size(start)}", start)
        return [
            f"{name} = tl.zeros({self._shape(start)}, dtype=tl.float32)",
            f"if {pointer} is not None:",
            f"    {name} += {load}.to(tl.float32)",
        ]

    def _last_carry(self, start: Tile) -> list[str]:
        name = self.known[start]
        pointer = self._parameter(f"{name}_last", Role.FINAL, str(start.attrs[0]))
        base = f"{pointer} + (n * HV + h) * {self._carry_size(start)}"
        address = f"{base} + {self._state_offset(start)}"
        mask = self._mask_argument(start, rows=False)
        lines = [f"if {pointer} is not None:"]
        if Axis.V not in start.axes and self._v_programs > 1:
            lines = [f"if {pointer} is not None and i_v == 0:"]
        return [*lines, f"    tl.store({address}, {name}{mask})"]

    def _carry_size(self, start: Tile) -> str:
        return "K * V" if Axis.V in start.axes else "K"

    def _state_offset(self, t: Tile) -> str:
        """Offsets in a [K, V] matrix (row-major, as users see states) of a tile laid out [V, K]."""
        return "ok[None, :] * V + ov[:, None]" if Axis.V in t.axes else "ok"

    def _load_at(self, base: str, start: Tile) -> str:
        mask = self._mask_argument(start, rows=False, other=True)
        return f"tl.load({base} + {self._state_offset(start)}{mask})"

    # ---- statements ----------------------------------------------------------------------------

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
        return self._flush()

    def _flush(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def _accumulate(self, t: Tile) -> None:
        name = self.known.pop(t)
        if t.op is TileOp.DOT:
            self.lines.append(f"{name} = {self._dot(t, name)}")
        else:
            self.lines.append(f"{name} += {self.structural(t)}")
        self.known[t] = name

    def _stores(self, tiles: list[Tile]) -> list[str]:
        """Stores of those buffers whose value is among `tiles`."""
        present = {unaliased(t) for t in tiles}
        for name, t in self._kernel.stores:
            if unaliased(t) in present:
                self._store(name, t)
        return self._flush()

    def _store(self, name: str, t: Tile) -> None:
        pointer = self._parameter(f"{name}_ptr", Role.BUFFER, name)
        layout = self.layout(t)
        shown = t
        while shown.op is TileOp.EXPAND:
            (shown,) = shown.args
        text = self.place(self.text(shown), shown.axes, layout)
        if set(shown.axes) != set(t.axes):
            text = f"tl.broadcast_to({text}, {self._shape(t)})"
        rows = Axis.I in t.axes or Axis.J in t.axes
        mask = self._mask_argument(t, rows=rows)
        line = f"tl.store({self._buffer_address(pointer, t)}, {text}{mask})"
        if self._v_programs > 1 and Axis.V not in t.axes:
            self.lines.append("if i_v == 0:")
            line = f"    {line}"
        self.lines.append(line)

    # ---- memory --------------------------------------------------------------------------------

    def _parameter(self, name: str, role: Role, of: str) -> str:
        if name not in self._parameters:
            self._parameters[name] = Parameter(name, role, of)
        return name

    def _shape(self, t: Tile) -> str:
        size = {Axis.I: "C", Axis.J: "C", Axis.V: "BV", Axis.K: "BK"}
        return (
            "("
            + ", ".join(size[a] for a in self.layout(t))
            + ("," if len(t.axes) == 1 else "")
            + ")"
        )

    def _tail(self, axis: Axis) -> str | None:
        """The condition that a channel exists, where the tile is wider than the operand."""
        dims = self._signature.dims
        if axis is Axis.K and dims.K % self._BK:
            return "ok < K"
        if axis is Axis.V and dims.V % self._BV:
            return "ov < V"
        return None

    def _mask_argument(self, t: Tile, *, rows: bool, other: bool = False) -> str:
        layout = self.layout(t)
        conditions = []
        for axis in layout:
            condition = self._tail(axis)
            if rows and axis in (Axis.I, Axis.J) and (axis is Axis.I or Axis.I not in layout):
                condition = "rows"
            if condition is not None:
                text = f"({condition})" if " " in condition and len(layout) > 1 else condition
                conditions.append(self.place(text, (axis,), layout))
        if not conditions:
            return ""
        return f", mask={' & '.join(conditions)}" + (", other=0.0" if other else "")

    def _offsets(self, t: Tile, stride: str) -> str:
        """Offsets within a tile of rows: `stride` between tokens, 1 between channels."""
        layout = self.layout(t)
        parts = []
        for n, axis in enumerate(layout):
            time = axis is Axis.I or (axis is Axis.J and Axis.I not in layout)
            text = f"{_RANGE[axis]} * {stride}" if time else _RANGE[axis]
            if len(layout) > 1:
                index = ":, None" if n == 0 else "None, :"
                text = f"{_RANGE[axis]}[{index}]" + (f" * {stride}" if time else "")
            parts.append(text)
        return " + ".join(parts)

    def _load_token(self, t: Tile) -> None:
        name = self.known[t]
        operand = str(t.attrs[0])
        pointer = self._parameter(f"{name}_ptr", Role.OPERAND, operand)
        batch = self._parameter(f"{name}_sb", Role.STRIDE_BATCH, operand)
        tokens = self._parameter(f"{name}_st", Role.STRIDE_TOKEN, operand)
        heads = self._parameter(f"{name}_sh", Role.STRIDE_HEAD, operand)
        group = self._parameter(f"{name}_group", Role.GROUP, operand)
        base = f"{pointer} + batch * {batch} + at * {tokens} + (h // {group}) * {heads}"
        mask = self._mask_argument(t, rows=True, other=True)
        self.lines.append(f"{name} = tl.load({base} + ({self._offsets(t, tokens)}){mask})")
        self._raw[t] = self._signature.of(operand)

    def _load_head(self, t: Tile) -> None:
        name = self.known[t]
        operand = str(t.attrs[0])
        pointer = self._parameter(f"{name}_ptr", Role.OPERAND, operand)
        mask = self._mask_argument(t, rows=False, other=True)
        if not t.axes:
            self.lines.append(f"{name} = tl.load({pointer} + h).to(tl.float32)")
            return
        (axis,) = t.axes
        offset = f"h * {axis.value.upper()} + {_RANGE[axis]}"
        self.lines.append(f"{name} = tl.load({pointer} + {offset}{mask}).to(tl.float32)")

    def _buffer_address(self, pointer: str, t: Tile) -> str:
        layout = self.layout(t)
        time = [a for a in layout if a in (Axis.I, Axis.J)]
        if not time:
            size = {(): "1", (Axis.K,): "K", (Axis.V,): "V", (Axis.K, Axis.V): "K * V"}[t.axes]
            base = f"{pointer} + ((index + chunk) * HV + h) * {size}"
            if self._kernel.loop is Loop.PARALLEL:
                base = f"{pointer} + (index * HV + h) * {size}"
            if t.axes == (Axis.K, Axis.V):
                return f"{base} + (ov[:, None] * K + ok[None, :])"
            return base + "".join(f" + {_RANGE[a]}" for a in layout)
        channel = [a for a in layout if a not in (Axis.I, Axis.J)]
        size = channel[0].value.upper() if channel else ("C" if len(time) == 2 else "1")
        width = "" if size == "1" else f" * {size}"
        stride = f"(HV{width})"
        return f"{pointer} + (row * HV + h){width} + ({self._offsets(t, stride)})"

    def _load_buffer(self, t: Tile) -> None:
        name = self.known[t]
        pointer = self._parameter(f"{self._buffers[t]}_ptr", Role.BUFFER, self._buffers[t])
        rows = Axis.I in t.axes or Axis.J in t.axes
        mask = self._mask_argument(t, rows=rows, other=True)
        self.lines.append(f"{name} = tl.load({self._buffer_address(pointer, t)}{mask})")
        self._raw[t] = buffer_dtype(t.axes, self._signature.dtype)

    # ---- expressions ---------------------------------------------------------------------------

    def full(self, x: Tile, name: str) -> str:
        if self._raw.get(x, Dtype.FLOAT32) is Dtype.FLOAT32:
            return name
        return f"{name}.to(tl.float32)"

    def _factor(self, x: Tile) -> str:
        """`x` as a factor of a product: in the dtype in which products run."""
        low = self._signature.dtype
        y = unaliased(x)
        if y in self.known and self._raw.get(y) is low:
            return self.known[y]
        text = self.known.get(y) or self.text(y)
        if low is Dtype.FLOAT32 and self._raw.get(y, Dtype.FLOAT32) is Dtype.FLOAT32:
            return text
        return (
            f"{text}.to(tl.{low.value})" if text.isidentifier() else f"({text}).to(tl.{low.value})"
        )

    def _clean(self, x: Tile, axis: Axis, text: str) -> str:
        """`text` with zeros in the padding of `axis`, where it might hold anything else."""
        condition = self._tail(axis)
        if condition is None or self._padding(x, axis) is Padding.ZERO:
            return text
        keep = self.place(f"({condition})", (axis,), self.layout(x))
        return f"tl.where({keep}, {text}, 0.0)"

    def _find_accumulating_dots(self, computed: list[Tile]) -> None:
        """Products used once, in a sum of the same shape: printed with that sum as accumulator."""
        for t in computed:
            if t.op is TileOp.MAP and t.attrs == (Op.ADD,):
                dot = self._accumulating(t)
                if dot is not None:
                    self._inline_dots.add(dot)

    def _accumulating(self, t: Tile) -> Tile | None:
        for x, other in (t.args[::-1], t.args):
            if (
                x.op is TileOp.DOT
                and x not in self.known
                and self.uses[x] == 1
                and not (self._loop is not None and sums_over(x, self._loop))
                and x.axes == t.axes == other.axes
                and unaliased(other) not in self._buffers
            ):
                return x
        return None

    def _map(self, x: Tile) -> str:
        (fn,) = x.attrs
        assert isinstance(fn, Op)
        if fn is Op.ADD:
            dot = self._accumulating(x)
            if dot is not None and dot in self._inline_dots:
                other = x.args[0] if x.args[1] == dot else x.args[1]
                return self._dot(dot, self.within(other, self.layout(x)))
        if _FUNCTIONS.get(fn, "") in triton_library.FUNCTIONS:
            self._used_functions.add(_FUNCTIONS[fn])
        return super()._map(x)

    def structural(self, x: Tile) -> str:
        if x.op in (TileOp.ROWS, TileOp.MASK, TileOp.STEP):
            return self.masked(x, "rows", {Axis.I: "oi[:, None]", Axis.J: "oj[None, :]"})
        if x.op is TileOp.DOT:
            return self._dot(x, None)
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.CUMSUM:
            return self._cumsum(x)
        if x.op is TileOp.DECAY:
            (which,) = x.attrs
            assert isinstance(which, Which)
            p, q = (self.within(a, self.layout(x)) for a in x.args)
            keep = self.comparison(which, {Axis.I: "oi[:, None]", Axis.J: "oj[None, :]"})
            return f'tl.exp(tl.where({keep}, {p} - {q}, float("-inf")))'
        if x.op is TileOp.INVERSE:
            self._used_functions.add("unit_lower_inverse")
            return (
                f"unit_lower_inverse({self.text(x.args[0])}, C, {self._levels}, {self._precision})"
            )
        assert x.op in (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY), f"no Triton for {x.op.name}"
        return self._decayed(x)

    @property
    def _levels(self) -> int:
        return self._chunk.bit_length() - 1

    @property
    def _precision(self) -> str:
        if (
            self._signature.dtype is not Dtype.FLOAT32
            and self._signature.precision is not Precision.IEEE
        ):
            return '"tf32"'
        return f'"{self._signature.precision.value}"'

    def _decayed(self, x: Tile) -> str:
        texts = []
        for a in x.args:
            target = self.layout(a)
            text = self.within(a, target)
            if Axis.K in a.axes and a in (x.args[0], x.args[1]):
                text = self._clean(a, Axis.K, text)
            texts.append(text)
        sizes = f"C, BK, {self._levels}"
        if x.op is TileOp.DECAYED_DOT:
            name = "decayed_dot"
            # decayed factors underflow in float16, so they are not rounded to it (math.md)
            low = (
                self._signature.dtype if self._signature.dtype is Dtype.BFLOAT16 else Dtype.FLOAT32
            )
            sizes += f", tl.{low.value}"
        else:
            name = "decayed_apply" if x.attrs == (Axis.I,) else "decayed_apply_transposed"
        self._used_functions.add(name)
        return f"{name}({', '.join(texts)}, {sizes}, {self._precision})"

    def _cumsum(self, x: Tile) -> str:
        reverse, exclusive = x.attrs
        inner = self.within(x.args[0], self.layout(x))
        if exclusive:
            self._used_functions.add("exclusive_sum")
            return f"exclusive_sum({inner}, {bool(reverse)})"
        return f"tl.cumsum({inner}, 0{', reverse=True' if reverse else ''})"

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        (axes,) = x.attrs
        assert isinstance(axes, tuple)
        text = self.text(inner)
        for axis in axes:
            if axis in (Axis.K, Axis.V):
                text = self._clean(inner, axis, text)
        for position in sorted((self.layout(inner).index(a) for a in axes), reverse=True):
            text = f"tl.sum({text}, {position})"
        return text

    def _dot(self, z: Tile, accumulator: str | None) -> str:
        x, y = z.args
        (over,) = z.attrs
        assert isinstance(over, Axis)
        rows_axis, _ = self.layout(z)
        if rows_axis not in x.axes:
            x, y = y, x
        left, right = self._cleaned_factor(x, y, over), self._factor(y)
        if self.layout(x)[1] is not over:
            left = f"tl.trans({left})"
        if self.layout(y)[0] is not over:
            right = f"tl.trans({right})"
        extra = "" if accumulator is None else f", {accumulator}"
        if self._signature.dtype is Dtype.FLOAT32:
            extra += f", input_precision={self._precision}"
        return f"tl.dot({left}, {right}{extra})"

    def _cleaned_factor(self, x: Tile, y: Tile, over: Axis) -> str:
        """`x` as a factor, with zeros where neither it nor `y` has them for sure."""
        if over not in (Axis.K, Axis.V):
            return self._factor(x)
        paddings = {self._padding(x, over), self._padding(y, over)}
        if Padding.ZERO in paddings and Padding.UNSAFE not in paddings:
            return self._factor(x)
        if self._padding(y, over) is Padding.UNSAFE and self._tail(over) is not None:
            name = self.names.fresh(y.hint or "x")
            self.lines.append(f"{name} = {self._clean(y, over, self.text(y))}")
            self.known[unaliased(y)] = name
            self._raw.pop(unaliased(y), None)
            self._cleaned.add(unaliased(y))
        cleaned = self._clean(x, over, self.text(x))
        low = self._signature.dtype
        return cleaned if low is Dtype.FLOAT32 else f"({cleaned}).to(tl.{low.value})"

    def _padding(self, x: Tile, axis: Axis) -> Padding:
        """As `padding`; what was loaded from a buffer, or cleaned, has zeros there."""
        y = unaliased(x)
        if axis in y.axes and (y in self._buffers or y in self._cleaned):
            return Padding.ZERO
        return padding(x, axis)

    def extent(self, axis: Axis) -> str:
        return axis.value.upper()


def buffer_dtype(axes: Axes, low: Dtype) -> Dtype:
    """Tiles of two axes are stored in the dtype of products; vectors and numbers in float32."""
    return low if len(axes) == 2 else Dtype.FLOAT32
