"""What printed kernels load and store: addresses from 64-bit bases, and masks at every tail.

Operands come with their strides. A buffer of tokens is [tokens, HV, channels]; one of chunks is
[chunks, HV, V, K], the layout in which scans hold a state; users see states as [K, V].
"""

from __future__ import annotations

from collections.abc import Iterable

from .expressions import Names, unaliased
from .plan import Loop
from .tile import Axis, Tile, TileOp
from .triton_expressions import TritonExpressions
from .triton_types import Parameter, Role, Signature, buffer_dtype

RANGE = {Axis.I: "oi", Axis.J: "oj", Axis.V: "ov", Axis.K: "ok"}


class TritonMemory(TritonExpressions):
    """Loads and stores of one kernel; the parameters that they need accumulate."""

    def __init__(
        self, order: tuple[Axis, ...], names: Names, signature: Signature, chunk: int
    ) -> None:
        super().__init__(order, names, signature, chunk)
        self._loop_kind = Loop.PARALLEL
        self._v_programs = 1
        self._to_store: tuple[tuple[str, Tile], ...] = ()
        self._parameters: dict[str, Parameter] = {}

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
        self._raw[t] = buffer_dtype(t, self._signature.dtype)

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

    def _stores(self, tiles: Iterable[Tile]) -> list[str]:
        """Stores of those buffers whose value is among `tiles`."""
        present = {unaliased(t) for t in tiles}
        for name, t in self._to_store:
            if unaliased(t) in present:
                self._store(name, t)
        return self.flush()

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
