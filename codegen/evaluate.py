"""TileIR and StepIR on numbers of many digits: the meaning of every op, one line each.

A value is an array of Decimals with one axis for each of TileIR's, in their order; an axis that the
value does not have has length 1. So elementwise ops and products broadcast by name here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np

from ..dsl.elementwise import ELEMENTWISE, value_of
from ..dsl.errors import InvalidIR
from ..dsl.ir import Node, Op
from ..dsl.ir import topological as step_order
from . import tile
from .tile import Axes, Axis, Tile, TileOp, Which

Numbers: TypeAlias = Any  # an array of Decimals with four axes: numpy does not type its entries
_NOTHING = Decimal("1e-30")  # a bound of rounding errors
ZERO: Numbers = np.array(Decimal(0), dtype=object)
_AT = {axis: n for n, axis in enumerate(Axis)}
CHANNELS = _AT[Axis.K], _AT[Axis.V]  # of an array


@dataclass(frozen=True, slots=True)
class Sizes:
    """A chunk of a sequence: its rows, the first one's number, the rows of the sequence; channels.

    `rows` is 1 for a token without a time axis.
    """

    rows: int
    key: int
    value: int
    first: int = 0
    end: int = 1

    def along(self, axis: Axis) -> int:
        return {Axis.K: self.key, Axis.V: self.value}.get(axis, self.rows)

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The shape of a value that has `axes`."""
        return tuple(self.along(a) if a in axes else 1 for a in Axis)

    def numbers(self, axis: Axis) -> Numbers:
        """The rows' numbers in the sequence, along a time axis."""
        shape = [1, 1, 1, 1]
        shape[_AT[axis]] = self.rows
        return np.arange(self.first, self.first + self.rows).reshape(shape)

    def kept(self, which: Which) -> Numbers:
        """Where a mask keeps a C x C tile."""
        i, j = self.numbers(Axis.I), self.numbers(Axis.J)
        return {Which.LOWER: i >= j, Which.STRICT: i > j, Which.DIAGONAL: i == j}[which]


def number(value: float) -> Numbers:
    """A number as a value without axes."""
    return np.array(Decimal(value), dtype=object).reshape((1,) * len(Axis))


def total(x: Numbers, *axes: Axis) -> Numbers:
    """The sum of `x` over axes."""
    return x.sum(axis=tuple(_AT[a] for a in axes), keepdims=True)


# ---------------------------------------------------------------- elementwise functions


def _step(x: Decimal) -> Decimal:
    return Decimal(1) if x > 0 else Decimal(0)


_ELEMENTWISE = {op: np.frompyfunc(f.value, op.arity, 1) for op, f in ELEMENTWISE.items()}
_EXP = _ELEMENTWISE[Op.EXP]
_STEP = np.frompyfunc(_step, 1, 1)
_ROUND = np.frompyfunc(Decimal.to_integral_value, 1, 1)


# ---------------------------------------------------------------- TileIR


def _attr(t: Tile) -> Any:
    """The one attribute of a tile, of a type that goes with the op."""
    (attr,) = t.attrs
    return attr


def _sums(x: Numbers, *, reverse: bool = False, exclusive: bool = False) -> Numbers:
    """Prefix sums over I."""
    x = x[::-1] if reverse else x
    sums = np.cumsum(x, axis=0)
    if exclusive:
        sums = np.concatenate([np.full_like(x[:1], ZERO), sums[:-1]])
    return sums[::-1] if reverse else sums


def _inverse(lower: Numbers) -> Numbers:
    """(1 + L)^-1, row by row: T_i = e_i - sum_{j<i} L_ij T_j."""
    matrix = lower[:, :, 0, 0]
    result = np.array([[Decimal(i == j) for j in range(len(matrix))] for i in range(len(matrix))])
    for i in range(1, len(matrix)):
        result[i] -= matrix[i, :i] @ result[:i]
    return result.reshape(lower.shape)


def _substitute(t: Tile, lower: Numbers, b: Numbers, x: Numbers) -> Numbers:
    """U = x - b (L U) from the first row on, or U = x - L^T (b U) from the last."""
    result, rows = np.array(x), range(len(x))
    if t.attrs[0]:
        for i in reversed(rows):
            result[:i] -= lower[i, :i].reshape(-1, 1, 1, 1) * (b[i] * result[i])
    else:
        for i in rows:
            result[i] -= b[i] * sum(lower[i, j] * result[j] for j in range(i))
    return result


def _product(t: Tile, x: Numbers, y: Numbers) -> Numbers:
    """The matrix product of two C x C values, transposed first where `t` says so."""
    a, b = (
        m[:, :, 0, 0].T if exchanged else m[:, :, 0, 0]
        for m, exchanged in zip((x, y), t.attrs, strict=True)
    )
    return (a @ b)[:, :, None, None]


def _where(keep: Numbers, x: Numbers) -> Numbers:
    """`x` where it is kept, zero elsewhere."""
    return np.where(keep, x, ZERO)


def _between(g: Numbers, *, exclusive: bool) -> Numbers:
    """g_j+1 + ... + g_i of all pairs i > j; `exclusive`: without g_i."""
    return _sums(g, exclusive=exclusive) - _sums(g).swapaxes(_AT[Axis.I], _AT[Axis.J])


def _decay(t: Tile, g: Numbers, c: Sizes) -> Numbers:
    which, exclusive = t.attrs
    assert isinstance(which, Which)
    return _where(c.kept(which), _EXP(_between(g, exclusive=bool(exclusive))))


def _decayed(t: Tile, xs: Sequence[Numbers], c: Sizes) -> Numbers:
    """The product of the factors of a DECAYED op with the decay from j to i, i > j.

    Raises InvalidIR unless the op's prefix sums give that decay, as its log-decays do.
    """
    *factors, p, q, g = xs
    strict = c.kept(Which.STRICT)
    log_decay = _between(g, exclusive=bool(t.attrs[-1]))
    if np.max(abs(_where(strict, p - q - log_decay))) > _NOTHING:
        raise InvalidIR("prefix sums that are not those of the log-decay", t.key)
    return math.prod(factors, start=_where(strict, _EXP(log_decay)))


def _crossing(w: Numbers, exclusive: bool, c: Sizes) -> Numbers:
    """sum over i >= t > j of w_ij; `exclusive`: i > t > j."""
    later = _sums(w, reverse=True, exclusive=exclusive)
    return total(_where(c.kept(Which.STRICT), later), Axis.J)


def _decayed_crossing(t: Tile, xs: Sequence[Numbers], c: Sizes) -> Numbers:
    """The sum over the decays that cross each token, by its definition.

    Raises InvalidIR where the difference of sums that stands for it is another.
    """
    a, x, y, dx, dy, *gate = xs
    exclusive = bool(t.attrs[-1])
    z = _crossing(_decayed(t, [a, x, y, *gate], c), exclusive, c)
    taken = _sums(x * dx, reverse=True, exclusive=exclusive)
    given = _sums((y * dy).swapaxes(_AT[Axis.I], _AT[Axis.J]), reverse=True, exclusive=False)
    if np.max(abs(z - (taken - given))) > _NOTHING:
        raise InvalidIR("sums that differ by something else than what crosses a token", t.key)
    return z


_TILES: dict[TileOp, Callable[[Tile, Sequence[Numbers], Sizes], Numbers]] = {
    TileOp.CONST: lambda t, xs, c: number(t.value),
    TileOp.EXTENT: lambda t, xs, c: number(c.along(_attr(t))),
    TileOp.MAP: lambda t, xs, c: _ELEMENTWISE[_attr(t)](*xs),
    TileOp.STEP: lambda t, xs, c: _STEP(*xs),
    TileOp.ROUND: lambda t, xs, c: _ROUND(*xs),
    TileOp.EXPAND: lambda t, xs, c: np.broadcast_to(xs[0], c.shape(t.axes)),
    TileOp.RENAME: lambda t, xs, c: xs[0].swapaxes(_AT[Axis.I], _AT[Axis.J]),
    TileOp.ROWS: lambda t, xs, c: _where(c.numbers(Axis.I) < c.end, xs[0]),
    TileOp.PHASE: lambda t, xs, c: _where(c.numbers(Axis.I) % t.attrs[1] == t.attrs[0], xs[0]),
    TileOp.MASK: lambda t, xs, c: _where(c.kept(_attr(t)), xs[0]),
    TileOp.SUM: lambda t, xs, c: total(xs[0], *_attr(t)),
    TileOp.DOT: lambda t, xs, c: total(xs[0] * xs[1], _attr(t)),
    TileOp.PRODUCT: lambda t, xs, c: _product(t, *xs),
    TileOp.CUMSUM: lambda t, xs, c: _sums(
        xs[0], reverse=bool(t.attrs[0]), exclusive=bool(t.attrs[1])
    ),
    TileOp.FLUSH: lambda t, xs, c: _where(xs[0] >= Decimal(_attr(t)), xs[0]),
    TileOp.FLOOR: lambda t, xs, c: _ELEMENTWISE[Op.MAXIMUM](xs[0], Decimal(_attr(t))),
    TileOp.DECAY: lambda t, xs, c: _decay(t, xs[0], c),
    TileOp.INVERSE: lambda t, xs, c: _inverse(xs[0]),
    TileOp.SUBSTITUTE: lambda t, xs, c: _substitute(t, *xs),
    TileOp.DECAYED_DOT: lambda t, xs, c: total(_decayed(t, xs, c), tile.gated_axis(t)),
    TileOp.DECAYED_APPLY: lambda t, xs, c: total(
        _decayed(t, xs, c), Axis.J if t.attrs[0] is Axis.I else Axis.I
    ),
    TileOp.DECAYED_CROSSING: lambda t, xs, c: _decayed_crossing(t, xs, c),
}


def evaluate(roots: Sequence[Tile], leaf: Callable[[Tile], Numbers], sizes: Sizes) -> list[Numbers]:
    """The values of tiles of one chunk; `leaf` gives the values of TOKEN, HEAD, PARAM and CARRY.

    Raises InvalidIR for a tile whose value does not have its axes.
    """
    known: dict[Tile, Numbers] = {}
    for t in tile.topological(*roots):
        rule = _TILES.get(t.op)
        known[t] = rule(t, [known[a] for a in t.args], sizes) if rule else leaf(t)
        if known[t].shape != sizes.shape(t.axes):
            raise InvalidIR(f"a tile over {t.axes} with a value of shape {known[t].shape}", t.key)
    return [known[r] for r in roots]


# ---------------------------------------------------------------- StepIR


def _entrywise(n: Node, xs: Sequence[Numbers]) -> Numbers:
    return number(float(n.attrs[0] or 0.0)) if n.op is Op.CONST else _ELEMENTWISE[n.op](*xs)


def evaluate_step(roots: Sequence[Node], leaves: Mapping[Node, Numbers]) -> dict[Node, Numbers]:
    """The values of expressions of one token and of all below them.

    `leaves` has the values of operands, floats and states.
    """
    known = dict(leaves)
    for n in step_order(*roots):
        if n not in known:
            known[n] = value_of(n, [known[a] for a in n.args], _entrywise)
    return known
