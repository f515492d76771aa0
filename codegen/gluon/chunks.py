"""A kernel parallel over chunks as Gluon: programs that stay, and take one chunk after the other.

One warp loads by TMA, warp groups of four compute. Each tile that is loaded has its place in shared
memory and two barriers: `ready`, where its bytes have arrived, and `empty`, where nothing of it is
read any more, so that the next chunk's comes while this one's rest is computed. Products are
asynchronous: while one runs, what needs none is computed, and the next is issued before anything
waits. Factors that are computed are put in shared memory, from where products take them transposed
or not. Vectors are per row of a tile (LANES), and are converted where they meet another layout.

All of V is one tile. Calls must be dense, their chunks whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .. import tiled
from ..buffers import BufferId
from ..config import KernelConfig
from ..expressions import identifier, unaliased
from ..interface import Role, Signature, stored
from ..order import ordered
from ..plan import Kernel
from ..tile import POINTWISE, TIMES, Axes, Axis, Tile, TileOp, Which, summed_axes
from ..triton.kernel import STORAGE
from .memory import MOST_SHARED, SIZE, GluonKernel, GluonMemory
from .schedule import subtracted

ORDERED = True
TWICE = True
IN_FLIGHT = 2  # products at most
_LAYOUTS = {(Axis.I, Axis.J): "SCORES", (Axis.K, Axis.V): "STATES"}
_BARRIER = "barrier()"
_EXCHANGED = 18 * 1024  # bytes that Triton takes where tiles change their layouts
_BESIDE = 2 * 1024  # where vectors do
_GIVEN = ("ready", "empty", "first", "stride", "items", "chunks", "HV", "K", "V", "C")


def print_chunks(
    own: tiled.TiledKernel, kernel: Kernel, signature: Signature, config: KernelConfig
) -> GluonKernel:
    """A kernel that `refusal` has let pass."""
    whole = replace(own, before=tuple(_stored_early(own.statements)), inside=(), after=())
    if ORDERED:
        whole = ordered(whole)
    first = _Printer(whole, kernel, signature, config, {}, frozenset())
    first.print()  # says what is read from when to when
    twice = first.twice() if TWICE else frozenset()
    return _Printer(whole, kernel, signature, config, first.together(twice), twice).print()


def _stored_early(statements: Iterable[tiled.Statement]) -> list[tiled.Statement]:
    """`statements`, each store behind what makes its value: what was loaded for that is free."""
    made = [s for s in statements if not isinstance(s, tiled.Store)]
    for store in (s for s in statements if isinstance(s, tiled.Store)):
        after = (
            n
            for n, s in enumerate(made)
            if isinstance(s, tiled.Compute | tiled.Product) and s.value == store.use.value
        )
        made.insert(next(after, len(made)) + 1, store)
    return made


def _layout(axes: Axes) -> str:
    """The name of the layout in which a tile of two axes lies in registers."""
    return _LAYOUTS.get(axes) or ("KEYS" if Axis.K in axes else "VALUES")


def _lying(axes: Axes) -> Axes:
    """The axes of a loaded tile in the order in which memory has them."""
    return (Axis.V, Axis.K) if set(axes) == {Axis.K, Axis.V} else axes


class _Printer(GluonMemory):
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
        self._statements = subtracted(own.statements)
        self.uses.update(u.value for s in self._statements for u in tiled.uses(s))
        self._places: dict[Tile, str] = {}  # of what is loaded: its name in shared memory
        self._copies: dict[str, str] = {}  # what the loading warp does for each
        self._next: dict[str, str] = {}  # vectors, which it loads before it waits
        self._numbers: list[str] = []  # a chunk's numbers
        self._arrived: set[int] = set()  # groups
        self._touched: set[str] = set()  # that the statement at hand reads
        self._last: dict[str, int] = {}  # the line by which each was read last
        self._order: list[int] = []  # of groups, in which they are read no more
        self._staging: dict[Tile, str] = {}
        self._outgoing: dict[int, str] = {}
        self._made = {s.value for s in self._statements if isinstance(s, tiled.Compute)}
        self._todo = [s for s in self._statements if isinstance(s, tiled.Product)]
        self._running: list[tiled.Product] = []
        self._functions: set[str] = set()
        self._slice = "LANES"
        self._shared = 0

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
        first, second = (self.tiled.extents[a] for a in _lying(s.value.axes))
        width = next(a for a in reversed(_lying(s.value.axes)))
        if isinstance(s.of, BufferId):
            desc = self._parameter(f"{name}_desc", Role.BUFFER, s.of)
            at = f"[index * C, h * {self._whole(width)}]"
            if s.value.axes[0] not in TIMES:
                at = "[(index * HV + h) * V, 0]"
        else:
            desc = self._parameter(f"{name}_desc", Role.OPERAND, s.of)
            batch, tokens, heads, group = self._strides(name, s)
            at = f"[n * ({batch} // {tokens}) + chunk * C, h // {group} * {heads}]"
            self._loading |= dict.fromkeys((batch, tokens, heads, group))
        self._loading[desc] = None
        self._blocks[desc] = (first, second)
        shape = ", ".join(SIZE[a] for a in _lying(s.value.axes))
        places = "2, " if name in self._twice else ""
        self._memory.append(
            f"{name} = gl.allocate_shared_memory(gl.bfloat16, [{places}{shape}], {desc}.layout)"
        )
        self._sizes[name] = 2 * first * second
        self._shared += self._sizes[name] * (2 if places else 1)
        ready = self._barrier("ready", self._groups[name])
        self._copies[name] = f"async_load({desc}, {at}, {ready}, {self._place(name)})"

    def _load_vector(self, name: str, s: tiled.Load) -> None:
        if isinstance(s.of, BufferId):
            pointer = self._parameter(f"{name}_ptr", Role.BUFFER, s.of)
            at = f"{pointer} + (index * C + oi).to(gl.int64) * HV + h"
        else:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            batch, tokens, heads, group = self._strides(name, s)
            row = f"n.to(gl.int64) * {batch} + (chunk * C + oi).to(gl.int64) * {tokens}"
            at = f"{pointer} + {row} + h // {group} * {heads}"
            self._loading |= dict.fromkeys((batch, tokens, heads, group))
        self._loading[pointer] = None
        ahead = self.names.fresh(f"{name}_next")
        self._memory.append(f"{name} = gl.allocate_shared_memory(gl.float32, [C], VECTOR)")
        self._shared += 4 * self.tiled.chunk
        self._next[name] = f"{ahead} = gl.load({at}).to(gl.float32)"
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

    def _touch(self, x: Tile) -> str:
        """The name of what was loaded, which is there from now on and read now."""
        name = self._places[x]
        group = self._groups[name]
        if group not in self._arrived:
            self._arrived.add(group)
            wait = f"mbarrier.wait({self._barrier('ready', group)}, {self._parity(group)})"
            self.lines.append(wait)
        self._first.setdefault(name, len(self.lines))
        self._touched.add(name)
        return self._place(name)

    # ---- expressions ---------------------------------------------------------------------------

    def text(self, x: Tile) -> str:
        x = unaliased(x)
        if x in self._places:
            return self._read(x)
        if any(s.value == x for s in self._running):
            self._await(x)
        if len(x.axes) == 1 and x in self.known and self._slice != "LANES":
            return f"gl.convert_layout({self.known[x]}, {self._slice})"
        return super().text(x)

    def _read(self, x: Tile) -> str:
        name = self._touch(x)
        if len(x.axes) == 1:
            return f"{name}.load({self._slice})"
        return f"{name}.load({_layout(x.axes)}).to(gl.float32)"

    def within(self, x: Tile, target: Axes) -> str:
        while x.op is TileOp.EXPAND:
            (x,) = x.args
        if len(x.axes) != 1 or len(target) != 2:
            return super().within(x, target)
        before = self._slice
        layout = _layout(tuple(sorted(target, key=list(Axis).index)))
        self._slice = f"gl.SliceLayout({1 - target.index(x.axes[0])}, {layout})"
        text = self.place(self.text(x), x.axes, target)
        self._slice = before
        return text

    def inlined(self, x: Tile) -> bool:
        whole = x.op in (TileOp.FLOOR, TileOp.ROWS)  # of which vectors are made in LANES
        return x.op in POINTWISE and self.uses[x] <= 1 and not whole

    def structural(self, x: Tile) -> str:
        if x.op is TileOp.ROWS and len(x.axes) == 1 and not unaliased(x.args[0]).axes:
            return f"gl.full((C,), {self.text(x.args[0])}, gl.float32, LANES)"
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.CUMSUM:
            return self._sums(x)
        if x.op is TileOp.FLOOR:
            text, least = self.text(x.args[0]), x.attrs[0]
            return f"gl.where({text} < {least}, {least}, {text})"  # NaN stays
        if x.op is TileOp.DECAY:
            which, exclusive = x.attrs
            self._functions.add("decay_between")
            options = f"C, LINE, SCORES, {which is Which.LOWER}, {exclusive}"
            return f"decay_between({self.text(x.args[0])}, {options})"
        return super().structural(x)

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        text, axes = self.text(inner), self.laid(inner.axes)
        for position in sorted(map(axes.index, summed_axes(x)), reverse=True):
            text = f"gl.sum({text}, {position})"
        return f"gl.convert_layout({text}, LANES)" if x.axes else text

    def _sums(self, x: Tile) -> str:
        reverse, exclusive = x.attrs
        name = "sums_beside" if exclusive else "sums"
        self._functions.add(name)
        layouts = "LINE, LANES" if len(x.axes) == 1 else "COLUMNS, SCORES"
        return f"{name}({self.within(x.args[0], self.layout(x))}, {layouts}, {bool(reverse)})"

    # ---- products ------------------------------------------------------------------------------

    def _is_there(self, x: Tile) -> bool:
        """Whether a factor or start of a product can be had without waiting for one."""
        x = unaliased(x)
        if any(s.value == x for s in self._running):
            return False
        if x in self._places or x in self.known or not x.args:
            return True
        return x.op in POINTWISE and self.inlined(x) and all(map(self._is_there, x.args))

    def _issue(self, s: tiled.Product) -> None:
        self._todo.remove(s)
        rows = self.laid(s.value.axes)[0]
        left, right = self._factor(s.left, rows), self._factor(s.right, s.over)
        shape = ", ".join(SIZE[a] for a in self.laid(s.value.axes))
        start = f"gl.zeros(({shape}), gl.float32, {_layout(s.value.axes)})"
        known = ", use_acc=False"
        if s.start is not None:
            start, known = self.text(s.start.value), ""
        name = self.names.fresh(s.value.hint or "x")
        self.lines.append(f"{name} = warpgroup_mma({left}, {right}, {start}{known}, is_async=True)")
        self.known[s.value] = name
        self._running.append(s)

    def _issue_next(self) -> None:
        """Issue what comes next and needs nothing that is not there."""
        while self._todo and len(self._running) < IN_FLIGHT:
            s = self._todo[0]
            used = [s.left, s.right, *([] if s.start is None else [s.start])]
            if not all(self._is_there(u.value) for u in used):
                return
            self._issue(s)

    def _await(self, x: Tile) -> None:
        """Wait until the product `x` is over, and with it all that were issued before."""
        self._issue_next()
        last = next(n for n, s in enumerate(self._running) if s.value == x)
        over, self._running = self._running[: last + 1], self._running[last + 1 :]
        names = ", ".join(self.known[s.value] for s in over)
        waited = f"warpgroup_mma_wait({len(self._running)}, deps=({names},))"
        self.lines.append(f"{names} = {waited}")
        for s in over:
            read = (self._places.get(unaliased(use.value)) for use in (s.left, s.right))
            self._touched.update(name for name in read if name is not None)

    def _factor(self, use: tiled.Use, first: Axis) -> str:
        """A factor in shared memory, the axis `first` before the other."""
        x = unaliased(use.value)
        name = self._touch(x) if x in self._places else self._staged(x)
        axes = _lying(use.axes) if x in self._places else self.laid(use.axes)
        return name if axes[0] is first else f"{name}.permute((1, 0))"

    def _staged(self, x: Tile) -> str:
        """What was computed, put in shared memory for products."""
        if x not in self._staging:
            text = self.text(x)
            name = self._staging[x] = self.names.fresh(f"{x.hint or 'x'}_shared")
            shape = [SIZE[a] for a in self.laid(x.axes)]
            self._allocate(name, f"[{', '.join(shape)}]")
            self._shared += 2 * self.tiled.chunk * self.tiled.extents[self.laid(x.axes)[1]]
            self.lines.append(f"{name}.store(({text}).to(gl.bfloat16))")
            self.lines += ["fence_async_shared()", _BARRIER]
        return self._staging[x]

    # ---- results -------------------------------------------------------------------------------

    def _store(self, s: tiled.Store) -> None:
        axes, text = s.axes, self.text(s.use.value)
        if len(axes) < 2:
            pointer = self._parameter(f"{s.buffer}_ptr", Role.BUFFER, s.buffer)
            self._computing[pointer] = None
            at = "(index * C + oi).to(gl.int64) * HV + h" if axes else "index * HV + h"
            value = f"({text}).to({pointer}.dtype.element_ty)"
            self.lines.append(f"gl.store({pointer} + {at}, {value})")
            return
        desc = self._parameter(f"{identifier(str(s.buffer))}_desc", Role.BUFFER, s.buffer)
        width = self.laid(axes)[1]
        size = self.tiled.extents[width]
        self._blocks[desc] = (self.tiled.chunk, size)
        if size not in self._outgoing:  # one place for all results of its shape
            name = self._outgoing[size] = self.names.fresh("outgoing")
            self._memory.append(
                f"{name} = gl.allocate_shared_memory("
                f"gl.bfloat16, [C, {SIZE[width]}], {desc}.layout)"
            )
            self._shared += 2 * self.tiled.chunk * size
            self._computing[name] = None
        name = self._outgoing[size]
        self._computing[desc] = None
        self.lines += [
            "tma.store_wait(0)",
            _BARRIER,
            f"{name}.store(({text}).to(gl.bfloat16))",
            "fence_async_shared()",
            _BARRIER,
            f"async_store({desc}, [index * C, h * {self._whole(width)}], {name})",
        ]

    # ---- the step ------------------------------------------------------------------------------

    def _step(self) -> list[str]:
        """One chunk of one head."""
        for s in self._statements:
            self._issue_next()
            if isinstance(s, tiled.Product):
                if s in self._todo:
                    self._issue(s)
            elif isinstance(s, tiled.Compute):
                self.define(s.value)
            elif isinstance(s, tiled.Store):
                self._store(s)
            self._last |= dict.fromkeys(self._touched, len(self.lines))
            self._touched.clear()
        self.lines.append(_BARRIER)
        return self._released(self.flush())

    def define(self, x: Tile) -> None:
        if x not in self.known and not self.inlined(x):
            self.assign(x)

    def _released(self, lines: list[str]) -> list[str]:
        """`lines`, and at barriers the arrivals for what is not read after them."""
        made: list[str] = []
        last = {
            g: max(self._last[n] for n in self._last if self._groups[n] == g) for g in self._arrived
        }
        for n, line in enumerate(lines):
            made.append(line)
            if line != _BARRIER:
                continue
            over = [g for g, of in last.items() if of <= n]
            for group in over:
                del last[group]
                made.append(f"mbarrier.arrive({self._barrier('empty', group)}, count=1)")
            self._order += over
            self._release |= {name: n for name, g in self._groups.items() if g in over}
        return made

    def twice(self) -> frozenset[str]:
        """What is to have two places: what is read from the start on is there a turn ahead."""
        exchanged = any(x.op is TileOp.CUMSUM and len(x.axes) == 2 for x in self._made)
        room = MOST_SHARED - self._shared - (_EXCHANGED if exchanged else _BESIDE)
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
        step = self._step()
        self._loading |= dict.fromkeys(_GIVEN)
        self._computing |= dict.fromkeys((*_GIVEN, "BK", "BV"))
        computing = self._compute(step)
        source = "\n\n".join((self._load_partition(), computing, self._entry()))
        sizes = {"K": own.dims.K, "V": own.dims.V, "C": own.chunk}
        sizes |= {"BK": own.extents[Axis.K], "BV": own.extents[Axis.V]}
        return GluonKernel(
            name=kernel.name,
            loop=kernel.loop,
            source=source,
            parameters=tuple(self._parameters.values()),
            blocks=tuple(self._blocks.items()),
            shared=self._shared,
            v_programs=own.v_parts,
            constants=(*sizes.items(), ("NV", own.v_parts)),
            config=self._config,
            stores=stored(kernel, self._signature, STORAGE),
            functions=frozenset(self._functions),
            persistent=True,
        )

    @staticmethod
    def _loop(body: Iterable[str]) -> list[str]:
        lines = [
            "item = first + turn * stride",
            "index = item // HV  # of the chunk, over all sequences",
            "h = item % HV",
            "n = index // chunks  # the sequence",
            "chunk = index % chunks",
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
                body += [_BARRIER, f"mbarrier.arrive({ready}, count=1)"]
        lines = ['"""Loads what the next chunk needs as soon as there is room."""']
        if self._next:
            lines.append("LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])")
            lines.append("oi = gl.arange(0, C, LANES)")
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
            *self._loop([*self._numbers, *step]),
            "tma.store_wait(0)",
        ]
        head = f"@gluon.jit\ndef {self._kernel.name}_compute({', '.join(names)}):\n"
        return head + "\n".join(f"    {line}" for line in lines)

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
        return self._entry_head("chunks, items") + "\n".join(f"    {line}" for line in lines)
