"""The values of a scan's step as Gluon expressions: each says in which layout it is read.

A tile lies in registers in the layout of the accumulators of the products that make tiles of its
axes: STATE [V, K], ROWS [V, I or J] or SCORES [I, J]. What was loaded lies in a ring in shared
memory, [tokens, channels], and is read from there in the layout of its use; products take it as it
is. A vector of tokens is read just before each use, because it takes 16 registers of a thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...dsl.ir import Op
from .. import tiled
from ..expressions import KernelExpressions, Names, is_number, unaliased
from ..tile import TIMES, Axes, Axis, Tile, TileOp

# elementwise functions that are no operators, and their names
FUNCTIONS: Mapping[Op, str] = {
    Op.EXP: "gl.exp",
    Op.MAXIMUM: "gl.maximum",
    Op.MINIMUM: "gl.minimum",
    Op.AT_LEAST: "gl.maximum",
    Op.AT_MOST: "gl.minimum",
    Op.SIGMOID: "sigmoid",
    Op.SOFTPLUS: "softplus",
    Op.LOGSIGMOID: "logsigmoid",
}
OPERATORS = (Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.NEG)
_INDEX = {Axis.I: "oi[:, None]", Axis.J: "oj[None, :]"}


def layout_of(axes: Axes) -> str:
    """The name of the layout in which a tile of two axes lies in registers."""
    if Axis.V not in axes:
        return "SCORES"
    return "STATE" if Axis.K in axes else "ROWS"


def laid_out(axes: Axes) -> Axes:
    """The axes of a loaded tile in the order in which memory has them: tokens first."""
    return tuple(sorted(axes, key=lambda a: (a not in TIMES, a.value)))


class GluonExpressions(KernelExpressions):
    """The dialect: tiles in registers or rings, products of warp groups."""

    where = "gl.where"
    row = "oi"

    def __init__(self, kernel: tiled.TiledKernel, names: Names) -> None:
        super().__init__(kernel, names)
        self.rings: dict[Tile, str] = {}  # what is loaded a chunk at a time, by tokens
        self.staged: dict[Tile, str] = {}  # scores, by the buffer through which products take them
        self.called: set[str] = set()  # functions of the library
        self._slice = ""  # the layout in which vectors are read

    def text(self, x: Tile) -> str:
        x = unaliased(x)
        return self._read(x) if x in self.rings else super().text(x)

    def _read(self, x: Tile) -> str:
        """A loaded tile or vector in registers, in float32."""
        slot = f"{self.rings[x]}.index(slot)"
        if len(x.axes) == 1:
            return f"{slot}.load({self._slice})"
        if self.laid(x.axes)[0] not in TIMES:
            slot = f"{slot}.permute((1, 0))"
        return f"{slot}.load({layout_of(x.axes)}).to(gl.float32)"

    def within(self, x: Tile, target: Axes) -> str:
        while x.op is TileOp.EXPAND:
            (x,) = x.args
        if len(x.axes) != 1 or len(target) != 2 or is_number(x):
            return super().within(x, target)
        before = self._slice
        self._slice = f"gl.SliceLayout({1 - target.index(x.axes[0])}, {layout_of(target)})"
        text = self.place(self.text(x), x.axes, target)
        self._slice = before
        return text

    def inlined(self, x: Tile) -> bool:
        return len(x.axes) < 2 or super().inlined(x)

    def prepare(self, x: Tile, made: Mapping[Tile, tiled.Statement]) -> None:
        """Assign the elementwise tiles that `x` is made of, those that deserve a name."""
        x = unaliased(x)
        s = made.get(x)
        if x not in self.known and isinstance(s, tiled.Compute):
            for use in s.args:
                self.prepare(use.value, made)
            if len(x.axes) == 2:
                self.define(x)

    def function(self, fn: Op) -> str:
        name = FUNCTIONS[fn]
        if not name.startswith("gl."):
            self.called.add(name)
        return name

    def structural(self, x: Tile) -> str:
        if x.op is TileOp.ROWS:
            axes = self.layout(x)
            return self.present(self.within(x.args[0], axes), self._row_of(axes))
        return self.masked(x, "", _INDEX)

    def present(self, text: str, row: str) -> str:
        """`text` with zeros beyond the end of the sequence; `row`: of each entry."""
        self.called.add("present")
        return f"present({text}, {row}, rows, EVEN)"

    def _row_of(self, axes: Axes) -> str:
        if len(axes) == 1:
            return f"gl.arange(0, C, {self._slice or 'LANES'})"
        at = axes.index(Axis.I)
        lies = f"gl.SliceLayout({1 - at}, {self.lying(axes)})"
        return f"gl.arange(0, C, {lies})[{'None, :' if at else ':, None'}]"

    def lying(self, axes: Axes) -> str:
        """The name of the layout in which a tile of two axes lies in registers."""
        return layout_of(axes)

    # ---- factors of products -------------------------------------------------------------------

    def left(self, use: tiled.Use, rows: Axis, sums: str) -> str:
        """The left factor of a product whose sums lie in the layout `sums`."""
        x = unaliased(use.value)
        if x in self.rings:
            return self._shared(self.rings[x] + ".index(slot)", laid_out(use.axes), rows)
        text = f"({self.text(x)}).to(gl.bfloat16)"
        if x in self.known:
            text = f"{self.known[x]}.to(gl.bfloat16)"
        return f"gl.convert_layout({text}, {sums}_FACTOR)"

    def right(self, use: tiled.Use, over: Axis) -> str:
        """The right factor of a product over `over`."""
        x = unaliased(use.value)
        if x in self.rings:
            return self._shared(self.rings[x] + ".index(slot)", laid_out(use.axes), over)
        return self._shared(self.staged[x], use.axes, over)

    @staticmethod
    def _shared(text: str, axes: Axes, first: Axis) -> str:
        return text if axes[0] is first else f"{text}.permute((1, 0))"
