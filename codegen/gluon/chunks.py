"""A kernel parallel over chunks as Gluon: programs that stay, and take one chunk after the other.

One warp loads by TMA, warp groups of four compute. Each tile that is loaded has its place in shared
memory and two barriers: `ready`, where its bytes have arrived, and `empty`, where nothing of it is
read any more, so that the next chunk's comes while this one's rest is computed; both are for all
that is released at once. What is read all along has two places, for chunks in turns.

All of V is one tile. Where chunks are not whole, zeros replace what was loaded beyond the end of a
sequence, and only its rows are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .. import tiled
from ..buffers import BufferId
from ..config import KernelConfig
from ..gates import DECAYED
from ..interface import Role, Signature, stored
from ..order import ordered, stored_early
from ..plan import Kernel
from ..tile import SQUARE, TIMES, Axis, Tile, TileOp
from ..triton.kernel import STORAGE
from .chunk_steps import ChunkStep, is_made_again, lying
from .memory import BARRIER, MOST_SHARED, SHARED_OF_TWO, SIZE, GluonKernel, constants_of

_EXCHANGED = 18 * 1024  # bytes that Triton takes where tiles change their layouts
_BESIDE = 2 * 1024  # where vectors do
_GIVEN = (
    *("ready", "empty", "first", "stride", "items", "chunks", "TOKENS", "cu_seqlens"),
    *("chunk_table", "HV", "K", "V", "C", "PACKED", "EVEN"),
)


def print_chunks(
    own: tiled.TiledKernel, kernel: Kernel, signature: Signature, config: KernelConfig
) -> GluonKernel:
    """A kernel that `refusal` has let pass."""
    statements = stored_early(_of_gates_alone(own.statements))
    whole = replace(own, before=tuple(statements), inside=(), after=())
    loaded = frozenset(s.value for s in statements if isinstance(s, tiled.Load))
    again = {s.value for s in statements if isinstance(s, tiled.Compute)}
    whole = ordered(whole, frozenset(x for x in again if is_made_again(x, loaded)))
    first = _Printer(whole, kernel, signature, config, {}, frozenset())
    first.print()  # says what is read from when to when
    twice = first.twice()
    return _Printer(whole, kernel, signature, config, first.together(twice), twice).print()


def _of_gates_alone(statements: Iterable[tiled.Statement]) -> list[tiled.Statement]:
    """`statements`, decayed products without sums of log-decays, which they compute themselves."""
    made = [
        replace(s, args=(*s.args[:-3], s.args[-1]))
        if isinstance(s, tiled.Compute) and s.value.op in DECAYED
        else s
        for s in statements
    ]
    while True:
        used = {u.value for s in made for u in tiled.uses(s)}
        left = [s for s in made if not isinstance(s, tiled.Compute) or s.value in used]
        if len(left) == len(made):
            return made
        made = left


class _Printer(ChunkStep):
    """Prints the step of one chunk and head, then the partitions around it."""

    def __init__(
        self,
        own: tiled.TiledKernel,
        kernel: Kernel,
        signature: Signature,
        config: KernelConfig,
        groups: Mapping[str, int],
        twice: frozenset[str],
    ) -> None:
        """`groups`: by name of what is loaded, what is waited for at once; else one by one.

        `twice`: what has two places, in turns.
        """
        super().__init__(own, kernel, signature, config)
        self._groups, self._twice = dict(groups), twice
        self._first: dict[str, int] = {}  # the line by which each was read first
        self._release: dict[str, int] = {}  # the barrier after which it is not
        self._sizes: dict[str, int] = {}  # bytes of what TMA loads
        self._rows: set[str] = set()  # what has a row per token, of that
        self._copies: dict[str, str] = {}  # what the loading warp does for each
        self._next: dict[str, str] = {}  # vectors, which it loads before it waits
        self._indices: dict[Axis, None] = {}  # along which they lie
        self._numbers: list[str] = []  # a chunk's numbers
        self._arrived: set[int] = set()  # groups
        self._order: list[int] = []  # of groups, in which they are read no more

    # ---- what is loaded ------------------------------------------------------------------------

    def _load(self, s: tiled.Load) -> None:
        name, axes = self.known[s.value], s.value.axes
        if not axes:
            self._load_number(name, s)
            return
        del self.known[s.value]
        self._places[s.value] = name
        self._groups.setdefault(name, len(self._groups))
        self._loading[name] = self._computing[name] = None
        if len(axes) == 2:
            self._load_tile(name, s)
        else:
            self._load_vector(name, s)

    def _load_tile(self, name: str, s: tiled.Load) -> None:
        first, second = (self.tiled.extents[a] for a in lying(s.value.axes))
        width = next(a for a in reversed(lying(s.value.axes)))
        if isinstance(s.of, BufferId):
            desc = self._parameter(f"{name}_desc", Role.BUFFER, s.of)
            at = f"[row, h * {self._whole(width)}]"
            if s.value.axes[0] not in TIMES:
                at = "[(index * HV + h) * V, 0]"
        else:
            desc = self._parameter(f"{name}_desc", Role.OPERAND, s.of)
            batch, tokens, heads, group = self._strides(name, s)
            at = f"[(batch * ({batch} // {tokens})).to(gl.int32) + at, h // {group} * {heads}]"
            self._loading |= dict.fromkeys((batch, tokens, heads, group))
        self._loading[desc] = None
        self._blocks[desc] = (first, second)
        shape = ", ".join(SIZE[a] for a in lying(s.value.axes))
        places = "2, " if name in self._twice else ""
        self._memory.append(
            f"{name} = gl.allocate_shared_memory(gl.bfloat16, [{places}{shape}], {desc}.layout)"
        )
        self._sizes[name] = 2 * first * second
        if s.value.axes[0] in TIMES:
            self._rows.add(name)
        self._taken += self._sizes[name] * (2 if places else 1)
        ready = self._barrier("ready", self._groups[name])
        self._copies[name] = f"async_load({desc}, {at}, {ready}, {self._place(name)})"

    def _load_vector(self, name: str, s: tiled.Load) -> None:
        (axis,) = s.value.axes
        if isinstance(s.of, BufferId):
            pointer = self._parameter(f"{name}_ptr", Role.BUFFER, s.of)
            at = f"{pointer} + (row + oi).to(gl.int64) * HV + h"
            if axis not in TIMES:
                at = f"{pointer} + (index * HV + h) * K + ok"
                self._loading[SIZE[axis]] = None
        else:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            batch, tokens, heads, group = self._strides(name, s)
            row = f"batch.to(gl.int64) * {batch} + (at + oi).to(gl.int64) * {tokens}"
            at = f"{pointer} + {row} + h // {group} * {heads}"
            self._loading |= dict.fromkeys((batch, tokens, heads, group))
        self._loading[pointer] = None
        ahead = self.names.fresh(f"{name}_next")
        size = SIZE[axis]
        self._memory.append(f"{name} = gl.allocate_shared_memory(gl.float32, [{size}], VECTOR)")
        self._taken += 4 * self.tiled.extents[axis]
        self._indices[axis] = None
        mask = ", mask=there, other=0.0" * (axis in TIMES)
        self._next[name] = f"{ahead} = gl.load({at}{mask}).to(gl.float32)"
        self._copies[name] = f"{name}.store({ahead})"

    def _load_number(self, name: str, s: tiled.Load) -> None:
        if s.source is tiled.Source.NUMBER:
            self._computing[self._parameter(name, Role.PARAM, s.of)] = None
            return
        is_buffer = isinstance(s.of, BufferId)
        role = Role.BUFFER if is_buffer else Role.OPERAND
        pointer = self._parameter(f"{name}_ptr", role, s.of)
        at = "index * HV + h" if is_buffer else "h"
        self._numbers.append(f"{name} = gl.load({pointer} + {at}).to(gl.float32)")
        self._computing[pointer] = None

    def _has_two(self, group: int) -> bool:
        return any(self._groups[name] == group for name in self._twice)

    def _place(self, name: str) -> str:
        return f"{name}.index(turn & 1)" if name in self._twice else name

    def _barrier(self, which: str, group: int) -> str:
        """Barriers of groups with two places come last, in pairs."""
        twos = sorted({self._groups[name] for name in self._twice})
        if group not in twos:
            return f"{which}.index({group})"
        return f"{which}.index({twos[0] + 2 * twos.index(group)} + (turn & 1))"

    def _parity(self, group: int) -> str:
        return "turn >> 1 & 1" if self._has_two(group) else "turn & 1"

    def touch(self, x: Tile) -> str:
        """The name of what was loaded, which is there from now on and read now."""
        name = self._places[x]
        group = self._groups[name]
        if group not in self._arrived:
            self._arrived.add(group)
            wait = f"mbarrier.wait({self._barrier('ready', group)}, {self._parity(group)})"
            self.lines.append(wait)
            rows = sorted(n for n, g in self._groups.items() if g == group and n in self._rows)
            if rows:
                self.called.add("cut")
                cuts = (f"    cut({self._place(n)}, rows, STATES, C)" for n in rows)
                self.lines += ["if not EVEN:", *cuts]
        self._first.setdefault(name, len(self.lines))
        self._touched.add(name)
        return self._place(name)

    def _released(self, lines: list[str]) -> list[str]:
        """`lines`, and at barriers the arrivals for what is not read after them."""
        made: list[str] = []
        last = {
            g: max(self._last[n] for n in self._last if self._groups[n] == g) for g in self._arrived
        }
        for n, line in enumerate(lines):
            made.append(line)
            if line != BARRIER:
                continue
            over = [g for g, of in last.items() if of <= n]
            for group in over:
                del last[group]
                made.append(f"mbarrier.arrive({self._barrier('empty', group)}, count=1)")
            self._order += over
            self._release |= {name: n for name, g in self._groups.items() if g in over}
        return made

    @property
    def _beside(self) -> int:
        exchanged = any(
            s.value.op is TileOp.CUMSUM and s.value.axes == SQUARE
            for s in self._statements
            if isinstance(s, tiled.Compute)
        )
        return _EXCHANGED if exchanged else _BESIDE

    def twice(self) -> frozenset[str]:
        """What is to have two places: what is read from the start on is there a turn ahead."""
        taken = self._taken + self._beside
        two = self._config.warps == 4 and taken <= SHARED_OF_TWO
        room = (SHARED_OF_TWO if two else MOST_SHARED) - taken
        found: list[str] = []
        for name in sorted(self._sizes, key=lambda n: self._first[n] - self._last[n]):
            if self._sizes[name] <= room:
                room -= self._sizes[name]
                found.append(name)
        return frozenset(found)

    def together(self, twice: frozenset[str]) -> dict[str, int]:
        """Groups: what is released at one barrier, and each of `twice` alone."""
        once = [name for name in self._groups if name not in twice]
        times = sorted({self._release[name] for name in once})
        found = {name: times.index(self._release[name]) for name in once}
        return found | {name: len(times) + n for n, name in enumerate(sorted(twice))}

    # ---- the three functions -------------------------------------------------------------------

    def print(self) -> GluonKernel:
        own, kernel = self.tiled, self._kernel
        for s in self._statements:
            if isinstance(s, tiled.Load):
                self._load(s)
        step = self._released(self.step())
        self._allocate_rooms()
        self._loading |= dict.fromkeys(_GIVEN)
        self._computing |= dict.fromkeys((*_GIVEN, "BK", "BV"))
        computing = self._compute(step)
        source = "\n\n".join((self._load_partition(), computing, self._entry()))
        return GluonKernel(
            name=kernel.name,
            loop=kernel.loop,
            source=source,
            parameters=tuple(self.parameters.values()),
            blocks=tuple(self._blocks.items()),
            shared=self._taken + self._beside,
            v_programs=own.v_parts,
            constants=constants_of(own),
            config=self._config,
            stores=stored(kernel, self._signature, STORAGE),
            functions=frozenset(self.called),
            is_persistent=True,
        )

    @staticmethod
    def _loop(body: Iterable[str]) -> list[str]:
        lines = [
            "item = first + turn * stride",
            "index = item // HV  # of the chunk, over all sequences",
            "h = item % HV",
            "if PACKED:",
            "    n = gl.load(chunk_table + 2 * index).to(gl.int32)  # the sequence",
            "    at = gl.load(chunk_table + 2 * index + 1).to(gl.int32) * C",
            "    at += gl.load(cu_seqlens + n).to(gl.int32)",
            "    rows = gl.minimum(gl.load(cu_seqlens + n + 1).to(gl.int32) - at, C)",
            "    batch = n * 0",
            "else:",
            "    batch = index // chunks",
            "    at = index % chunks * C",
            "    rows = gl.minimum(TOKENS - at, C)",
            "row = batch * TOKENS + at",
            "there = oi >= 0 if EVEN else oi < rows",
            *body,
        ]
        head = "for turn in range((items - first + stride - 1) // stride):"
        return [head, *(f"    {line}" for line in lines)]

    def _load_partition(self) -> str:
        given = self._constants(self._loading)
        body = list(self._next.values())  # on their way while what was loaded is still read
        for group in sorted(self._order, key=self._has_two, reverse=True):
            names = [n for n, g in self._groups.items() if g == group]
            ready, empty = (self._barrier(which, group) for which in ("ready", "empty"))
            body.append(f"mbarrier.wait({empty}, {self._parity(group)} ^ 1)")
            size = sum(self._sizes.get(n, 0) for n in names)
            body += [f"mbarrier.expect({ready}, {size})"] * bool(size)
            body += [self._copies[n] for n in names]
            if any(n in self._next for n in names):
                body += [BARRIER, f"mbarrier.arrive({ready}, count=1)"]
        lines = ['"""Loads what the next chunk needs as soon as there is room."""']
        self._indices[Axis.I] = None  # rows, which all have
        lines.append("LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])")
        for axis in self._indices:
            index = "oi" if axis in TIMES else "ok"
            lines.append(f"{index} = gl.arange(0, {SIZE[axis]}, LANES)")
        lines += self._loop(body)
        head = f"@gluon.jit\ndef {self._kernel.name}_load({', '.join(given)}):\n"
        return head + "\n".join(f"    {line}" for line in lines)

    def _compute(self, step: list[str]) -> str:
        warps = self._config.warps
        groups = warps // 4
        names = self._constants(self._computing)
        mma = f"gl.NVMMADistributedLayout([3, 0], [4, {groups}], [16, {{}} // {groups}, 16])"
        lines = [
            '"""Computes chunk after chunk."""',
            f"KEYS: gl.constexpr = {mma.format('BK')}",
            f"VALUES: gl.constexpr = {mma.format('BV')}",
            f"SCORES: gl.constexpr = {mma.format('C')}",
            f"STATES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [{warps}, 1], [1, 0])",
            "LANES: gl.constexpr = gl.SliceLayout(1, SCORES)",
            f"LINE: gl.constexpr = gl.BlockedLayout([2], [32], [{warps}], [0])",
            f"COLUMNS: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [1, {warps}], [0, 1])",
            "oi = gl.arange(0, C, gl.SliceLayout(1, SCORES))",
            "oj = gl.arange(0, C, gl.SliceLayout(0, SCORES))",
            *self._indices_of_channels(step),
            *self._fill_ones(),
            *self._loop([*self._numbers, *step]),
            "tma.store_wait(0)",
        ]
        head = f"@gluon.jit\ndef {self._kernel.name}_compute({', '.join(names)}):\n"
        return head + "\n".join(f"    {line}" for line in lines)

    @staticmethod
    def _indices_of_channels(step: list[str]) -> list[str]:
        text = "\n".join(step)
        layout = "CHANNELS: gl.constexpr = gl.SliceLayout(0, KEYS)"
        index = "ok = gl.arange(0, BK, CHANNELS)"
        return [layout] * ("CHANNELS" in text or "+ ok" in text) + [index] * ("+ ok" in text)

    def _fill_ones(self) -> list[str]:
        """Lines before the loop: what no chunk changes."""
        lines = [
            f"{name}.store(gl.where({where}, 1.0, 0.0).to(gl.bfloat16))"
            for name, where in self._ones.items()
        ]
        return [*lines, "fence_async_shared()", BARRIER] if lines else []

    def _allocate_rooms(self) -> None:
        C, K = self.tiled.chunk, self.tiled.extents[Axis.K]
        for name in self._ones:
            self._allocate(name, "[C, C]")
            self._taken += 2 * C * C
        for name, (shape, count) in self._rooms.items():
            layout = f"gl.NVMMASharedLayout.get_default_for([{shape}], gl.bfloat16)"
            self._memory.append(
                f"{name} = gl.allocate_shared_memory(gl.bfloat16, [{count}, {shape}], {layout})"
            )
            self._taken += 2 * count * C * (C if shape == "C, C" else K)

    def _entry(self) -> str:
        stores = ", ".join(str(n) for n, _ in self._kernel.stores) or "nothing"
        arrivals: list[int] = []
        for group in sorted(self._order):
            names = {name for name, g in self._groups.items() if g == group}
            count = bool(names & self._sizes.keys()) + bool(names & self._next.keys())
            arrivals += [count] * (2 if self._has_two(group) else 1)
        count = len(arrivals)
        layout = f"gl.allocate_shared_memory(gl.int64, [{count}, 1], mbarrier.MBarrierLayout())"
        lines = [
            f'"""{self._kernel.loop.value}; stores {stores}."""',
            "VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])",
            "if PACKED:  # the table has more",
            "    items = gl.load(chunk_offsets + SEQUENCES).to(gl.int32) * HV",
            "first = gl.program_id(0)",
            "stride = gl.num_programs(0)",
            *self._memory,
            f"ready = {layout}",
            f"empty = {layout}",
            *(f"mbarrier.init(ready.index({g}), count={n})" for g, n in enumerate(arrivals)),
            f"for slot in gl.static_range({count}):",
            "    mbarrier.init(empty.index(slot), count=1)",
            "gl.warp_specialize([",
            f"    ({self._kernel.name}_compute, ({', '.join(self._computing)})),",
            f"    ({self._kernel.name}_load, ({', '.join(self._loading)})),",
            f"], [1], [{40 if self._next else 24}])",
        ]
        return self._entry_head("TOKENS, chunks, items, SEQUENCES") + "\n".join(
            f"    {line}" for line in lines
        )
