"""The cost of a program per token and value head: FLOPs and bytes as polynomials in C, K, V.

Counted from the graph: matrix products as the kernels run them (a masked product is a whole one;
those under a vector gate, and the triangular inverse, take one or two per halving, ℓ = log2 C), one
FLOP per element for the rest. Bytes: each kernel reads each of its inputs once and writes each
result once (programs along V that read the same rows meet in the cache). K and V are those of the
state as the kernel or chunk holds it; those of a program are the call's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]

from . import tile
from .chunk import ChunkProgram
from .config import Dims
from .differentiate import Adjoint
from .gates import DECAYED
from .interface import Dtype, intermediate_dtype
from .plan import Kernel, Program
from .tile import ALIASES, NUMBERS, Axes, Axis, Tile, TileOp

Expr: TypeAlias = Any  # SymPy carries no types
C, K, V, LEVELS = sympy.symbols("C K V ℓ", positive=True)
_SIZE = {Axis.I: C, Axis.J: C, Axis.K: K, Axis.V: V}
_FREE = (*ALIASES, *NUMBERS)
_OPERANDS = (TileOp.TOKEN, TileOp.HEAD)


@dataclass(frozen=True, slots=True)
class Cost:
    """Per token and value head: FLOPs of products and of the rest, bytes read and written."""

    products: Expr
    elementwise: Expr
    read: Expr
    written: Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            sympy.expand(self.products + other.products),
            sympy.expand(self.elementwise + other.elementwise),
            sympy.expand(self.read + other.read),
            sympy.expand(self.written + other.written),
        )

    @property
    def moved(self) -> Expr:
        """Bytes, either way."""
        return sympy.expand(self.read + self.written)


def kernel_cost(kernel: Kernel, dtype: Dtype) -> Cost:
    """One kernel's cost; Keys, Values and products have `dtype`."""
    stored = kernel.buffers
    starts = {c.start for c in kernel.carried}
    products = elementwise = read = sympy.Integer(0)
    for t in kernel.order:
        if t in stored:
            read += _size(t.axes) * intermediate_dtype(t, dtype).itemsize
        elif t.op in _OPERANDS:
            read += _size(t.axes) * _operand_bytes(t, dtype)
        elif t.op is TileOp.CARRY:
            assert t in starts, "a carry is the scan's own or stored"
        else:
            products += _products(t)
            elementwise += _elementwise(t)
    written = sum((_stored_bytes(t, dtype) for _, t in kernel.stores), sympy.Integer(0))
    return Cost(*(sympy.expand(x / C) for x in (products, elementwise, read, written)))


def program_cost(program: Program, dtype: Dtype) -> Cost:
    """All kernels of one direction."""
    zero = sympy.Integer(0)
    total = Cost(zero, zero, zero, zero)
    for kernel in program.kernels:
        own = kernel_cost(kernel, dtype)
        if kernel.transposed:
            own = Cost(*map(_exchanged, (own.products, own.elementwise, own.read, own.written)))
        total += own
    return total


def compulsory_bytes(chunk: ChunkProgram | Adjoint, dtype: Dtype) -> Expr:
    """The floor under any plan: each operand read once, each output written once."""
    roots = [*(t for _, t in chunk.outputs), *(c.end for c in chunk.carried)]
    operands = [t for t in tile.topological(*roots) if t.op in _OPERANDS]
    read = sum((_size(t.axes) * _operand_bytes(t, dtype) for t in operands), sympy.Integer(0))
    written = sum((_stored_bytes(t, dtype) for _, t in chunk.outputs), sympy.Integer(0))
    return sympy.expand((read + written) / C)


def stored_bytes(tiles: Iterable[Tile], dtype: Dtype) -> Expr:
    """The memory that `tiles` take between kernels."""
    return sympy.expand(sum((_stored_bytes(t, dtype) for t in tiles), sympy.Integer(0)) / C)


def evaluate(expression: Expr, chunk: int, dims: Dims) -> float:
    """The number that a polynomial stands for."""
    values = {C: chunk, K: dims.K, V: dims.V, LEVELS: chunk.bit_length() - 1}
    return float(expression.subs(values))


def readable(expression: Expr, *, transposed: bool = False) -> str:
    """A polynomial as text, its largest powers first; `transposed`: of states that are held so."""
    if transposed:
        expression = _exchanged(expression)
    text = str(expression).replace("**2", "²").replace("**3", "³")
    return text.replace("*", "·").replace(" - ", " − ")


def _exchanged(expression: Expr) -> Expr:
    return expression.subs({K: V, V: K}, simultaneous=True)


def _size(axes: Iterable[Axis]) -> Expr:
    return sympy.Mul(*(_SIZE[a] for a in axes))


def _operand_bytes(t: Tile, dtype: Dtype) -> int:
    """Scalars and per-head operands come in float32 (as `offline.signature_for` has it)."""
    narrow = t.op is TileOp.TOKEN and len(t.axes) == 2
    return (dtype if narrow else Dtype.FLOAT32).itemsize


def _stored_bytes(t: Tile, dtype: Dtype) -> Expr:
    return _size(t.axes) * intermediate_dtype(t, dtype).itemsize


def _products(t: Tile) -> Expr:
    if t.op is TileOp.DOT:
        return 2 * _size(_joint(t.args))
    if t.op is TileOp.PRODUCT:
        return 2 * C**3
    if t.op is TileOp.SUBSTITUTE:
        return C * C * _size((Axis.V,))
    if t.op in (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY):
        return 2 * LEVELS * C * C * _size((tile.gated_axis(t),))
    if t.op is TileOp.DECAYED_CROSSING:
        return 6 * LEVELS * C * C * _size((tile.gated_axis(t),))
    if t.op is TileOp.INVERSE:
        # two products per doubling: of 16 x 16 blocks up to 16 rows, of whole tiles above
        return 2 * 3 * 2 * 16**2 * C + 2 * (LEVELS - 4) * 2 * C**3
    return sympy.Integer(0)


def _elementwise(t: Tile) -> Expr:
    if t.op in (*_FREE, TileOp.DOT, TileOp.PRODUCT) or not t.args:
        return sympy.Integer(0)
    if t.op in DECAYED:
        # difference, exponential, two factors
        return 4 * LEVELS * C * _size((tile.gated_axis(t),))
    if t.op is TileOp.INVERSE:
        return 2 * LEVELS * C * C
    return _size(_joint(t.args))


def _joint(args: tuple[Tile, ...]) -> Axes:
    return tile.axes_of(*(a for x in args for a in x.axes))
