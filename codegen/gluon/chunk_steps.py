"""One chunk of one head as Gluon: what a warp group does of a kernel that is parallel over chunks.

Products are asynchronous: while one runs, what needs none is computed. Factors that are computed
are put in shared memory, from where products take them transposed or not. Vectors lie by the rows
of scores (LANES), and are converted where they meet another layout. What is loaded is read from its
place in shared memory (`touch` says where).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container

from ...dsl.ir import Op
from .. import tiled
from ..config import KernelConfig
from ..expressions import identifier, is_number, unaliased
from ..gates import DECAYED
from ..interface import Role, Signature
from ..plan import Kernel
from ..tile import POINTWISE, SQUARE, TIMES, Axes, Axis, Tile, TileOp, Which, summed_axes
from .memory import BARRIER, SIZE, GluonMemory
from .refusal import is_exact
from .schedule import subtracted

# factors of ones, of which a product with a tile is its sums over the rows before each row, of the
# chunk or of the row's block
_ONES = {
    "before": "oi[:, None] > oj[None, :]",
    "within": "(oi[:, None] > oj[None, :]) & (oi[:, None] // {0} == oj[None, :] // {0})",
}
_LAYOUTS: dict[Axes, str] = {(Axis.I, Axis.J): "SCORES", (Axis.K, Axis.V): "STATES"}


def _layout(axes: Axes) -> str:
    """The name of the layout in which a tile of two axes lies in registers."""
    return _LAYOUTS.get(axes) or ("KEYS" if Axis.K in axes else "VALUES")


def _home(axes: Axes) -> str:
    """The layout in which vectors lie."""
    return "LANES" if axes[0] in TIMES else "CHANNELS"


def lying(axes: Axes) -> Axes:
    """The axes of a loaded tile in the order in which memory has them."""
    return (Axis.V, Axis.K) if set(axes) == {Axis.K, Axis.V} else axes


def is_made_again(x: Tile, loaded: Container[Tile]) -> bool:
    """Whether each use computes `x`, which costs less than the registers in which it would wait.

    So do sums over time that are one product, their exponentials, and what one operation makes of
    what is loaded.
    """
    if Axis.K not in x.axes or len(x.axes) != 2:
        return False
    if x.op is TileOp.MAP and all(len(a.axes) < 2 or unaliased(a) in loaded for a in x.args):
        return all(unaliased(a) in loaded or is_number(a) for a in x.args)
    if x.is_map(Op.EXP):
        x = unaliased(x.args[0])
    return x.op is TileOp.CUMSUM and is_exact(x.args[0], loaded)


class ChunkStep(GluonMemory):
    """Prints the lines of a step."""

    def __init__(
        self, own: tiled.TiledKernel, kernel: Kernel, signature: Signature, config: KernelConfig
    ) -> None:
        super().__init__(own, kernel, signature, config)
        self._statements = subtracted(own.statements)
        self.uses.update(u.value for s in self._statements for u in tiled.uses(s))
        self._places: dict[Tile, str] = {}  # of what is loaded: its name in shared memory
        self._touched: set[str] = set()  # that the statement at hand reads
        self._last: dict[str, int] = {}  # the line by which each was read last
        self._staging: dict[Tile, str] = {}
        self._in_place: dict[Tile, Tile] = {}  # what lies where it was made of was loaded to
        self._outgoing: dict[int, str] = {}
        self._todo = [s for s in self._statements if isinstance(s, tiled.Product)]
        self._running: list[tiled.Product] = []
        self._slice = ""  # the layout in which vectors are read, if it is not their own
        self._taken = 0  # bytes of shared memory
        self._ones: dict[str, str] = {}  # factors of sums over time, by where they are 1
        self._rooms: dict[str, tuple[str, int]] = {}  # of functions: shapes and numbers of tiles

    @abstractmethod
    def touch(self, x: Tile) -> str:
        """The place of what was loaded, which is there from now on and read now."""

    # ---- expressions ---------------------------------------------------------------------------

    def text(self, x: Tile) -> str:
        x = unaliased(x)
        if x in self._places:
            return self._read(x)
        if x in self._in_place:
            return f"{self.touch(self._in_place[x])}.load(KEYS).to(gl.float32)"
        if any(s.value == x for s in self._running):
            self._await(x)
        if len(x.axes) == 1 and x in self.known and self._slice not in ("", _home(x.axes)):
            return f"gl.convert_layout({self.known[x]}, {self._slice})"
        if x.is_map(Op.EXP) and self._is_exponent(unaliased(x.args[0])) and x not in self.known:
            self.called.add("power")
            return f"power({self.within(x.args[0], self.layout(x))})"
        return super().text(x)

    @staticmethod
    def _is_exponent(x: Tile) -> bool:
        """Whether `x` sums a channel's log-decays over time."""
        over_time = x.op is TileOp.CUMSUM or (x.op is TileOp.SUM and Axis.I in summed_axes(x))
        return over_time and Axis.K in x.axes

    def _read(self, x: Tile) -> str:
        name = self.touch(x)
        if len(x.axes) == 1:
            return f"{name}.load({self._slice or _home(x.axes)})"
        return f"{name}.load({_layout(x.axes)}).to(gl.float32)"

    def within(self, x: Tile, target: Axes) -> str:
        while x.op is TileOp.EXPAND:
            (x,) = x.args
        if len(x.axes) != 1 or len(target) != 2:
            return super().within(x, target)
        before = self._slice
        layout = _layout(tuple(sorted(target, key=list(Axis).index)))
        self._slice = f"gl.SliceLayout({1 - target.index(x.axes[0])}, {layout})"
        if self._slice == "gl.SliceLayout(0, KEYS)":
            self._slice = "CHANNELS"
        text = self.place(self.text(x), x.axes, target)
        self._slice = before
        return text

    def lying(self, axes: Axes) -> str:
        return _layout(axes)

    def inlined(self, x: Tile) -> bool:
        if is_made_again(x, self._places):
            return True
        whole = x.op in (TileOp.FLOOR, TileOp.ROWS)  # of which vectors are made in LANES
        return x.op in POINTWISE and self.uses[x] <= 1 and not whole

    def structural(self, x: Tile) -> str:
        if x.op is TileOp.ROWS and len(x.axes) == 1 and not unaliased(x.args[0]).axes:
            number = f"gl.full((C,), {self.text(x.args[0])}, gl.float32, LANES)"
            return self.present(number, "oi")
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.CUMSUM:
            return self._sums(x)
        if x.op is TileOp.FLOOR:
            text, least = self.text(x.args[0]), x.attrs[0]
            if len(x.axes) == 2:
                name = self.names.fresh("x")
                self.lines.append(f"{name} = {text}")
                text = name
            return f"gl.where({text} < {least}, {least}, {text})"  # NaN stays
        if x.op is TileOp.DECAY:
            which, exclusive = x.attrs
            self.called.add("decay_between")
            options = f"C, LINE, SCORES, {which is Which.LOWER}, {exclusive}"
            return f"decay_between({self.text(x.args[0])}, {options})"
        if x.op is TileOp.INVERSE:
            return self._inverse(x)
        if x.op in DECAYED:
            return self._decayed(x)
        return super().structural(x)

    def _reserve(self, name: str, shape: str, count: int) -> str:
        """Room of a function for `count` tiles, which is free between its calls."""
        _, known = self._rooms.get(name, (shape, 0))
        self._rooms[name] = shape, max(known, count)
        self._computing[name] = None
        return name

    def _sums_of_ones(self, name: str) -> str:
        """A factor of ones and zeros, the first of a product that sums over time."""
        self._ones[name] = _ONES[name].format(self.tiled.block)
        self._computing[name] = None
        return name

    def _idle(self) -> None:
        """What follows waits for its own products, and for those that run."""
        while self._running:
            self._await(self._running[-1].value)

    def _decayed(self, x: Tile) -> str:
        """Scores under a vector gate, or what is applied by them."""
        gate, is_dot = x.args[-1], x.op is TileOp.DECAYED_DOT
        factors = x.args[:2] if is_dot else x.args[1:2]
        texts = [] if is_dot else [self.within(x.args[0], SQUARE)]
        texts += [self.touch(unaliased(a)) for a in factors]
        texts.append(self._staged(unaliased(gate)))
        self._idle()
        texts.append(self._sums_of_ones("within"))
        scores = self._reserve("scores", "C, C", 1 if is_dot else 2)
        texts += [f"{scores}.index(0)" if is_dot else scores]
        texts += [self._reserve("room", "C, BK", 3 if is_dot else 2)]
        texts += ["C", "BK", str(self.tiled.block.bit_length() - 1), "KEYS", "SCORES"]
        if not is_dot:
            texts.append(str(x.attrs[0] is Axis.J))
        name = x.op.name.lower()  # as the library calls it
        self.called.add(name)
        return f"{name}({', '.join(texts)})"

    def _inverse(self, x: Tile) -> str:
        """Its own products are waited for, and what runs before with them."""
        self.called.add("unit_lower_inverse")
        text = self.text(x.args[0])
        self._idle()
        factors = [self.names.fresh(name) for name in ("left", "right")]
        for name in factors:
            self._allocate(name, "[C, C]", "gl.float32")
        self._taken += 2 * 4 * self.tiled.chunk**2
        levels, groups = self.tiled.chunk.bit_length() - 1, self._config.warps // 4
        return f"unit_lower_inverse({text}, {', '.join(factors)}, C, {levels}, SCORES, {groups})"

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        text, axes = self.text(inner), self.laid(inner.axes)
        for position in sorted(map(axes.index, summed_axes(x)), reverse=True):
            text = f"gl.sum({text}, {position})"
        own = axes == (Axis.I, Axis.K) and x.axes == (Axis.K,)
        return f"gl.convert_layout({text}, {_home(x.axes)})" if x.axes and not own else text

    def _sums(self, x: Tile) -> str:
        reverse, exclusive = x.attrs
        if Axis.K in x.axes:
            return self._sums_by_products(x, reverse=bool(reverse), exclusive=bool(exclusive))
        name = "sums_beside" if exclusive else "sums"
        self.called.add(name)
        layouts = "LINE, LANES" if len(x.axes) == 1 else "COLUMNS, SCORES"
        return f"{name}({self.within(x.args[0], self.layout(x))}, {layouts}, {bool(reverse)})"

    def _sums_by_products(self, x: Tile, *, reverse: bool, exclusive: bool) -> str:
        """Of a tile of keys: scans would move every number from thread to thread."""
        (of,) = x.args
        ones = self._sums_of_ones("before") + ".permute((1, 0))" * reverse
        zero, exact = "gl.zeros((C, BK), gl.float32, KEYS)", is_exact(of, self._places)
        staged = self._staged(unaliased(of)) if exact else ""
        text = self.within(of, self.layout(x))
        self._idle()
        if exact:
            self.called.add("time_sums")
            return f"time_sums({zero if exclusive else text}, {ones}, {staged})"
        if not text.isidentifier():
            name = self.names.fresh("x")
            self.lines.append(f"{name} = {text}")
            text = name
        self.called.add("time_sums_of_parts")
        room = self._reserve("room", "C, BK", 2)
        return f"time_sums_of_parts({zero if exclusive else text}, {ones}, {text}, {room})"

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
        if not self._todo or self._running:  # more at once take more registers than they hide
            return
        s = self._todo[0]
        used = [s.left, s.right, *([] if s.start is None else [s.start])]
        if all(self._is_there(u.value) for u in used):
            self._issue(s)

    def _await(self, x: Tile) -> None:
        """Wait until the product `x` is over, and with it all that were issued before."""
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
        name = self.touch(x) if x in self._places else self._staged(x)
        axes = lying(use.axes) if x in self._places else self.laid(use.axes)
        return name if axes[0] is first else f"{name}.permute((1, 0))"

    def _staged(self, x: Tile) -> str:
        """What was computed, put in shared memory for products; back where it was loaded to if
        nothing else reads what was there."""
        if x.op is TileOp.FLOOR and is_exact(x, self._places):
            loaded = unaliased(x.args[0])
            if self.uses[loaded] == 1:
                if x not in self._in_place:
                    text, place = self.text(x), self.touch(loaded)
                    self.lines.append(f"{place}.store(({text}).to(gl.bfloat16))")
                    self.lines += ["fence_async_shared()", BARRIER]
                    self._in_place[x] = loaded
                return self.touch(loaded)
        if x not in self._staging:
            text = self.text(x)
            name = self._staging[x] = self.names.fresh(f"{x.hint or 'x'}_shared")
            shape = [SIZE[a] for a in self.laid(x.axes)]
            self._allocate(name, f"[{', '.join(shape)}]")
            self._taken += 2 * self.tiled.chunk * self.tiled.extents[self.laid(x.axes)[1]]
            self.lines.append(f"{name}.store(({text}).to(gl.bfloat16))")
            self.lines += ["fence_async_shared()", BARRIER]
        return self._staging[x]

    # ---- results -------------------------------------------------------------------------------

    def _store(self, s: tiled.Store) -> None:
        axes, text = s.axes, self.text(s.use.value)
        if len(axes) < 2:
            pointer = self._parameter(f"{s.buffer}_ptr", Role.BUFFER, s.buffer)
            self._computing[pointer] = None
            value = f"({text}).to({pointer}.dtype.element_ty)"
            at, mask = "index * HV + h", ""
            if axes == (Axis.K,):
                at = "(index * HV + h) * K + ok"
            elif axes:
                at, mask = "(row + oi).to(gl.int64) * HV + h", ", mask=there"
            self.lines.append(f"gl.store({pointer} + {at}, {value}{mask})")
            return
        desc = self._parameter(f"{identifier(str(s.buffer))}_desc", Role.BUFFER, s.buffer)
        width = self.laid(axes)[1]
        size = self.tiled.extents[width]
        self._blocks[desc] = (self.tiled.chunk, size)
        if size not in self._outgoing:  # one place for all results of its shape
            name = self._outgoing[size] = self.names.fresh("outgoing")
            self._allocate(name, f"[C, {SIZE[width]}]")
            self._taken += 2 * self.tiled.chunk * size
        name, whole = self._outgoing[size], self._whole(width)
        lies = ("0", _layout(self.laid(axes)), "C", SIZE[width])
        place = ("row", f"h * {whole}", f"HV * {whole}", "STATES", SIZE[width], *lies)
        self.lines += ["tma.store_wait(0)", BARRIER, *self._sent(s.buffer, name, name, text, place)]

    # ---- the step ------------------------------------------------------------------------------

    def step(self) -> list[str]:
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
        self.lines.append(BARRIER)
        return self.flush()

    def define(self, x: Tile) -> None:
        if x not in self.known and not self.inlined(x):
            self.assign(x)
