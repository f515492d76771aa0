"""TileIR expressions in Triton: products, sums, masks, and what keeps padding out of them."""

from __future__ import annotations

from collections.abc import Mapping

from ...dsl.ir import Op
from .. import tile
from ..buffers import BufferId
from ..chunk import LEAST_DECAY
from ..config import Precision
from ..elementwise import FUNCTIONS
from ..expressions import Expressions, Names, unaliased
from ..interface import Dtype, Signature
from ..padding import Padding, padding
from ..plan import sums_over
from ..tile import Axis, Tile, TileOp, Which
from . import library as triton_library

_DECAYED = {
    TileOp.DECAYED_DOT: "decayed_dot",
    TileOp.DECAYED_APPLY: "decayed_apply",
    TileOp.DECAYED_CROSSING: "decayed_crossing",
}
_PRODUCTS = (TileOp.DOT, *_DECAYED)
_INDEX = {Axis.I: "oi[:, None]", Axis.J: "oj[None, :]"}


class TritonExpressions(Expressions):
    """The dialect: [I, K] tiles and their like in registers, products on tensor cores.

    `_BK`, `_BV`: tiles of the channel axes; `_loop`: the one that the kernel takes tile by tile.
    """

    where = "tl.where"
    row = "(chunk * C + oi)"
    scalar_tiles = False

    def __init__(
        self, order: tuple[Axis, ...], names: Names, signature: Signature, chunk: int
    ) -> None:
        super().__init__(order, names)
        self._signature = signature
        self._chunk = chunk
        self._BK = self._BV = 0
        self._loop: Axis | None = None
        self._buffers: Mapping[Tile, BufferId] = {}
        self._raw: dict[Tile, Dtype] = {}  # values not yet in float32
        self._cleaned: set[Tile] = set()
        self._inline_dots: set[Tile] = set()
        self._used_functions: set[str] = set()

    def _tail(self, axis: Axis) -> str | None:
        """The condition that a channel exists, where the tile is wider than the operand."""
        dims = self._signature.dims
        if axis is Axis.K and dims.K % self._BK:
            return "ok < K"
        if axis is Axis.V and dims.V % self._BV:
            return "ov < V"
        return None

    def full(self, x: Tile, name: str) -> str:
        if self._raw.get(x, Dtype.FLOAT32) is Dtype.FLOAT32:
            return name
        return f"{name}.to(tl.float32)"

    def _factor(self, x: Tile) -> str:
        """`x` as a factor of a product: in the dtype in which products run."""
        low = self._signature.dtype
        y = unaliased(x)
        if y in self.known and self._raw.get(y) is low:
            return self.known[y]
        text = self.known.get(y) or self.text(y)
        if low is Dtype.FLOAT32 and self._raw.get(y, Dtype.FLOAT32) is Dtype.FLOAT32:
            return text
        return (
            f"{text}.to(tl.{low.value})" if text.isidentifier() else f"({text}).to(tl.{low.value})"
        )

    def _clean(self, x: Tile, axis: Axis, text: str) -> str:
        """`text` with zeros in the padding of `axis`, where it might hold anything else."""
        condition = self._tail(axis)
        if condition is None or self._padding(x, axis) is Padding.ZERO:
            return text
        keep = self.place(f"({condition})", (axis,), self.layout(x))
        return f"tl.where({keep}, {text}, 0.0)"

    def _find_accumulating_dots(self, computed: list[Tile]) -> None:
        """Products used once, in a sum of the same shape: printed with that sum as accumulator."""
        for t in computed:
            if t.op is TileOp.MAP and t.attrs == (Op.ADD,):
                dot = self._accumulating(t)
                if dot is not None:
                    self._inline_dots.add(dot)

    def _accumulating(self, t: Tile) -> Tile | None:
        for x, other in (t.args[::-1], t.args):
            if (
                x.op is TileOp.DOT
                and x not in self.known
                and self.uses[x] == 1
                and not (self._loop is not None and sums_over(x, self._loop))
                and x.axes == t.axes == other.axes
                and unaliased(other) not in self._buffers
            ):
                return x
        return None

    def _map(self, x: Tile) -> str:
        (fn,) = x.attrs
        assert isinstance(fn, Op)
        if fn is Op.ADD:
            dot = self._accumulating(x)
            if dot is not None and dot in self._inline_dots:
                other = x.args[0] if x.args[1] == dot else x.args[1]
                return self._dot(dot, self.within(other, self.layout(x)))
        return super()._map(x)

    def function(self, fn: Op) -> str:
        name = FUNCTIONS[fn].triton
        if name in triton_library.FUNCTIONS:
            self._used_functions.add(name)
        return name

    def structural(self, x: Tile) -> str:
        if x.op in (TileOp.ROWS, TileOp.PHASE, TileOp.MASK, TileOp.STEP):
            return self.masked(x, "rows", _INDEX)
        if x.op is TileOp.DOT:
            return self._dot(x, None)
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.CUMSUM:
            return self._cumsum(x)
        if x.op is TileOp.FLOOR:
            inner = self.text(x.args[0])
            return f"tl.maximum({inner}, {x.attrs[0]}, propagate_nan=tl.PropagateNan.ALL)"
        if x.op is TileOp.FLUSH:
            self._used_functions.add("flush")
            return f"flush({self.text(x.args[0])}, {x.attrs[0]})"
        if x.op is TileOp.DECAY:
            which, exclusive = x.attrs
            self._used_functions.add("decay_between")
            return f"decay_between({self.text(x.args[0])}, C, {which is Which.LOWER}, {exclusive})"
        if x.op is TileOp.INVERSE:
            self._used_functions.add("unit_lower_inverse")
            return (
                f"unit_lower_inverse({self.text(x.args[0])}, C, {self._levels}, {self._precision})"
            )
        return self._decayed(x)

    @property
    def _levels(self) -> int:
        return self._chunk.bit_length() - 1

    @property
    def _precision(self) -> str:
        if (
            self._signature.dtype is not Dtype.FLOAT32
            and self._signature.precision is not Precision.IEEE
        ):
            return '"tf32"'
        return f'"{self._signature.precision.value}"'

    def _decayed(self, x: Tile) -> str:
        texts = []
        args = x.args
        if x.op is TileOp.DECAYED_CROSSING:  # the prefix sums are for products
            args = (*args[:-3], args[-1])
        for a in args:
            text = self.within(a, self.layout(a))
            texts.append(self._clean(a, Axis.K, text) if Axis.K in a.axes else text)
        name = _DECAYED[x.op]
        if x.op is TileOp.DECAYED_APPLY and x.attrs[0] is Axis.J:
            name += "_transposed"
        sizes = f"C, BK, {self._levels}"
        if x.op is TileOp.DECAYED_DOT:
            # decayed factors underflow in float16, so they are not rounded to it (math.md)
            low = (
                self._signature.dtype if self._signature.dtype is Dtype.BFLOAT16 else Dtype.FLOAT32
            )
            sizes += f", tl.{low.value}"
        self._used_functions.add(name)
        options = [self._precision, str(x.attrs[-1])]
        if x.op is TileOp.DECAYED_CROSSING:
            options.insert(1, str(x.attrs[0]))
        else:  # split decays are products of what is no longer known to be 0: none is so strong
            options[1:1] = [str(LEAST_DECAY), "43.0"] if x.attrs[-2] else ["0.0", "60.0"]
        return f"{name}({', '.join(texts)}, {sizes}, {', '.join(options)})"

    def _cumsum(self, x: Tile) -> str:
        reverse, exclusive = x.attrs
        inner = self.within(x.args[0], self.layout(x))
        if exclusive:
            self._used_functions.add("exclusive_sum")
            return f"exclusive_sum({inner}, {bool(reverse)})"
        return f"tl.cumsum({inner}, 0{', reverse=True' if reverse else ''})"

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        (axes,) = x.attrs
        assert isinstance(axes, tuple)
        text = self.text(inner)
        for axis in axes:
            if axis in (Axis.K, Axis.V):
                text = self._clean(inner, axis, text)
        if len(inner.axes) == 1 and self._of_products(inner):
            # a sum of row sums of products: on sm_100 Triton 3.7 fails to compile it as a vector's
            name = self.names.fresh("x")
            self.lines.append(f"{name} = {text}")
            return f"tl.sum(tl.sum({name}[None, :], 1), 0)"
        for position in sorted((self.layout(inner).index(a) for a in axes), reverse=True):
            text = f"tl.sum({text}, {position})"
        return text

    def _of_products(self, x: Tile) -> bool:
        """Whether this kernel computes `x` from a matrix product."""
        below = tile.topological(x, stop=frozenset(self._buffers))
        return any(t.op in _PRODUCTS and t not in self._buffers for t in below)

    def _dot(self, z: Tile, accumulator: str | None) -> str:
        x, y = z.args
        (over,) = z.attrs
        assert isinstance(over, Axis)
        rows_axis, _ = self.layout(z)
        if rows_axis not in x.axes:
            x, y = y, x
        left, right = self._cleaned_factor(x, y, over), self._factor(y)
        if self.layout(x)[1] is not over:
            left = f"tl.trans({left})"
        if self.layout(y)[0] is not over:
            right = f"tl.trans({right})"
        extra = "" if accumulator is None else f", {accumulator}"
        if self._signature.dtype is Dtype.FLOAT32:
            extra += f", input_precision={self._precision}"
        return f"tl.dot({left}, {right}{extra})"

    def _cleaned_factor(self, x: Tile, y: Tile, over: Axis) -> str:
        """`x` as a factor, with zeros where neither it nor `y` has them for sure."""
        if over not in (Axis.K, Axis.V):
            return self._factor(x)
        paddings = {self._padding(x, over), self._padding(y, over)}
        if Padding.ZERO in paddings and Padding.UNSAFE not in paddings:
            return self._factor(x)
        if self._padding(y, over) is Padding.UNSAFE and self._tail(over) is not None:
            name = self.names.fresh(y.hint or "x")
            self.lines.append(f"{name} = {self._clean(y, over, self.text(y))}")
            self.known[unaliased(y)] = name
            self._raw.pop(unaliased(y), None)
            self._cleaned.add(unaliased(y))
        cleaned = self._clean(x, over, self.text(x))
        low = self._signature.dtype
        return cleaned if low is Dtype.FLOAT32 else f"({cleaned}).to(tl.{low.value})"

    def _padding(self, x: Tile, axis: Axis) -> Padding:
        """As `padding`; what was loaded from a buffer, or cleaned, has zeros there."""
        y = unaliased(x)
        if axis in y.axes and (y in self._buffers or y in self._cleaned):
            return Padding.ZERO
        return padding(x, axis)

    def extent(self, axis: Axis) -> str:
        return axis.value.upper()
