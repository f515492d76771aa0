"""What printed kernels load and store: addresses from 64-bit bases, and masks at every tail.

Operands come with their strides: numbers of the call, or constants where a launch says so. A buffer
of tokens is [tokens, HV, channels]; one of chunks is [chunks, HV, V, K], the layout in which scans
hold a state; users see states as [K, V], or as [V, K] where they are held transposed.
"""

from __future__ import annotations

from ..buffers import BufferId
from ..expressions import identifier
from ..interface import Dtype, Role
from ..plan import Loop
from ..tile import TIMES, Axes, Axis, Tile
from ..tiled import Arrive, Begin, Finish, Load, Source, Store
from .expressions import TritonExpressions

RANGE = {Axis.I: "oi", Axis.J: "oj", Axis.V: "ov", Axis.K: "ok"}
_SIZE = {Axis.I: "C", Axis.J: "C", Axis.V: "BV", Axis.K: "BK"}


class TritonMemory(TritonExpressions):
    """Loads and stores of one kernel; the parameters that they need accumulate."""

    slot = ""  # of a pool, the variable that says which one

    def _buffer(self, of: BufferId) -> str:
        return self._parameter(f"{identifier(str(of))}_ptr", Role.BUFFER, of)

    def shape(self, axes: Axes) -> str:
        sizes = ", ".join(_SIZE[a] for a in self.laid(axes))
        return f"({sizes}{',' * (len(axes) == 1)})"

    def zeros(self, axes: Axes) -> str:
        return f"tl.zeros({self.shape(axes)}, dtype=tl.float32)" if axes else "0.0"

    def _mask(self, axes: Axes, mask: Axes, *, other: bool = False) -> str:
        """The argument of a load or store of a tile with `axes`."""
        layout = self.laid(axes)
        conditions = []
        for axis in self.laid(mask):
            condition = "rows" if axis in TIMES else self.tail(axis)
            assert condition is not None
            text = f"({condition})" if " " in condition and len(layout) > 1 else condition
            conditions.append(self.place(text, (axis,), layout))
        if not conditions:
            return ""
        return f", mask={' & '.join(conditions)}" + (", other=0.0" if other else "")

    def _offsets(self, axes: Axes, stride: str) -> str:
        """Offsets within a tile of rows: `stride` between tokens, 1 between channels."""
        layout = self.laid(axes)
        parts = []
        for n, axis in enumerate(layout):
            time = axis is Axis.I or (axis is Axis.J and Axis.I not in layout)
            text = f"{RANGE[axis]} * {stride}" if time else RANGE[axis]
            if len(layout) > 1:
                index = ":, None" if n == 0 else "None, :"
                text = f"{RANGE[axis]}[{index}]" + (f" * {stride}" if time else "")
            parts.append(text)
        return " + ".join(parts)

    def load(self, s: Load) -> None:
        """A value from an operand or buffer; a number is its parameter."""
        name, axes = self.known[s.value], s.value.axes
        mask = self._mask(axes, s.mask, other=True)
        if s.source is Source.NUMBER:
            self._parameter(name, Role.PARAM, s.of)
            return
        if isinstance(s.of, BufferId):
            address = self._buffer_address(self._buffer(s.of), axes)
        elif s.source is Source.HEADS:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            address = f"{pointer} + h"
            if axes:
                address += f" * {axes[0].value.upper()} + {RANGE[axes[0]]}"
        else:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            channels = next((a for a in axes if a not in TIMES), None)
            batch = self._parameter(f"{name}_sb", Role.STRIDE_BATCH, s.of, channels)
            tokens = self._parameter(f"{name}_st", Role.STRIDE_TOKEN, s.of, channels)
            heads = self._parameter(f"{name}_sh", Role.STRIDE_HEAD, s.of, channels)
            group = self._parameter(f"{name}_group", Role.GROUP, s.of)
            address = f"{pointer} + batch * {batch} + at * {tokens} + (h // {group}) * {heads}"
            address += f" + ({self._offsets(axes, tokens)})" if axes else ""
        cast = ".to(tl.float32)" if s.source is Source.HEADS else ""
        self.lines.append(f"{name} = tl.load({address}{mask}){cast}")
        if s.dtype is not Dtype.FLOAT32:
            self.dtypes[s.value] = s.dtype

    def _buffer_address(self, pointer: str, axes: Axes) -> str:
        layout = self.laid(axes)
        time = [a for a in layout if a in TIMES]
        if not time:
            size = {(): "1", (Axis.K,): "K", (Axis.V,): "V", (Axis.K, Axis.V): "K * V"}[axes]
            index = "index" if self.tiled.scan is Loop.PARALLEL else "(index + chunk)"
            base = f"{pointer} + ({index} * HV + h) * {size}"
            if axes == (Axis.K, Axis.V):
                return f"{base} + (ov[:, None] * K + ok[None, :])"
            return base + "".join(f" + {RANGE[a]}" for a in layout)
        channel = [a for a in layout if a not in TIMES]
        size = channel[0].value.upper() if channel else ("C" if len(time) == 2 else "1")
        width = "" if size == "1" else f" * {size}"
        offsets = self._offsets(axes, f"(HV{width})")
        return f"{pointer} + (row * HV + h){width} + ({offsets})"

    def store(self, s: Store) -> None:
        """A value to its buffer."""
        pointer = self._parameter(f"{s.buffer}_ptr", Role.BUFFER, s.buffer)
        text = self.place(self.text(s.use.value), s.use.axes, self.laid(s.axes))
        if set(s.use.axes) != set(s.axes):
            text = f"tl.broadcast_to({text}, {self.shape(s.axes)})"
        mask = self._mask(s.axes, s.mask)
        line = f"tl.store({self._buffer_address(pointer, s.axes)}, {text}{mask})"
        self.lines += ["if i_v == 0:", f"    {line}"] if s.once else [line]

    # ---- states, which users see as [K, V], row-major, or transposed ----------------------------

    def begin(self, s: Begin) -> None:
        """A carry as the loop begins."""
        name, axes = self.known[s.value], s.value.axes
        if s.identity:
            inside = " & (ok[None, :] < K)" if self.tail(Axis.K) else ""
            line = f"{name} = tl.where((ov[:, None] == ok[None, :]){inside}, 1.0, 0.0)"
            self.lines.append(line)
            return
        self.lines.append(f"{name} = {self.zeros(axes)}")
        if self.tiled.pooled:
            address = f"{self._pool_address(s.value, self.slot)}{self._slot_mask(axes, s.mask)}"
            self.lines.append(f"{name} += tl.load({address}, other=0.0).to(tl.float32)")
        elif s.from_call:
            pointer = self._parameter(f"{name}_first", Role.INITIAL, str(s.value.attrs[0]))
            mask = self._mask(axes, s.mask, other=True)
            base, transposed = f"{pointer} + (n * HV + h)", self.tiled.transposed
            address = self._state_address(base, axes, transposed=transposed)
            load = f"{name} += tl.load({address}{mask}).to(tl.float32)"
            self.lines += [f"if {pointer} is not None:", f"    {load}"]

    def arrive(self, s: Arrive) -> None:
        """The carries past the segments before this one."""
        reverse = self.tiled.scan is Loop.REVERSE
        loop = "segments - 1, segment, -1" if reverse else "0, segment"
        self.lines += [
            f"for before in tl.range({loop}, num_stages=1):",
            "    at = (part - segment + before) * HV + h",
        ]
        for c in s.carries:
            name, axes = self.known[c.value], c.value.axes
            added = self._end(c.end, axes, c.mask)
            if c.factor is None:
                self.lines.append(f"    {name} += {added}")
            elif c.is_matrix:
                product = self._passed(name, c.factor, added, s.precision.value)
                self.lines.append(f"    {name} = {product}")
            else:
                log = self._end(c.factor, c.axes, tuple(a for a in c.mask if a in c.axes))
                kept = self.place(f"tl.exp({log})", c.axes, self.laid(axes))
                self.lines.append(f"    {name} = {kept} * {name} + {added}")

    def _end(self, of: BufferId, axes: Axes, mask: Axes) -> str:
        """What a carry was as the segment at `at` ended."""
        address = self._state_address(f"{self._buffer(of)} + at", axes)
        return f"tl.load({address}{self._mask(axes, mask, other=True)})"

    def _passed(self, state: str, matrix: BufferId, added: str, precision: str) -> str:
        """A S + B of the segment at `at`, or A^T S + B of one that is scanned from its end."""
        row, column = "ok[:, None]", "ok[None, :]"  # of the state before and after
        if self.tiled.scan is Loop.FORWARD:
            row, column = column, row
        tail = self.tail(Axis.K)
        mask = f", mask=({tail})[:, None] & ({tail})[None, :], other=0.0" if tail else ""
        at = f"{self._buffer(matrix)} + at * K * K + {row} * K + {column}"
        return f'tl.dot({state}, tl.load({at}{mask}), {added}, input_precision="{precision}")'

    def finish(self, s: Finish) -> None:
        """A carry after the loop; a pool has had it since the last token."""
        if self.tiled.pooled:
            return
        name, axes = self.known[s.value], s.value.axes
        conditions = ["i_v == 0"] if s.once else []
        if s.end is not None:
            pointer, row = self._buffer(s.end), "part * HV + h"
        else:
            pointer = self._parameter(f"{name}_last", Role.FINAL, str(s.value.attrs[0]))
            row = "n * HV + h"
            conditions.insert(0, f"{pointer} is not None")
        if s.last:
            last = "0" if self.tiled.scan is Loop.REVERSE else "segments - 1"
            conditions.append(f"segment == {last}")
        transposed = s.end is None and self.tiled.transposed
        address = self._state_address(f"{pointer} + ({row})", axes, transposed=transposed)
        line = f"tl.store({address}, {name}{self._mask(axes, s.mask)})"
        test = f"if {' and '.join(conditions)}:"
        self.lines += [test, f"    {line}"] if conditions else [line]

    # ---- states in a pool ------------------------------------------------------------------------

    def find_slot(self) -> list[str]:
        """Which slot the sequence's state is read from; what is outside the pool is no slot."""
        self.slot = self.names.fresh("slot")
        accepted, after = self._slots(".accepted", "accepted"), self.names.fresh("after")
        return [
            f"{after} = n * 0  # tokens before the one whose state is read",
            f"if {accepted} is not None:",
            f"    {after} += tl.load({accepted} + n * {self._slot_stride('.accepted')}) - 1",
            *self._load_slot(after, f", mask=({after} >= 0) & ({after} < WIDTH), other=-1"),
        ]

    def keep_states(self) -> list[str]:
        """Each state to its slot, after every token; the next one reads what the pool holds."""
        lines = self._load_slot("chunk", "")
        for s in (s for s in self.tiled.after if isinstance(s, Finish)):
            name, pool = self.known[s.value], self._pool(s.value)
            address = self._pool_address(s.value, self.slot)
            mask = self._slot_mask(s.value.axes, s.mask)
            lines += [
                f"tl.store({address}, {name}{mask})",
                f"{name} = {name}.to({pool}.dtype.element_ty).to(tl.float32)",
            ]
        return lines

    def _load_slot(self, token: str, mask: str) -> list[str]:
        slots, tokens = self._slots(".slots", "slots"), self._slot_stride(".slots", tokens=True)
        at = f"{slots} + n * {self._slot_stride('.slots')} + {token} * {tokens}"
        return [f"{self.slot} = tl.load({at}{mask}).to(tl.int64)"]

    def _slots(self, of: str, name: str) -> str:
        return self._parameter(f"{name}_ptr", Role.SLOTS, of)

    def _slot_stride(self, of: str, *, tokens: bool = False) -> str:
        name, role = ("st", Role.STRIDE_TOKEN) if tokens else ("sb", Role.STRIDE_BATCH)
        return self._parameter(f"{of[1:]}_{name}", role, of)

    def _slot_mask(self, axes: Axes, mask: Axes) -> str:
        """Of no slot nothing is there: all channels are past the end (of a number, the number)."""
        there = f"({self.slot} >= 0) & ({self.slot} < SLOTS)"
        if not axes:
            return f", mask={there}"
        axis = Axis.V if Axis.V in axes else Axis.K
        end = f"({RANGE[axis]} < tl.where({there}, {axis.value.upper()}, 0))"
        rest = self._mask(axes, tuple(a for a in mask if a is not axis)).removeprefix(", mask=")
        inside = self.place(end, (axis,), self.laid(axes))
        return f", mask={inside}" + (f" & {rest}" if rest else "")

    def _pool(self, state: Tile) -> str:
        return self._parameter(f"{self.known[state]}_pool", Role.POOL, str(state.attrs[0]))

    def _pool_address(self, state: Tile, slot: str) -> str:
        name, of = self.known[state], str(state.attrs[0])
        slots = self._parameter(f"{name}_sb", Role.STRIDE_BATCH, of)
        heads = self._parameter(f"{name}_sh", Role.STRIDE_HEAD, of)
        address = f"{self._pool(state)} + {slot} * {slots} + h * {heads}"
        for axis in self.laid(state.axes):
            role = Role.STRIDE_KEY if axis is Axis.K else Role.STRIDE_VALUE
            stride = self._parameter(f"{name}_s{axis.value}", role, of)
            address += f" + {self.place(RANGE[axis], (axis,), self.laid(state.axes))} * {stride}"
        return address

    def _state_address(self, base: str, axes: Axes, *, transposed: bool = False) -> str:
        """Within a matrix [K, V], or [V, K] if transposed, of a tile laid out [V, K]."""
        if Axis.V in axes:
            keys, values = "ok[None, :]", "ov[:, None]"
            at = f"{values} * K + {keys}" if transposed else f"{keys} * V + {values}"
            return f"{base} * K * V + {at}"
        return f"{base} * K + ok" if axes else base
