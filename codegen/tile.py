"""TileIR: the chunk of a recurrence as a functional language of tiles whose axes have names.

A tile's shape is the set of its axes: `I`, `J` run over the C tokens of the chunk (rows and columns
of a score matrix), `K` and `V` over the channels of the state. Elementwise ops broadcast by name, a
product names the axis it sums; so there is no transpose, and one rule of differentiation serves
every product. A node is its own value, as in StepIR: equal expressions are one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import TypeVar

from ..dsl.elementwise import at_zeros
from ..dsl.errors import InvalidIR
from ..dsl.ir import Expression, Op
from ..dsl.ir import topological as topological


class Axis(Enum):
    """A named axis; the order of declaration is the canonical order of a tile's axes."""

    I = "i"  # noqa: E741 - tokens of the chunk
    J = "j"
    K = "k"
    V = "v"


Axes = tuple[Axis, ...]
TIMES: Axes = (Axis.I, Axis.J)
SQUARE = TIMES  # the axes of a C x C tile
_ORDER = {axis: n for n, axis in enumerate(Axis)}


def axes_of(*parts: Axis) -> Axes:
    """The canonical tuple of a set of axes."""
    return tuple(sorted(set(parts), key=_ORDER.__getitem__))


class Which(Enum):
    """The part of a C x C tile that a mask keeps."""

    LOWER = "i >= j"
    STRICT = "i > j"
    DIAGONAL = "i == j"


class TileOp(Enum):
    """The ops of TileIR and their meaning."""

    # leaves
    TOKEN = "rows of a per-token tensor of the call, or without I its one row; attrs (name,)"
    HEAD = "a per-head tensor of the call; attrs (name,)"
    PARAM = "a run-time float of the call; attrs (name,)"
    CONST = "a number; attrs (value,)"
    CARRY = "the state of a scan when the chunk begins; attrs (name,)"
    EXTENT = "the number of channels along an axis; attrs (axis,)"
    # compute
    MAP = "elementwise function of tiles, broadcast by axis name; attrs (StepIR op,)"
    STEP = "1 where x > 0, else 0"
    ROUND = "the nearest whole number; no gradient passes"
    EXPAND = "the same values along further axes"
    RENAME = "the same tile with I called J, or J called I; attrs (to,)"
    ROWS = "zero in the rows beyond the end of the sequence"
    PHASE = "zero but in the rows of one micro-step of a token; attrs (micro-step, how many)"
    MASK = "keep a part of a C x C tile, zero elsewhere; attrs (Which,)"
    SUM = "sum over axes; attrs (axes,)"
    DOT = "sum over one axis of a product of two tiles; attrs (axis,)"
    PRODUCT = "sum_l x_il y_lj of C x C tiles; attrs (whether x is transposed first, whether y is)"
    CUMSUM = "prefix sum over I; attrs (reverse, exclusive)"
    FLOOR = "the larger of x and a number; below one above 0 the gradient passes; attrs (number,)"
    FLUSH = "x, but 0 where it is smaller than a number, where the gradient passes; attrs (number,)"
    DECAY = "e^(g_j+1 + ... + g_i) in the mask, else zero; attrs (Which, whether i is left out)"
    INVERSE = "(1 + L)^-1 of a strictly lower C x C tile"
    SUBSTITUTE = "U = x - b L U, L scaled per column of U, or U = x - L^T b U; (L, b, x), (which,)"
    # under a vector gate g, P and Q its prefix sums: e^(P_ik - Q_jk) stands for the decay from j to
    # i, which g alone gives in all digits; args end (.., P, Q, g), attrs with whether decays are
    # flushed (not in DECAYED_CROSSING) and whether i is left out
    DECAYED_DOT = "sum_k x_ik y_jk e^(P_ik - Q_jk), i > j; args (x, y, ..)"
    DECAYED_APPLY = "sum_j A_ij y_jk e^(..), i > j, attrs (I, ..), or sum_i A_ij x_ik .., (J, ..)"
    DECAYED_CROSSING = "sum A_ij x_ik y_jk e^(..) over decays that cross t; (A, x, y, dx, dy, ..)"


LEAVES = (TileOp.TOKEN, TileOp.HEAD, TileOp.PARAM, TileOp.CARRY)  # given to the chunk
NUMBERS = (TileOp.CONST, TileOp.EXTENT)
ALIASES = (TileOp.RENAME, TileOp.EXPAND)  # the same numbers, seen over other axes
MASKS = (TileOp.ROWS, TileOp.PHASE, TileOp.MASK)
POINTWISE = (TileOp.MAP, TileOp.STEP, TileOp.ROUND, TileOp.FLOOR, TileOp.FLUSH, *MASKS)

Attr = str | int | float | bool | None | Op | Which | Axis | Axes
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True, eq=False)
class Tile(Expression):
    """One value; `hint` is a name for readers only."""

    op: TileOp
    args: tuple[Tile, ...]
    attrs: tuple[Attr, ...]
    axes: Axes
    hint: str = ""
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._identify(self.op.name, self.attrs, self.axes)

    def named(self, hint: str) -> Tile:
        """The same value with a name for readers of printed kernels; a leaf keeps its own."""
        if not self.args:
            return self
        return Tile(self.op, self.args, self.attrs, self.axes, hint)

    def attr(self, kind: type[_Kind]) -> _Kind:
        """The first attribute, which is of that type."""
        value = self.attrs[0]
        assert isinstance(value, kind), f"{self.op.name} with {value!r}, no {kind.__name__}"
        return value

    @property
    def value(self) -> float:
        """The number of a CONST."""
        assert self.op is TileOp.CONST
        return self.attr(float)

    def is_map(self, fn: Op) -> bool:
        """Whether it is that elementwise function of others."""
        return self.op is TileOp.MAP and self.attrs == (fn,)


def rewritten(
    roots: Iterable[Tile], rule: Callable[[Tile, tuple[Tile, ...]], Tile]
) -> dict[Tile, Tile]:
    """Every tile below `roots`, made anew by `rule` from its arguments, made anew."""
    done: dict[Tile, Tile] = {}
    for t in topological(*roots):
        done[t] = rule(t, tuple(done[a] for a in t.args))
    return done


def with_args(t: Tile, args: tuple[Tile, ...]) -> Tile:
    """The op of `t` on other arguments, which have the axes of its own."""
    if args == t.args:
        return t
    if t.op is TileOp.MAP:
        return fmap(t.attr(Op), *args).named(t.hint)
    return Tile(t.op, args, t.attrs, t.axes, t.hint)


def summed_axes(t: Tile) -> Axes:
    """The axes that a sum or a matrix product sums over; none of other tiles."""
    if t.op is TileOp.SUM:
        return t.attr(tuple)
    if t.op is TileOp.DOT:
        return (t.attr(Axis),)
    if t.op is TileOp.DECAYED_APPLY:
        return (Axis.J,) if t.attrs[0] is Axis.I else (Axis.I,)
    return (gated_axis(t),) if t.op is TileOp.DECAYED_DOT else ()


def gated_axis(t: Tile) -> Axis:
    """The axis of a DECAYED op's gate, K unless a state decays along both: its log-decay's."""
    return t.args[-1].axes[-1]


# ---- constructors: each checks its axes and folds trivial cases -------------------------------


def const(value: float) -> Tile:
    return Tile(TileOp.CONST, (), (float(value),), ())


def token(name: str, axes: Axes) -> Tile:
    return Tile(TileOp.TOKEN, (), (name,), axes_of(Axis.I, *axes), name)


def row(name: str, axes: Axes) -> Tile:
    """The one row of a per-token tensor, for a kernel of one token."""
    return Tile(TileOp.TOKEN, (), (name,), axes_of(*axes), name)


def head(name: str, axes: Axes) -> Tile:
    return Tile(TileOp.HEAD, (), (name,), axes_of(*axes), name)


def param(name: str) -> Tile:
    return Tile(TileOp.PARAM, (), (name,), (), name)


def carry(name: str, axes: Axes) -> Tile:
    return Tile(TileOp.CARRY, (), (name,), axes_of(*axes), name)


def _is_const(x: Tile, value: float) -> bool:
    return x.op is TileOp.CONST and x.value == value


def fmap(fn: Op, *args: Tile) -> Tile:
    """`fn` elementwise. EXPANDed arguments are taken as they were: broadcasting is implied."""
    axes = axes_of(*(a for x in args for a in x.axes))
    bare = tuple(x.args[0] if x.op is TileOp.EXPAND else x for x in args)
    folded = _fold(fn, bare)
    if folded is None:
        bare_axes = axes_of(*(a for x in bare for a in x.axes))
        folded = Tile(TileOp.MAP, bare, (fn,), bare_axes)
    return expand(folded, axes)


def _fold(fn: Op, args: tuple[Tile, ...]) -> Tile | None:
    """Identities that differentiation and normalisation leave behind; None where there is none."""
    x, y = args[0], args[-1]
    if fn is Op.WITHIN:
        return x
    if fn is Op.MUL:
        for a, b in ((x, y), (y, x)):
            if _is_const(a, 1.0):
                return b
            if _is_const(a, -1.0):
                return neg(b)
        if x.is_map(Op.NEG):
            return neg(mul(x.args[0], y))
        if y.is_map(Op.NEG):
            return neg(mul(x, y.args[0]))
    if fn is Op.DIV and _is_const(y, 1.0):
        return x
    if fn is Op.NEG and x.is_map(Op.NEG):
        return x.args[0]
    if fn is Op.ADD:
        for a, b in ((x, y), (y, x)):
            if _is_const(a, 0.0):
                return b
        for a, b in ((x, y), (y, x)):
            if b.is_map(Op.NEG):
                return sub(a, b.args[0])
    if fn is Op.SUB:
        if _is_const(y, 0.0):
            return x
        if y.is_map(Op.NEG):
            return add(x, y.args[0])
    if fn in (Op.ADD, Op.SUB):
        return _common_factor(fn, x, y)
    return None


def _common_factor(fn: Op, x: Tile, y: Tile) -> Tile | None:
    """a*b + a*c as a*(b + c), where `a` is broadcast: one product fewer, on the larger tile."""
    if not (x.is_map(Op.MUL) and y.is_map(Op.MUL)):
        return None
    for a in x.args:
        if a in y.args and len(a.axes) < len(x.axes):
            b, c = (z.args[1] if z.args[0] == a else z.args[0] for z in (x, y))
            return mul(a, fmap(fn, b, c))
    return None


def add(x: Tile, y: Tile) -> Tile:
    return fmap(Op.ADD, x, y)


def sub(x: Tile, y: Tile) -> Tile:
    return fmap(Op.SUB, x, y)


def mul(x: Tile, y: Tile) -> Tile:
    return fmap(Op.MUL, x, y)


def div(x: Tile, y: Tile) -> Tile:
    return fmap(Op.DIV, x, y)


def neg(x: Tile) -> Tile:
    return fmap(Op.NEG, x)


def exp(x: Tile) -> Tile:
    return fmap(Op.EXP, x)


def step(x: Tile) -> Tile:
    if x.op is TileOp.EXPAND:
        return expand(step(x.args[0]), x.axes)
    return Tile(TileOp.STEP, (x,), (), x.axes)


def round(x: Tile) -> Tile:
    return Tile(TileOp.ROUND, (x,), (), x.axes)


def total(parts: list[Tile]) -> Tile:
    """The sum of a non-empty list, positive terms first so that no chain begins with a minus."""
    ordered = [p for p in parts if not p.is_map(Op.NEG)] + [p for p in parts if p.is_map(Op.NEG)]
    result = ordered[0]
    for part in ordered[1:]:
        result = add(result, part)
    return result


def expand(x: Tile, axes: Axes) -> Tile:
    """`x` along `axes` (a superset of its own)."""
    axes = axes_of(*axes, *x.axes)
    if axes == x.axes:
        return x
    if x.op is TileOp.EXPAND:
        x = x.args[0]
    return Tile(TileOp.EXPAND, (x,), (axes,), axes, x.hint)


def renamed(axes: Axes, to: Axis) -> Axes:
    """`axes`, the one of time called `to`."""
    return tuple(to if a in TIMES else a for a in axes)


def rename(x: Tile, to: Axis) -> Tile:
    """`x` with its time axis called `to`; a tile without one is itself."""
    if to in x.axes or not set(TIMES) & set(x.axes):
        assert not set(TIMES) <= set(x.axes), "rows and columns of a C x C tile keep their names"
        return x
    if x.op is TileOp.RENAME:
        return x.args[0]
    if x.op is TileOp.EXPAND:
        return expand(rename(x.args[0], to), renamed(x.axes, to))
    return Tile(TileOp.RENAME, (x,), (to,), renamed(x.axes, to), x.hint)


def rows(x: Tile) -> Tile:
    """`x`, zero in the rows beyond the end of the sequence (a `where`: NaN there is dropped too).

    A TOKEN is loaded so already, and so is a product with one.
    """
    if x.op is TileOp.EXPAND:  # stays outermost, where a sum over its axes counts their extents
        return expand(rows(x.args[0]), x.axes)
    if _zero_beyond_end(x):
        return x
    return Tile(TileOp.ROWS, (x,), (), axes_of(Axis.I, *x.axes), x.hint)


def phase(x: Tile, which: tuple[Attr, ...]) -> Tile:
    """`x` in the rows of one micro-step of as many: `which` has its number, and how many."""
    if x.op is TileOp.EXPAND:
        return expand(phase(x.args[0], which), x.axes)
    return Tile(TileOp.PHASE, (x,), which, axes_of(Axis.I, *x.axes), x.hint)


@lru_cache(maxsize=65536)
def _zero_beyond_end(x: Tile) -> bool:
    if x.op in (TileOp.ROWS, TileOp.TOKEN):
        return True
    floor_below_zero = x.op is TileOp.FLOOR and x.attr(float) <= 0.0
    if x.is_map(Op.NEG) or x.op is TileOp.PHASE or floor_below_zero:
        return _zero_beyond_end(x.args[0])
    if not (x.is_map(Op.MUL) and any(_zero_beyond_end(a) for a in x.args)):
        return False
    # a number per head may be so large that zero times it is NaN
    of_heads = any(t.op is TileOp.HEAD for t in topological(x))
    return not of_heads and all(finite_at_zero(a) for a in x.args)


def finite_at_zero(x: Tile, stop: frozenset[Tile] = frozenset()) -> bool:
    """Whether `x` is finite for sure where the operands are zero: zero times it is then zero.

    `stop`: tiles that are finite for sure, and are not looked into.
    """
    below = topological(x, stop=stop)
    functions = (t.attrs[0] for t in below if t.op is TileOp.MAP and t not in stop)
    return all(at_zeros(fn).is_finite() for fn in functions if isinstance(fn, Op))


def mask(x: Tile, which: Which) -> Tile:
    if which is not Which.DIAGONAL and _within(x, which):
        return x
    if x.op is TileOp.EXPAND:
        x = x.args[0]
    return Tile(TileOp.MASK, (x,), (which,), axes_of(Axis.I, Axis.J, *x.axes), x.hint)


@lru_cache(maxsize=65536)
def _within(x: Tile, which: Which) -> bool:
    """Whether `x` is zero outside `which` already."""
    if x.op is TileOp.DECAYED_DOT:
        return True
    if x.op in (TileOp.MASK, TileOp.DECAY):
        return x.attrs[0] in (which, Which.STRICT)
    if x.is_map(Op.NEG) or x.op is TileOp.FLUSH:
        return _within(x.args[0], which)
    return x.is_map(Op.MUL) and any(_within(a, which) for a in x.args)


def reduce(x: Tile, axes: Axes) -> Tile:
    """Sum over those of `axes` that `x` has."""
    axes = axes_of(*(a for a in axes if a in x.axes))
    if not axes:
        return x
    if x.op is TileOp.EXPAND:  # constant along an axis: times its extent
        (inner,) = x.args
        constant = [a for a in axes if a not in inner.axes]
        assert not {Axis.I, Axis.J} & set(constant), "mask rows before summing them"
        for axis in constant:
            inner = mul(inner, Tile(TileOp.EXTENT, (), (axis,), ()))
        kept = axes_of(*(a for a in x.axes if a not in axes))
        return expand(reduce(inner, tuple(a for a in axes if a not in constant)), kept)
    return Tile(TileOp.SUM, (x,), (axes,), axes_of(*(a for a in x.axes if a not in axes)))


def contract(x: Tile, y: Tile, over: Axis) -> Tile:
    """sum over one axis of x*y: a matrix product where the axes fit one, a reduction elsewhere.

    Raises InvalidIR for two C x C tiles, for which there is no third time axis: `product`.
    """
    x, y = (t.args[0] if t.op is TileOp.EXPAND and over in t.args[0].axes else t for t in (x, y))
    if over not in TIMES:
        for a, b in ((x, y), (y, x)):
            if a.op is TileOp.EXPAND:  # constant along the axis: a factor of the other's sum
                return mul(a.args[0], reduce(b, (over,)))
    if x.is_map(Op.NEG):
        return neg(contract(x.args[0], y, over))
    if y.is_map(Op.NEG):
        return neg(contract(x, y.args[0], over))
    shared = set(x.axes) & set(y.axes)
    if over in TIMES and shared >= set(TIMES):
        raise InvalidIR("the product of two C x C tiles, whose rows and columns have one name each")
    if shared == {over} and len(x.axes) == len(y.axes) == 2:
        axes = axes_of(*(a for a in (*x.axes, *y.axes) if a is not over))
        return Tile(TileOp.DOT, (x, y), (over,), axes)
    return reduce(mul(x, y), (over,))


def product(x: Tile, y: Tile, *, transpose_x: bool = False, transpose_y: bool = False) -> Tile:
    """The matrix product of two C x C tiles, one or both transposed first.

    Raises InvalidIR for other tiles, and for one that is constant along an axis.
    """
    if x.is_map(Op.NEG):
        return neg(product(x.args[0], y, transpose_x=transpose_x, transpose_y=transpose_y))
    if y.is_map(Op.NEG):
        return neg(product(x, y.args[0], transpose_x=transpose_x, transpose_y=transpose_y))
    if any(t.axes != SQUARE or t.op is TileOp.EXPAND for t in (x, y)):
        raise InvalidIR("a product of C x C tiles, of a tile that is none")
    return Tile(TileOp.PRODUCT, (x, y), (transpose_x, transpose_y), SQUARE)


def inverse(lower: Tile) -> Tile:
    assert lower.axes == SQUARE
    return Tile(TileOp.INVERSE, (lower,), (), lower.axes)
