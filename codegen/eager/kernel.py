"""TileIR as torch source: the readable meaning of a kernel, and the engine that runs anywhere.

Each kernel prints as one pure function of tiles with leading batch dimensions: [rows, chunks, ...]
for a kernel parallel over chunks, [rows, ...] for one step of a scan, where a row is a pair of
sequence and value head. Dimensions follow the canonical order of axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...dsl.ir import Op
from .. import tile
from ..chunk import Named
from ..elementwise import FUNCTIONS
from ..expressions import Expressions, Names, is_number, unaliased
from ..gates import LEAST_DECAY
from ..plan import Kernel
from ..tile import LEAVES, MASKS, Axes, Axis, Tile, TileOp, Which, renamed, summed_axes
from . import library

# with a number, which torch's functions of two tensors do not take
_BOUNDS = {Op.MAXIMUM: "min", Op.AT_LEAST: "min", Op.MINIMUM: "max", Op.AT_MOST: "max"}
# arguments of every kernel after its tiles: which rows exist, their numbers, sizes and dtype
CONTEXT = ("rows", "at", "extent_k", "extent_v", "dtype")
_INDEX = {Axis.I: "at[..., :, None]", Axis.J: "at[..., None, :]"}


@dataclass(frozen=True, slots=True)
class EagerKernel:
    """Source of `def <name>(<arguments>, *CONTEXT)`, and the tiles of its arguments and results.

    Parameters are tensors without axes. Results are what the kernel stores, then what it carries,
    by name. A result has every axis of its tile, of length 1 where it
    is constant; or it is a number, or a tensor without axes made from parameters.
    """

    name: str
    source: str
    arguments: tuple[tuple[str, Tile], ...]
    stores: Named
    ends: tuple[tuple[str, Tile], ...]


class _Torch(Expressions):
    where = "torch.where"
    scalar_tiles = True
    index_prefix = "..., "
    row = "at"

    def function(self, fn: Op) -> str:
        return FUNCTIONS[fn].torch

    def extent(self, axis: Axis) -> str:
        return f"extent_{axis.value}"

    def _map(self, x: Tile) -> str:
        (fn,) = x.attrs
        constants = [a for a in x.args if a.op is TileOp.CONST]
        if fn in _BOUNDS and constants:
            (constant,) = constants  # of two, `lower` makes one
            (other,) = (a for a in x.args if a is not constant)
            return f"torch.clamp({self.text(other)}, {_BOUNDS[fn]}={self.text(constant)})"
        return super()._map(x)

    def result(self, x: Tile) -> str:
        """`x` with an index for every axis, by name: nothing downstream aligns axes by position."""
        bare, axes = unaliased(x), _held(x)
        if bare not in self.known and not is_number(bare):
            self.assign(bare)
        text = self.text(bare)
        return text if is_number(bare) else self.place(text, axes, self.layout(x))

    def structural(self, x: Tile) -> str:
        if x.op in (*MASKS, TileOp.STEP):
            # torch.where of two numbers has torch's default dtype, not the run's
            if is_number(x):
                return f"float({self.text(x.args[0])} > 0)"
            if x.op is TileOp.STEP:
                return f"{self.masked(x, 'rows', _INDEX)}.to(dtype)"
            if is_number(unaliased(x.args[0])):
                kept = self.kept(x, "rows", _INDEX)
                kept = kept if kept.isidentifier() else f"({kept})"
                return f"{kept}.to(dtype) * {self._factor(x.args[0])}"
            return self.masked(x, "rows", _INDEX)
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.DOT:
            return self._dot(x)
        if x.op is TileOp.PRODUCT:
            pairs = zip(x.args, x.attrs, strict=True)
            return " @ ".join(self._factor(a) + (".mT" if t else "") for a, t in pairs)
        if x.op is TileOp.CUMSUM:
            reverse, exclusive = x.attrs
            name = "prefix_sum" if not reverse else "suffix_sum"
            dim = -len(x.axes)
            return f"{name}({self.within(x.args[0], x.axes)}, {dim}, exclusive={exclusive})"
        if x.op is TileOp.ROUND:
            return f"torch.round({self.text(x.args[0])})"
        if x.op is TileOp.FLOOR:
            return f"torch.clamp({self.text(x.args[0])}, min={x.attrs[0]})"
        args = ", ".join(self.within(a, self.layout(a)) for a in x.args)
        if x.op is TileOp.INVERSE:
            return f"unit_lower_inverse({args})"
        if x.op is TileOp.SUBSTITUTE:
            return f"substitute({args}, transposed={x.attrs[0]})"
        name = x.op.name.lower()  # as the library calls it
        if x.op is TileOp.DECAYED_APPLY and x.attrs[0] is Axis.J:
            name += "_transposed"
        if x.op is TileOp.FLUSH:
            return f"{name}({args}, {x.attrs[0]})"
        options = f"exclusive={x.attrs[-1]}"
        if x.op in (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY):
            options += f", least={LEAST_DECAY if x.attrs[-2] else 0.0}"
        decay = f"{name}({args}, {options})"
        if x.op is TileOp.DECAY and x.attrs[0] is Which.STRICT and not x.attrs[-1]:
            return f"torch.tril({decay}, -1)"
        return decay

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        layout = self.layout(inner)
        dims = tuple(layout.index(a) - len(layout) for a in summed_axes(x))
        if len(dims) == 1:
            return f"torch.sum({self.text(inner)}, {dims[0]})"
        return f"torch.sum({self.text(inner)}, {dims})"

    def _dot(self, z: Tile) -> str:
        x, y = z.args
        (over,) = z.attrs
        first, _ = self.layout(z)
        if first not in x.axes:
            x, y = y, x
        left, right = self._factor(x), self._factor(y)
        left += "" if self.layout(x)[1] is over else ".mT"
        right += "" if self.layout(y)[0] is over else ".mT"
        return f"{left} @ {right}"

    def _factor(self, x: Tile) -> str:
        text = self.text(x)
        return text if text.isidentifier() else f"({text})"


def _held(x: Tile) -> Axes:
    """The axes of `x` along which its numbers lie; along the others they are constant."""
    if x.op is TileOp.EXPAND:
        return _held(x.args[0])
    if x.op is TileOp.RENAME:
        return renamed(_held(x.args[0]), x.attr(Axis))
    return x.axes


def print_eager(kernel: Kernel) -> EagerKernel:
    """`kernel` as a torch function."""
    order = kernel.order
    buffers = kernel.buffers
    printer = _Torch(tuple(Axis), Names(("torch", "F", *CONTEXT, *library.__all__)))
    arguments: list[tuple[str, Tile]] = []
    for t in order:
        if t in buffers or t.op in LEAVES:
            name = printer.names.fresh(buffers[t].label if t in buffers else t.hint)
            arguments.append((name, t))
            printer.known[t] = name
    # an end may lack axes of its start: a state that is forgotten is one number
    ends = tuple((c.name, tile.expand(c.end, c.start.axes)) for c in kernel.carried)
    results = [t for _, t in (*kernel.stores, *ends)]
    printer.count((t for t in order if t not in printer.known), results)
    for t in order:
        printer.define(t)
    returned = ", ".join(printer.result(t) for t in results)
    names = ", ".join([*(n for n, _ in arguments), *CONTEXT])
    body = "\n".join(f"    {line}" for line in printer.lines)
    source = f"def {kernel.name}({names}):\n{body}\n    return {returned},\n"
    return EagerKernel(kernel.name, source, tuple(arguments), kernel.stores, ends)
