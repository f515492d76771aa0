"""The base of printers of text: names, inlining of values, parameters, and the layout of axes.

A printer gives an order of axes (a tile's physical layout is its axes sorted by that order), the
names of functions and one method per structural op. Values used once are printed inside the
expression that uses them; the others become assignments under their names in the mathematics.
"""

from __future__ import annotations

import keyword
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ..dsl.ir import Op
from ..dsl.notation import PYTHON, Level, read
from .buffers import BufferId
from .interface import Parameter, Role
from .plan import Kernel
from .tile import ALIASES, LEAVES, NUMBERS, POINTWISE, Axes, Axis, Tile, TileOp, Which
from .tiled import TiledKernel

_LONGEST = 60  # an inlined expression longer than this is hard to read


def unaliased(x: Tile) -> Tile:
    """The tile that holds `x`'s numbers: renaming and expanding change no value."""
    while x.op in ALIASES:
        (x,) = x.args
    return x


def identifier(name: str) -> str:
    """The name of a buffer or carry as a variable may have it."""
    return name.replace(".", "_")


class Names:
    """Unique, readable identifiers; an operand's name wins over an intermediate's."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self._used = set(reserved)

    def fresh(self, wanted: str) -> str:
        stem = wanted if wanted.isidentifier() and not keyword.iskeyword(wanted) else "x"
        name, count = stem, 1
        while name in self._used:
            count += 1
            name = f"{stem}_{count}"
        self._used.add(name)
        return name


class Expressions(ABC):
    """Prints the tiles of one kernel as assignments and expressions."""

    where: str  # name of the select function
    scalar_tiles: bool  # a tile without axes still has (batch) dimensions: it needs an index
    index_prefix = ""
    row: str  # the number of a row within its sequence

    def __init__(self, order: tuple[Axis, ...], names: Names) -> None:
        self._rank = {axis: n for n, axis in enumerate(order)}
        self.names = names
        self.known: dict[Tile, str] = {}
        self.lines: list[str] = []
        self.uses: Counter[Tile] = Counter()

    # ---- layout --------------------------------------------------------------------------------

    def layout(self, x: Tile) -> tuple[Axis, ...]:
        """The axes of `x` in the order in which this printer lays them out."""
        return self.laid(x.axes)

    def laid(self, axes: Axes) -> tuple[Axis, ...]:
        """`axes` in the order in which this printer lays them out."""
        return tuple(sorted(axes, key=self._rank.__getitem__))

    def place(self, text: str, axes: Axes, target: tuple[Axis, ...]) -> str:
        """`text`, which prints a tile with `axes`, indexed so that it broadcasts over `target`."""
        if set(axes) == set(target) or not target or not (axes or self.scalar_tiles):
            return text
        index = ", ".join(":" if a in axes else "None" for a in target)
        return f"{read(text).at(Level.ATOM)}[{self.index_prefix}{index}]"

    # ---- statements ----------------------------------------------------------------------------

    def count(self, tiles: Iterable[Tile], roots: Iterable[Tile]) -> None:
        """Count the uses of each value among `tiles`, so that single uses can be inlined."""
        self.uses.clear()
        for t in tiles:
            if t.op not in ALIASES:
                self.uses.update(unaliased(a) for a in t.args)
        self.uses.update(unaliased(r) for r in roots)

    def inlined(self, x: Tile) -> bool:
        """Whether `x` is printed where it is used rather than assigned to a name."""
        return x.op in POINTWISE and self.uses[x] <= 1

    def define(self, x: Tile) -> None:
        """Assign `x` to a name, unless it is a leaf that has one, an alias, or is inlined."""
        if x in self.known or x.op in (*ALIASES, *NUMBERS):
            return
        if self.inlined(x) and len(self.text(x)) <= _LONGEST:
            return
        self.assign(x)

    def assign(self, x: Tile) -> str:
        text = self.text(x)
        name = self.names.fresh(x.hint or "x")
        self.lines.append(f"{name} = {text}")
        self.known[x] = name
        return name

    def flush(self) -> list[str]:
        """The statements since the last time."""
        lines, self.lines = self.lines, []
        return lines

    # ---- expressions ---------------------------------------------------------------------------

    def text(self, x: Tile) -> str:
        """`x` in its own layout."""
        x = unaliased(x)
        if x in self.known:
            return self.full(x, self.known[x])
        if x.op is TileOp.CONST:
            return repr(x.value) if math.isfinite(x.value) else f'float("{x.value}")'
        if x.op is TileOp.EXTENT:
            return self.extent(x.attr(Axis))
        if x.op is TileOp.MAP:
            return self._map(x)
        return self.structural(x)

    def full(self, x: Tile, name: str) -> str:
        """A named value at the precision in which elementwise arithmetic runs."""
        del x
        return name

    def within(self, x: Tile, target: tuple[Axis, ...]) -> str:
        """`x` as an operand of an elementwise expression laid out as `target`."""
        while x.op is TileOp.EXPAND:
            (x,) = x.args
        if is_number(x):
            return self.text(x)
        return self.place(self.text(x), x.axes, target)

    def _map(self, x: Tile) -> str:
        fn = x.attr(Op)
        target = self.layout(x)
        args = [self.within(a, target) for a in x.args]
        if fn in PYTHON.signs:
            return PYTHON.binary(fn, *(read(a) for a in args)).text
        if fn is Op.NEG:
            return PYTHON.negative(read(args[0])).text
        return f"{self.function(fn)}({', '.join(args)})"

    @abstractmethod
    def function(self, fn: Op) -> str:
        """The name of an elementwise function."""

    @abstractmethod
    def structural(self, x: Tile) -> str:
        """An op other than elementwise ones, in its own layout."""

    @abstractmethod
    def extent(self, axis: Axis) -> str:
        """The number of channels along an axis."""

    def masked(self, x: Tile, rows: str, index: Mapping[Axis, str]) -> str:
        """ROWS, PHASE, MASK and STEP, which print alike everywhere."""
        target = self.layout(x)
        inner = self.within(x.args[0], target)
        if x.op is TileOp.STEP:
            return f"{self.where}({inner} > 0, 1.0, 0.0)"
        return f"{self.where}({self.kept(x, rows, index)}, {inner}, 0.0)"

    def kept(self, x: Tile, rows: str, index: Mapping[Axis, str]) -> str:
        """Where a ROWS, PHASE or MASK keeps what it masks: a condition in its layout."""
        if x.op is TileOp.ROWS:
            return self.place(rows, (Axis.I,), self.layout(x))
        if x.op is TileOp.PHASE:
            return self.place(f"({self.phase(x)})", (Axis.I,), self.layout(x))
        return self.comparison(x.attr(Which), index)

    def phase(self, x: Tile) -> str:
        """The condition of a PHASE, for a vector of rows."""
        micro_step, count = x.attrs
        return f"{self.row} % {count} == {micro_step}"

    def comparison(self, which: Which, index: Mapping[Axis, str]) -> str:
        sign = {Which.LOWER: ">=", Which.STRICT: ">", Which.DIAGONAL: "=="}[which]
        return f"{index[Axis.I]} {sign} {index[Axis.J]}"


class KernelExpressions(Expressions):
    """The values of a tiled kernel, whose parameters accumulate as its statements need them."""

    scalar_tiles = False

    def __init__(self, tiled: TiledKernel, names: Names) -> None:
        super().__init__(tiled.order, names)
        self.tiled = tiled
        self.parameters: dict[tuple[Role, BufferId | str], Parameter] = {}

    def _parameter(
        self, name: str, role: Role, of: BufferId | str, channels: Axis | None = None
    ) -> str:
        """The name of a parameter: `name`, where nothing else is called so."""
        if (role, of) not in self.parameters:
            free = name if role is Role.PARAM else self.names.fresh(name)
            self.parameters[role, of] = Parameter(free, role, of, channels)
        return self.parameters[role, of].name

    def _name_leaves(self, kernel: Kernel) -> None:
        """Give operands, carries and buffers their names, before any other value."""
        for t in kernel.order:
            if t.op in LEAVES or t in kernel.buffers:
                name = kernel.buffers[t].label if t in kernel.buffers else str(t.attrs[0])
                self.known[t] = self.names.fresh(identifier(name))

    def extent(self, axis: Axis) -> str:
        return axis.value.upper()


@lru_cache(maxsize=65536)
def is_number(x: Tile) -> bool:
    """Whether `x` prints as a plain number rather than as a tensor without axes."""
    x = unaliased(x)
    return x.op in (*NUMBERS, TileOp.PARAM) or (
        x.op in (TileOp.MAP, TileOp.STEP) and all(is_number(a) for a in x.args)
    )
