"""One chunk of one head as Gluon: what a warp group does of a kernel that is parallel over chunks.

Products are asynchronous: while one runs, what needs none is computed. Factors that are computed
are put in shared memory, from where products take them transposed or not. Vectors lie by the rows
of scores (LANES), and are converted where they meet another layout. What is loaded is read from its
place in shared memory (`touch` says where).
"""

from __future__ import annotations

from abc import abstractmethod

from .. import tiled
from ..config import KernelConfig
from ..expressions import identifier, unaliased
from ..interface import Role, Signature
from ..plan import Kernel
from ..tile import POINTWISE, Axes, Axis, Tile, TileOp, Which, summed_axes
from .memory import SIZE, GluonMemory
from .schedule import subtracted

BARRIER = "barrier()"
_LAYOUTS: dict[Axes, str] = {(Axis.I, Axis.J): "SCORES", (Axis.K, Axis.V): "STATES"}


def _layout(axes: Axes) -> str:
    """The name of the layout in which a tile of two axes lies in registers."""
    return _LAYOUTS.get(axes) or ("KEYS" if Axis.K in axes else "VALUES")


def lying(axes: Axes) -> Axes:
    """The axes of a loaded tile in the order in which memory has them."""
    return (Axis.V, Axis.K) if set(axes) == {Axis.K, Axis.V} else axes


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
        self._outgoing: dict[int, str] = {}
        self._todo = [s for s in self._statements if isinstance(s, tiled.Product)]
        self._running: list[tiled.Product] = []
        self._functions: set[str] = set()
        self._slice = "LANES"
        self._taken = 0  # bytes of shared memory

    @abstractmethod
    def touch(self, x: Tile) -> str:
        """The place of what was loaded, which is there from now on and read now."""

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
        name = self.touch(x)
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
        if x.op is TileOp.INVERSE:
            return self._inverse(x)
        return super().structural(x)

    def _inverse(self, x: Tile) -> str:
        """Its own products are waited for, and what runs before with them."""
        self._functions.add("unit_lower_inverse")
        text = self.text(x.args[0])
        while self._running:
            self._await(self._running[-1].value)
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
        """What was computed, put in shared memory for products."""
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
            self._taken += 2 * self.tiled.chunk * size
            self._computing[name] = None
        name = self._outgoing[size]
        self._computing[desc] = None
        self.lines += [
            "tma.store_wait(0)",
            BARRIER,
            f"{name}.store(({text}).to(gl.bfloat16))",
            "fence_async_shared()",
            BARRIER,
            f"async_store({desc}, [index * C, h * {self._whole(width)}], {name})",
        ]

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
