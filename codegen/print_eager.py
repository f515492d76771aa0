"""TileIR as torch source: the readable meaning of a kernel, and the engine that runs anywhere.

Each kernel prints as one pure function of tiles with leading batch dimensions: [rows, chunks, ...]
for a kernel parallel over chunks, [rows, ...] for one step of a scan, where a row is a pair of
sequence and value head. Dimensions follow the canonical order of axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl.ir import Op
from .expressions import Expressions, Names, is_number, unaliased
from .plan import Kernel
from .tile import Axis, Tile, TileOp, Which

_FUNCTIONS = {
    Op.MAXIMUM: "torch.maximum",
    Op.MINIMUM: "torch.minimum",
    Op.EXP: "torch.exp",
    Op.LOG: "torch.log",
    Op.EXPM1: "torch.expm1",
    Op.LOG1P: "torch.log1p",
    Op.SIGMOID: "torch.sigmoid",
    Op.LOGSIGMOID: "F.logsigmoid",
    Op.SOFTPLUS: "F.softplus",
    Op.TANH: "torch.tanh",
    Op.SQRT: "torch.sqrt",
    Op.RSQRT: "torch.rsqrt",
    Op.ABS: "torch.abs",
}
# what every kernel is given after its tiles: which rows exist, their numbers, sizes and dtype
CONTEXT = ("rows", "at", "extent_k", "extent_v", "dtype")
LEAVES = (TileOp.TOKEN, TileOp.HEAD, TileOp.PARAM, TileOp.CARRY)
_INDEX = {Axis.I: "at[..., :, None]", Axis.J: "at[..., None, :]"}


@dataclass(frozen=True, slots=True)
class EagerKernel:
    """Source of `def <name>(<arguments>, *CONTEXT)`, and what its arguments and results are."""

    name: str
    source: str
    arguments: tuple[tuple[str, Tile], ...]
    results: tuple[str, ...]


class _Torch(Expressions):
    functions = _FUNCTIONS
    where = "torch.where"
    scalar_tiles = True
    index_prefix = "..., "
    row = "at"

    def extent(self, axis: Axis) -> str:
        return f"extent_{axis.value}"

    def _map(self, x: Tile) -> str:
        (fn,) = x.attrs
        numbers = [a for a in x.args if a.op in (TileOp.CONST, TileOp.PARAM)]
        if fn in (Op.MAXIMUM, Op.MINIMUM) and len(numbers) == 1:
            (number,) = numbers
            (other,) = (a for a in x.args if a is not number)
            bound = "min" if fn is Op.MAXIMUM else "max"
            return f"torch.clamp({self.text(other)}, {bound}={self.text(number)})"
        return super()._map(x)

    def structural(self, x: Tile) -> str:
        if x.op in (TileOp.ROWS, TileOp.PHASE, TileOp.MASK, TileOp.STEP):
            # torch.where of two numbers has torch's default dtype, not the run's
            if x.op is TileOp.STEP:
                return f"{self.masked(x, 'rows', _INDEX)}.to(dtype)"
            if is_number(unaliased(x.args[0])):
                kept = self.kept(x, "rows", _INDEX)
                kept = kept if kept.isidentifier() else f"({kept})"
                return f"{kept}.to(dtype) * {self.text(x.args[0])}"
            return self.masked(x, "rows", _INDEX)
        if x.op is TileOp.SUM:
            return self._sum(x)
        if x.op is TileOp.DOT:
            return self._dot(x)
        if x.op is TileOp.CUMSUM:
            reverse, exclusive = x.attrs
            name = "prefix_sum" if not reverse else "suffix_sum"
            dim = -len(x.axes)
            return f"{name}({self.within(x.args[0], x.axes)}, {dim}, exclusive={exclusive})"
        if x.op is TileOp.FLOOR:
            return f"torch.clamp({self.text(x.args[0])}, min={x.attrs[0]})"
        args = ", ".join(self.within(a, self.layout(a)) for a in x.args)
        if x.op is TileOp.INVERSE:
            return f"unit_lower_inverse({args})"
        name = {
            TileOp.DECAY: "decay",
            TileOp.DECAYED_DOT: "decayed_dot",
            TileOp.DECAYED_APPLY: "decayed_apply",
            TileOp.DECAYED_CROSSING: "decayed_crossing",
        }[x.op]
        if x.op is TileOp.DECAYED_APPLY and x.attrs[0] is Axis.J:
            name = "decayed_apply_transposed"
        decay = f"{name}({args}, exclusive={x.attrs[-1]})"
        if x.op is TileOp.DECAY and x.attrs[0] is Which.STRICT and not x.attrs[-1]:
            return f"torch.tril({decay}, -1)"
        return decay

    def _sum(self, x: Tile) -> str:
        (inner,) = x.args
        (axes,) = x.attrs
        assert isinstance(axes, tuple)
        layout = self.layout(inner)
        dims = tuple(layout.index(a) - len(layout) for a in axes)
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


def print_eager(kernel: Kernel) -> EagerKernel:
    """`kernel` as a torch function."""
    order = kernel.order
    buffers = kernel.buffers
    printer = _Torch(tuple(Axis), Names(("torch", "F", *CONTEXT)))
    arguments: list[tuple[str, Tile]] = []
    for t in order:
        if t in buffers or t.op in LEAVES:
            name = printer.names.fresh(buffers.get(t, t.hint).removesuffix("_chunk"))
            arguments.append((name, t))
            printer.known[t] = name
    roots = [t for _, t in kernel.stores] + [c.end for c in kernel.carried]
    printer.count((t for t in order if t not in printer.known), roots)
    for t in order:
        printer.define(t)
    results = [
        printer.text(r) if unaliased(r) in printer.known else _named(printer, r) for r in roots
    ]
    names = ", ".join([*(n for n, _ in arguments), *CONTEXT])
    body = "\n".join(f"    {line}" for line in printer.lines)
    source = f"def {kernel.name}({names}):\n{body}\n"
    source += f"    return {', '.join(results)},\n"
    labels = tuple(n for n, _ in kernel.stores) + tuple(c.name for c in kernel.carried)
    return EagerKernel(kernel.name, source, tuple(arguments), labels)


def _named(printer: _Torch, root: Tile) -> str:
    root = unaliased(root)
    if root.op is TileOp.CONST:
        return printer.text(root)
    return printer.assign(root)
