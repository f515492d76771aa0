"""What printed kernels load and store: addresses from 64-bit bases, and masks at every tail.

Operands come with their strides. A buffer of tokens is [tokens, HV, channels]; one of chunks is
[chunks, HV, V, K], the layout in which scans hold a state; users see states as [K, V].
"""

from __future__ import annotations

from collections.abc import Iterable

from ..buffers import BufferId
from ..chunk import Carried, Named
from ..expressions import Names, identifier, unaliased
from ..interface import Parameter, Role, Signature, intermediate_dtype, segment_end
from ..plan import Loop
from ..segments import Segments, Start
from ..tile import Axis, Tile, TileOp
from .expressions import TritonExpressions

RANGE = {Axis.I: "oi", Axis.J: "oj", Axis.V: "ov", Axis.K: "ok"}


class TritonMemory(TritonExpressions):
    """Loads and stores of one kernel; the parameters that they need accumulate."""

    def __init__(
        self, order: tuple[Axis, ...], names: Names, signature: Signature, chunk: int
    ) -> None:
        super().__init__(order, names, signature, chunk)
        self._loop_kind = Loop.PARALLEL
        self._v_programs = 1
        self._segments: Segments | None = None
        self._to_store: Named = ()
        self._parameters: dict[tuple[Role, BufferId | str], Parameter] = {}

    def _parameter(self, name: str, role: Role, of: BufferId | str) -> str:
        """The name of a parameter: `name`, where nothing else is called so."""
        if (role, of) not in self._parameters:
            free = name if role is Role.PARAM else self.names.fresh(name)
            self._parameters[role, of] = Parameter(free, role, of)
        return self._parameters[role, of].name

    def _shape(self, t: Tile) -> str:
        size = {Axis.I: "C", Axis.J: "C", Axis.V: "BV", Axis.K: "BK"}
        return (
            "("
            + ", ".join(size[a] for a in self.layout(t))
            + ("," if len(t.axes) == 1 else "")
            + ")"
        )

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
            text = f"{RANGE[axis]} * {stride}" if time else RANGE[axis]
            if len(layout) > 1:
                index = ":, None" if n == 0 else "None, :"
                text = f"{RANGE[axis]}[{index}]" + (f" * {stride}" if time else "")
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
        within = f" + ({self._offsets(t, tokens)})" if t.axes else ""
        self.lines.append(f"{name} = tl.load({base}{within}{mask})")
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
        offset = f"h * {axis.value.upper()} + {RANGE[axis]}"
        self.lines.append(f"{name} = tl.load({pointer} + {offset}{mask}).to(tl.float32)")

    def _buffer_address(self, pointer: str, t: Tile) -> str:
        layout = self.layout(t)
        time = [a for a in layout if a in (Axis.I, Axis.J)]
        if not time:
            size = {(): "1", (Axis.K,): "K", (Axis.V,): "V", (Axis.K, Axis.V): "K * V"}[t.axes]
            base = f"{pointer} + ((index + chunk) * HV + h) * {size}"
            if self._loop_kind is Loop.PARALLEL:
                base = f"{pointer} + (index * HV + h) * {size}"
            if t.axes == (Axis.K, Axis.V):
                return f"{base} + (ov[:, None] * K + ok[None, :])"
            return base + "".join(f" + {RANGE[a]}" for a in layout)
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
        self._raw[t] = intermediate_dtype(t, self._signature.dtype)

    def _first_carry(self, start: Tile) -> list[str]:
        name = self.known[start]
        zero = f"{name} = tl.zeros({self._shape(start)}, dtype=tl.float32)"
        if not start.axes:
            zero = f"{name} = 0.0"
        if self._segments is not None and self._segments.start is Start.IDENTITY:
            inside = " & (ok[None, :] < K)" if self._tail(Axis.K) else ""
            return [f"{name} = tl.where((ov[:, None] == ok[None, :]){inside}, 1.0, 0.0)"]
        if self._segments is not None and self._segments.ends:
            return [zero]
        pointer = self._parameter(f"{name}_first", Role.INITIAL, str(start.attrs[0]))
        load = self._load_at(f"{pointer} + (n * HV + h)", start)
        return [zero, f"if {pointer} is not None:", f"    {name} += {load}.to(tl.float32)"]

    def _end(self, carried: Carried) -> str:
        """The parameter with what a carry is as each segment ends."""
        of = segment_end(carried).name
        return self._parameter(f"{identifier(str(of))}_ptr", Role.BUFFER, of)

    def _load_end(self, carried: Carried) -> str:
        """What a carry was as the segment at `at` ended."""
        return self._load_at(f"{self._end(carried)} + at", carried.start)

    def _passed(self, state: str, matrix: Carried, added: str) -> str:
        """A S + B of the segment at `at`, or A^T S + B of one that is scanned from its end."""
        row, column = "ok[:, None]", "ok[None, :]"  # of the state before and after
        if self._loop_kind is Loop.FORWARD:
            row, column = column, row
        tail = self._tail(Axis.K)
        mask = f", mask=({tail})[:, None] & ({tail})[None, :], other=0.0" if tail else ""
        at = f"{self._end(matrix)} + at * K * K + {row} * K + {column}"
        factor = f"tl.load({at}{mask})"
        # in all of float32's digits: what rounding takes here, every segment after takes again
        precision = self._signature.precision.value
        return f'tl.dot({state}, {factor}, {added}, input_precision="{precision}")'

    def _last_carry(self, carried: Carried) -> list[str]:
        start, segments = carried.start, self._segments
        name, conditions = self.known[start], []
        if Axis.V not in start.axes and self._v_programs > 1:
            conditions.append("i_v == 0")
        if segments is not None and segments.ends:
            pointer, row = self._end(carried), "part * HV + h"
        else:
            pointer = self._parameter(f"{name}_last", Role.FINAL, carried.name)
            row = "n * HV + h"
            conditions.insert(0, f"{pointer} is not None")
            if segments is not None:
                last = "0" if self._loop_kind is Loop.REVERSE else "segments - 1"
                conditions.append(f"segment == {last}")
        mask = self._mask_argument(start, rows=False)
        line = f"tl.store({self._state_address(f'{pointer} + ({row})', start)}, {name}{mask})"
        return [f"if {' and '.join(conditions)}:", f"    {line}"] if conditions else [line]

    def _state_address(self, base: str, t: Tile) -> str:
        """Within a [K, V] matrix (row-major, as users see states) of a tile laid out [V, K]."""
        if Axis.V in t.axes:
            return f"{base} * K * V + ok[None, :] * V + ov[:, None]"
        return f"{base} * K + ok" if t.axes else base

    def _load_at(self, base: str, start: Tile) -> str:
        mask = self._mask_argument(start, rows=False, other=True)
        return f"tl.load({self._state_address(base, start)}{mask})"

    def _stores(self, tiles: Iterable[Tile]) -> list[str]:
        """Stores of those buffers whose value is among `tiles`."""
        present = {unaliased(t) for t in tiles}
        for name, t in self._to_store:
            if unaliased(t) in present:
                self._store(name, t)
        return self.flush()

    def _store(self, name: BufferId, t: Tile) -> None:
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
