"""The values of a tiled kernel as Triton expressions: a row per op."""

from __future__ import annotations

from ...dsl.ir import Op
from .. import tile
from ..config import Precision
from ..elementwise import FUNCTIONS
from ..expressions import KernelExpressions, Names, is_number, unaliased
from ..gates import DECAYED, LEAST_DECAY
from ..interface import Dtype
from ..tile import MASKS, Axis, Tile, TileOp, Which, axes_of, gated_axis, summed_axes
from ..tiled import Compute, Load, Product, TiledKernel, Use
from . import library as triton_library

_PRODUCTS = (TileOp.DOT, TileOp.PRODUCT, *DECAYED)
# the decay of a block, as a log, up to which it is split: half of it each way is far inside the
# ranges of float32 and bfloat16, and 32 tokens take as much at -3.75 each
_SPLITTABLE = 120.0
# variables of kernels: how far blocks of each row have decayed, as a part of what can be split, and
# whether decayed products are in halves where that is too far
FARTHEST, HALVED = "farthest", "HALVED"
_LEAST_ROWS = 16  # of a product
_INDEX = {Axis.I: "oi[:, None]", Axis.J: "oj[None, :]"}
_TAILS = {Axis.K: "ok < K", Axis.V: "ov < V"}  # that a channel exists


class TritonExpressions(KernelExpressions):
    """The dialect: [I, K] tiles and their like in registers, products on tensor cores."""

    where = "tl.where"
    row = "(chunk * C + oi)"

    def __init__(self, tiled: TiledKernel, names: Names) -> None:
        super().__init__(tiled, names)
        self._made = {s.value: s for s in tiled.statements if isinstance(s, Compute | Product)}
        self._loaded = frozenset(s.value for s in tiled.statements if isinstance(s, Load))
        self.dtypes: dict[Tile, Dtype] = {}  # of values that are not in float32
        self.used_functions: set[str] = set()
        self.halved = "True"  # whether decayed products may take halves
        self._noted: set[tuple[Tile, ...]] = set()  # gates whose decay a loop keeps

    def tail(self, axis: Axis) -> str | None:
        """The condition that a channel exists, where the tile is wider than the operand."""
        return _TAILS[axis] if self.tiled.is_padded(axis) else None

    def full(self, x: Tile, name: str) -> str:
        return f"{name}.to(tl.float32)" if x in self.dtypes else name

    def cleaned(self, use: Use, text: str) -> str:
        """`text`, which prints `use`, with zeros in the padding where it needs them."""
        for axis in use.clean:
            condition = self.tail(axis)
            if condition is not None:
                keep = self.place(f"({condition})", (axis,), self.laid(use.axes))
                text = f"tl.where({keep}, {text}, 0.0)"
        return text

    def _factor(self, use: Use, dtype: Dtype) -> str:
        """A factor of a product, in the dtype in which that runs."""
        x = use.value
        name = self.known.get(x)
        held = self.dtypes.get(x, Dtype.FLOAT32)
        cast = f".to(tl.{dtype.value})"
        if use.clean:
            text = self.cleaned(use, self.text(x))
            return text if dtype is Dtype.FLOAT32 else f"({text}){cast}"
        text = name or self.text(x)
        if held is dtype:
            return text
        return f"{text}{cast}" if text.isidentifier() else f"({text}){cast}"

    def product(self, s: Product, start: str | None) -> str:
        """A matrix product, added to `start`."""
        left, right = self._factor(s.left, s.dtype), self._factor(s.right, s.dtype)
        if self.laid(s.left.axes)[1] is not s.over:
            left = f"tl.trans({left})"
        if self.laid(s.right.axes)[0] is not s.over:
            right = f"tl.trans({right})"
        extra = "" if start is None else f", {start}"
        if s.dtype is Dtype.FLOAT32:
            extra += f", input_precision={self._precision}"
        return f"tl.dot({left}, {right}{extra})"

    def _map(self, x: Tile) -> str:
        made = self._made[x]
        if isinstance(made, Product):
            return self._added(made)
        if x.is_map(Op.EXP) and self._is_exponent(unaliased(x.args[0])):
            self.used_functions.add("power")
            return f"power({self.within(x.args[0], self.layout(x))})"
        return super()._map(x)

    def _is_exponent(self, x: Tile) -> bool:
        """Whether `x` sums a channel's log-decays over time."""
        over_time = x.op is TileOp.CUMSUM or (x.op is TileOp.SUM and Axis.I in summed_axes(x))
        return over_time and Axis.K in x.axes

    def function(self, fn: Op) -> str:
        name = FUNCTIONS[fn].triton
        if name in triton_library.FUNCTIONS:
            self.used_functions.add(name)
        return name

    def _added(self, s: Product) -> str:
        if s.start is None:
            return self.product(s, None)
        start = s.start.value
        text = self.text(start)
        if not is_number(start):
            text = self.place(text, s.start.axes, self.layout(s.value))
        return self.product(s, text)

    def structural(self, x: Tile) -> str:
        if x.op in (*MASKS, TileOp.STEP):
            return self.masked(x, "rows", _INDEX)
        if x.op is TileOp.ROUND:
            return f"tl.floor({self.within(x.args[0], self.layout(x))} + 0.5)"
        made = self._made[x]
        if isinstance(made, Product):
            return self._added(made)
        if x.op is TileOp.SUM:
            return self._sum(made)
        if x.op is TileOp.PRODUCT:
            texts = (self.text(a) for a in x.args)
            pairs = zip(texts, x.attrs, strict=True)
            left, right = (f"tl.trans({a})" if transposed else a for a, transposed in pairs)
            return f"tl.dot({left}, {right}, input_precision={self._precision})"
        if x.op is TileOp.CUMSUM:
            return self._cumsum(made)
        if x.op is TileOp.FLOOR:
            inner = self.text(x.args[0])
            return f"tl.maximum({inner}, {x.attrs[0]}, propagate_nan=tl.PropagateNan.ALL)"
        if x.op is TileOp.FLUSH:
            self.used_functions.add("flush")
            return f"flush({self.text(x.args[0])}, {x.attrs[0]})"
        if x.op is TileOp.DECAY:
            which, exclusive = x.attrs
            self.used_functions.add("decay_between")
            return f"decay_between({self.text(x.args[0])}, C, {which is Which.LOWER}, {exclusive})"
        if x.op is TileOp.INVERSE:
            self.used_functions.add("unit_lower_inverse")
            return (
                f"unit_lower_inverse({self.text(x.args[0])}, C, {self._levels}, {self._precision})"
            )
        if x.op is TileOp.SUBSTITUTE:
            self.used_functions.add("substitute")
            exchanged = self.laid(x.axes)[0] is not Axis.I
            lower, *columns = (self.within(a, self.layout(a)) for a in x.args)
            if exchanged:
                columns = [f"tl.trans({text})" for text in columns]
            solved = f"substitute({', '.join([lower, *columns])}, C, {x.attrs[0]})"
            return f"tl.trans({solved})" if exchanged else solved
        return self._decayed(made)

    @property
    def _levels(self) -> int:
        return self.tiled.chunk.bit_length() - 1

    @property
    def _precision(self) -> str:
        return f'"{self.tiled.precision.value}"'

    def _decayed(self, s: Compute) -> str:
        x = s.value
        args = list(zip(x.args, s.args, strict=True))
        # prefix sums are for products, that without a token's own found from the other
        del args[-3 : -1 if x.op is TileOp.DECAYED_CROSSING else -2]
        axis = gated_axis(x)
        exchanged = self.laid(axes_of(Axis.I, axis))[0] is not Axis.I  # the library has rows first
        texts = [self.cleaned(use, self.within(a, self.layout(a))) for a, use in args]
        if exchanged:
            pairs = zip(texts, x.args, strict=False)
            texts = [f"tl.trans({text})" if axis in a.axes else text for text, a in pairs]
        name = x.op.name.lower()  # as the library calls it
        self.used_functions.add(name)
        levels, exclusive = self._levels, x.attrs[-1]
        if x.op is TileOp.DECAYED_CROSSING:
            options = f"{levels}, {self._precision}, {x.attrs[0]}"
        else:
            of = f"tl.{s.dtype.value}" if x.op is TileOp.DECAYED_DOT else x.attrs[0] is Axis.J
            # split decays are products of what is no longer known to be 0: none is so strong
            least, most = (LEAST_DECAY, 43.0) if x.attrs[-2] else (0.0, _SPLITTABLE)
            blocks = f"{self.tiled.block.bit_length() - 1}, {levels}"
            if self.halved == HALVED:
                self._note_decay(x, texts[-2:], f"B{axis.name}, {blocks}, {most}")
            options = f"{blocks}, {of}, {self._precision}, {least}, {most}"
            exclusive = f"{exclusive}, {self.halved}"
        made = f"{name}({', '.join(texts)}, C, B{axis.name}, {options}, {exclusive})"
        return f"tl.trans({made})" if exchanged and axis in x.axes else made

    def _note_decay(self, x: Tile, sums: list[str], options: str) -> None:
        """A line that keeps how far the blocks of the gate of `x` decay, once for each gate."""
        gate = x.args[-2:]
        if gate not in self._noted:
            self._noted.add(gate)
            self.used_functions.add("block_decay")
            found = f"block_decay({', '.join(sums)}, C, {options})"
            self.lines.append(f"{FARTHEST} = tl.maximum({FARTHEST}, {found})")

    def _cumsum(self, s: Compute) -> str:
        x = s.value
        reverse, exclusive = x.attrs
        inner = self.within(x.args[0], self.layout(x))
        at = self.layout(x).index(Axis.I)
        if self._sums_by_products(x):
            self.used_functions.add("time_sum")
            of = f"tl.{s.dtype.value}"
            return f"time_sum({inner}, C, {bool(reverse)}, {bool(exclusive)}, {of})"
        if exclusive:
            self.used_functions.add("exclusive_sum")
            if at:
                return f"tl.trans(exclusive_sum(tl.trans({inner}), {bool(reverse)}))"
            return f"exclusive_sum({inner}, {bool(reverse)})"
        return f"tl.cumsum({inner}, {at}{', reverse=True' if reverse else ''})"

    def _sums_by_products(self, x: Tile) -> bool:
        """Whether sums over time are products: of matrices, where tensor cores round to tf32."""
        rounded = self.tiled.precision is Precision.TF32
        rows = self.layout(x) == (Axis.I, Axis.K) and self.tiled.chunk >= _LEAST_ROWS
        return rounded and rows

    def _sum(self, s: Compute) -> str:
        (inner,) = s.args
        text = self.cleaned(inner, self.text(inner.value))
        if len(inner.axes) == 1 and self._of_products(inner.value):
            # a sum of row sums of products: on sm_100 Triton 3.7 fails to compile it as a vector's
            name = self.names.fresh("x")
            self.lines.append(f"{name} = {text}")
            return f"tl.sum(tl.sum({name}[None, :], 1), 0)"
        positions = map(self.laid(inner.axes).index, summed_axes(s.value))
        for position in sorted(positions, reverse=True):
            text = f"tl.sum({text}, {position})"
        return text

    def _of_products(self, x: Tile) -> bool:
        """Whether this kernel computes `x` from a matrix product."""
        below = tile.topological(x, stop=self._loaded)
        return any(t.op in _PRODUCTS and t not in self._loaded for t in below)
