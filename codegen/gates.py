"""Decays in TileIR: sums of log-decays, decays between tokens, and products under a vector gate."""

from __future__ import annotations

from dataclasses import dataclass

from .tile import SQUARE, Axis, Tile, TileOp, Which, axes_of, mask, reduce, rename

# A smaller factor of the state vanishes beside any state, in float64 too. Products with this one
# are still normal numbers in float32: the factor's gradient divides by it.
LEAST_FACTOR = 2.0**-63
# Smaller decays by factors become 0, except where the factor's gradient divides by them: a factor
# of 0 forgets the state exactly.
LEAST_DECAY = 1.5 * LEAST_FACTOR
DECAYED = (TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY, TileOp.DECAYED_CROSSING)


def cumsum(x: Tile, *, reverse: bool = False, exclusive: bool = False) -> Tile:
    assert Axis.I in x.axes, "a prefix sum runs over tokens"
    return Tile(TileOp.CUMSUM, (x,), (reverse, exclusive), x.axes)


def floor(x: Tile, least: float) -> Tile:
    """The larger of `x` and `least`, NaN kept; the gradient passes below a `least` above 0."""
    return Tile(TileOp.FLOOR, (x,), (least,), x.axes, x.hint)


def flush(x: Tile, least: float) -> Tile:
    """`x`, but 0 where it is smaller than `least`, NaN kept; the gradient passes as of `x`."""
    return Tile(TileOp.FLUSH, (x,), (least,), x.axes, x.hint)


def decay(g: Tile, which: Which, *, exclusive: bool = False) -> Tile:
    """The C x C matrix of decays from token j to token i under a scalar gate's log-decay.

    `exclusive`: without the decay of token i itself; then only below the diagonal.
    """
    assert g.axes == (Axis.I,)
    assert which is Which.STRICT or (which is Which.LOWER and not exclusive)
    return Tile(TileOp.DECAY, (g,), (which, exclusive), SQUARE)


def crossing(w: Tile, *, exclusive: bool = False) -> Tile:
    """sum over i >= t > j of w_ij, for each t: the gradient of the sums g_j+1 + ... + g_i.

    No sum cancels: a token's own is as exact as the entries of `w` that it belongs to, however
    small they are. `exclusive`: i > t > j.
    """
    assert w.axes == SQUARE
    later = cumsum(w, reverse=True, exclusive=exclusive)
    return reduce(mask(later, Which.STRICT), (Axis.J,))


# ---- under a vector gate: scores between tokens whose channels decay one by one ------------------


@dataclass(frozen=True, slots=True)
class Gate:
    """A vector gate [I, K] or [I, V] as reads see it: log-decays, their prefix sums to i and to j.

    `exclusive`: the decay of token i itself is left out. `factor`: it is the log of a factor that
    may be 0, whose decays are flushed.
    """

    log_decay: Tile
    to: Tile
    since: Tile
    exclusive: bool
    factor: bool

    @property
    def axis(self) -> Axis:
        """The axis whose channels decay one by one."""
        return self.log_decay.axes[-1]

    @property
    def args(self) -> tuple[Tile, Tile, Tile]:
        """The arguments of the ops below that stand for it."""
        return self.to, rename(self.since, Axis.J), self.log_decay


def decayed_dot(x: Tile, y: Tile, gate: Gate) -> Tile:
    """Scores under a vector gate, strictly lower; x and y have its axes, y is renamed here."""
    args = (x, rename(y, Axis.J), *gate.args)
    attrs = (gate.factor, gate.exclusive)
    return Tile(TileOp.DECAYED_DOT, args, attrs, SQUARE)


def decayed_apply(a: Tile, y: Tile, gate: Gate, side: Axis) -> Tile:
    """The adjoint of `decayed_dot`: `a` applied to y (side I), or transposed to x (side J)."""
    args = (a, y, *gate.args)
    attrs = (side, gate.factor, gate.exclusive)
    return Tile(TileOp.DECAYED_APPLY, args, attrs, axes_of(side, gate.axis))


def decayed_crossing(a: Tile, x: Tile, y: Tile, dx: Tile, dy: Tile, gate: Gate) -> Tile:
    """The adjoint of `decayed_dot` for the log-decay itself, of its axes.

    It equals the sum of x dx from t on, less that of y dy from t on. The rounding of this
    difference counts where it is multiplied: by 1/f if the gate is log f, by about |g| elsewhere.
    So where a decay is stronger than e^(the attribute), the entries that cross t are summed.
    """
    limit = -4.0 if gate.factor else -30.0
    args = (a, x, y, dx, dy, *gate.args)
    attrs = (limit, gate.exclusive)
    return Tile(TileOp.DECAYED_CROSSING, args, attrs, (Axis.I, gate.axis))


def gate_of(t: Tile) -> Gate:
    """The gate of a DECAYED_DOT or DECAYED_APPLY."""
    to, since, log_decay = t.args[-3:]
    factor, exclusive = t.attrs[-2:]
    assert isinstance(factor, bool)
    assert isinstance(exclusive, bool)
    return Gate(log_decay, to, rename(since, Axis.I), exclusive, factor)
