"""What is left at a row of the states as they were at another: their decays, and how they mix.

The states of a group pass from row to row by a small matrix M, whose diagonal decays and whose
other entries are the factors by which states mix: S_i = M_i S_(i-1) + ... With

    Phi(i, j) = M_i ... M_(j+1)

the chunk form needs the C x C tile of an entry of Phi(i - 1, j), i > j: the state before row i, of
what was written in row j. Of one state alone it is the decay. With factors N that mix,

    Phi(i - 1, j) = D(i - 1, j) + sum_l D(i - 1, l) N_l Phi(l - 1, j)

for the diagonal decays D: a unit-triangular system in time, one unknown per state (codegen/solve).
No decay is inverted, so factors may be 0 or negative, and decays as small as they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..dsl.ir import Op
from ..dsl.normal_form import Phase
from . import gates, tile
from .gates import LEAST_DECAY, Gate, decayed_apply, decayed_dot
from .solve import eliminate, gather
from .tile import SQUARE, Axis, Tile, Which


@dataclass(frozen=True, slots=True)
class StateGate:
    """A log-decay and its sums; None without a decay. A read before the decay excludes token i."""

    log_decay: Tile | None = None
    inclusive: Tile | None = None
    exclusive: Tile | None = None
    following: Tile | None = None
    whole: Tile | None = None

    @staticmethod
    def of(log_decay: Tile | None) -> StateGate:
        """The gate of a log-decay of rows."""
        if log_decay is None:
            return StateGate()
        g = log_decay
        return StateGate(
            log_decay=g,
            inclusive=gates.cumsum(g).named("G"),
            exclusive=gates.cumsum(g, exclusive=True).named("G_before"),
            following=gates.cumsum(g, reverse=True, exclusive=True).named("H"),
            whole=tile.reduce(g, (Axis.I,)).named("G_C"),
        )

    @property
    def is_factor(self) -> bool:
        """Whether it is the log of a factor, which may be 0."""
        g = self.log_decay
        return g is not None and any(t.is_map(Op.LOG) for t in tile.topological(g))

    def decay(self, x: Tile) -> Tile:
        """`x`, a decay; flushed to 0 below LEAST_DECAY where the gate is a factor."""
        return gates.flush(x, LEAST_DECAY) if self.is_factor else x

    def exp(self, total: Tile) -> Tile:
        """The decay of a sum of log-decays."""
        return self.decay(tile.exp(total).named("e_" + total.hint))

    def prefix(self, phase: Phase) -> Tile | None:
        """The sum from the chunk's start."""
        return self.exclusive if phase is Phase.BEFORE else self.inclusive

    def factor(self, total: Tile | None) -> Tile:
        """The decay of a sum of log-decays; None: 1."""
        return tile.const(1.0) if total is None else self.exp(total)

    def of_channels(self, phase: Phase) -> Gate | None:
        """The gate as products under it take it, if channels decay one by one."""
        g, inclusive, to = self.log_decay, self.inclusive, self.prefix(phase)
        if g is None or inclusive is None or to is None or g.axes == (Axis.I,):
            return None
        return Gate(g, to, inclusive, phase is Phase.BEFORE, self.is_factor)

    def between(self, scores: Tile, phase: Phase, *, strict: bool = False) -> Tile:
        """`scores` decayed from j to i by a scalar gate, for j < i, and j = i AFTER the writes
        unless `strict`."""
        g, which = self.log_decay, Which.STRICT if strict else _seen(phase)
        if g is None:
            return tile.mask(scores, which)
        if phase is not Phase.BEFORE:  # one D, with its diagonal, for all scores of the chunk
            decay = self.decay(gates.decay(g, Which.LOWER).named("D"))
            return tile.mask(tile.mul(scores, decay), which)
        return tile.mul(scores, self.before)

    @property
    def before(self) -> Tile:
        """The C x C tile of decays from after row j to before row i, by a scalar gate."""
        if self.log_decay is None:
            return tile.mask(tile.expand(tile.const(1.0), SQUARE), Which.STRICT)
        decays = gates.decay(self.log_decay, Which.STRICT, exclusive=True)
        return self.decay(decays.named("D_before"))


def under(gate: Gate | None, scores: Tile, x: Tile, phase: Phase, *, strict: bool = False) -> Tile:
    """sum_j scores_ij x_j, channel by channel decayed from j to i by a vector gate, if any.

    `strict`: without the row's own, of which scores under no gate have none.
    """
    if gate is None:
        return gather(scores, x)
    earlier = decayed_apply(scores, tile.rename(x, Axis.J), gate, Axis.I)
    if phase is not Phase.AFTER or strict:
        return earlier
    own = tile.reduce(tile.mask(scores, Which.DIAGONAL), (Axis.J,))
    return tile.add(earlier, tile.mul(own, x))


def _seen(phase: Phase) -> Which:
    """Which rows' writes a read at its phase sees."""
    return Which.LOWER if phase is Phase.AFTER else Which.STRICT


class Transitions:
    """A group of states between rows. `mixes`: factors of rows, by the state they go to and from.

    Names of states stand for them: `to` is the one that is read, `of` the one that was written.
    """

    def __init__(
        self, state_gates: Mapping[str, StateGate], mixes: Mapping[tuple[str, str], Tile]
    ) -> None:
        self.gates = dict(state_gates)
        self._mixes = dict(mixes)
        self._mixed = {name for pair in mixes for name in pair}

    def scores(
        self, x: Tile, to: str, key: Tile, of: str, phase: Phase, *, strict: bool = False
    ) -> Tile | None:
        """<x_i, key_j> by what is left in `to` at row i of what row j wrote to `of`; None: 0.

        `strict`: without what row i wrote itself.
        """
        gate = self._of_channels(to, of, phase)
        if gate is None:
            products = tile.contract(x, tile.rename(key, Axis.J), Axis.K)
            return self._between(products, to, of, phase, strict)
        earlier = decayed_dot(x, key, gate)
        if phase is not Phase.AFTER or strict:
            return earlier
        diagonal = tile.contract(x, key, Axis.K)  # e^0 for every gate: never formed
        return tile.add(earlier, tile.mask(diagonal, Which.DIAGONAL))

    def combine(
        self, products: Tile, to: str, key: Tile, of: str, phase: Phase, *, strict: bool = False
    ) -> Tile | None:
        """sum_j products_ij key_j, by what is left of what row j wrote: [I, K]; None: 0."""
        gate = self._of_channels(to, of, phase)
        scores = self._between(products, to, of, phase, strict) if gate is None else products
        return None if scores is None else under(gate, scores, key, phase, strict=strict)

    def from_start(self, to: str, phase: Phase) -> list[tuple[str, Tile]]:
        """The factors of states at the chunk's start that a read of `to` sees, [I] or [I, K]."""
        if to not in self._mixed:
            return [(to, self.gates[to].factor(self.gates[to].prefix(phase)))]
        found = []
        for of in self.gates:
            before = {s: self._from_start[s, of] for s in self.gates if (s, of) in self._from_start}
            left = self._moved(before, to, phase)
            if left is not None:
                found.append((of, left))
        return found

    def to_end(self, to: str, of: str) -> Tile | None:
        """What the chunk's end has in `to` of what row j wrote to `of`: [I] or [I, K]; None: 0."""
        if to not in self._mixed:
            return self.gates[to].factor(self.gates[to].following) if to == of else None
        return self._to_end.get((to, of))

    def whole(self, to: str) -> list[tuple[str, Tile]]:
        """The factors of the states at the chunk's start that make `to` at its end."""
        gate = self.gates[to]
        if to not in self._mixed:
            return [(to, gate.factor(gate.whole))]
        found = []
        for of in self.gates:
            parts = [gate.factor(gate.whole)] if to == of else []
            for via in self.gates:
                if (to, via) in self._mixes and (via, of) in self._from_start:
                    late = self._leaving(to, via)
                    parts.append(tile.reduce(tile.mul(late, self._from_start[via, of]), (Axis.I,)))
            if parts:
                found.append((of, tile.total(parts)))
        return found

    def _of_channels(self, to: str, of: str, phase: Phase) -> Gate | None:
        return self.gates[to].of_channels(phase) if to == of else None

    def _between(self, products: Tile, to: str, of: str, phase: Phase, strict: bool) -> Tile | None:
        """Scores by what is left in `to` at row i of what row j wrote to `of`; None: 0."""
        if to not in self._mixed:
            own = self.gates[to]
            return own.between(products, phase, strict=strict) if to == of else None
        before = {s: self._before[s, of] for s in self.gates if (s, of) in self._before}
        left = self._moved(before, to, phase)
        parts = [] if left is None else [tile.mul(products, left)]
        if phase is Phase.AFTER and to == of and not strict:
            parts.append(tile.mask(products, Which.DIAGONAL))
        return tile.total(parts) if parts else None

    # ---- of states that mix ----------------------------------------------------------------------

    def _moved(self, before: Mapping[str, Tile], to: str, phase: Phase) -> Tile | None:
        """Entries of the states before a row, as `to` is at its phase; None: 0."""
        parts = []
        gate = self.gates[to]
        if to in before:
            own = None if phase is Phase.BEFORE else gate.log_decay
            parts.append(before[to] if own is None else tile.mul(gate.exp(own), before[to]))
        if phase is Phase.AFTER:
            parts += [
                tile.mul(factor, before[via])
                for (end, via), factor in self._mixes.items()
                if end == to and via in before
            ]
        return tile.total(parts) if parts else None

    def _leaving(self, to: str, via: str) -> Tile:
        """The factor of `via` in row l, decayed in `to` to the chunk's end."""
        gate = self.gates[to]
        return tile.mul(self._mixes[to, via], gate.factor(gate.following))

    @cached_property
    def _before(self) -> dict[tuple[str, str], Tile]:
        """Phi(i - 1, j), entry by entry."""
        names = [n for n in self.gates if n in self._mixed]
        decays = {n: self.gates[n].before for n in names}
        at = {n: i for i, n in enumerate(names)}
        coupling = {
            (at[to], at[via]): tile.mul(decays[to], tile.rename(factor, Axis.J))
            for (to, via), factor in self._mixes.items()
        }
        solved = eliminate(coupling, [{n: decays[n]} for n in names])
        return {
            (to, of): x if x.hint else x.named("Phi")
            for to, row in zip(names, solved, strict=True)
            for of, x in row.items()
        }

    @cached_property
    def _from_start(self) -> dict[tuple[str, str], Tile]:
        """Phi(i - 1, 0): of the states as the chunk begins, [I]."""
        found = {}
        for of, gate in self.gates.items():
            own = gate.factor(gate.exclusive)
            for to in self.gates:
                parts = [own] if to == of else []
                for (end, start), factor in self._mixes.items():
                    if start == of and (to, end) in self._before:
                        parts.append(gather(self._before[to, end], tile.mul(factor, own)))
                if parts:
                    found[to, of] = tile.total(parts).named("phi")
        return found

    @cached_property
    def _to_end(self) -> dict[tuple[str, str], Tile]:
        """Phi(C, j): what the chunk's end has of row j, [I]."""
        found = {}
        for to, gate in self.gates.items():
            for of in self.gates:
                parts = [gate.factor(gate.following)] if to == of else []
                for via in self.gates:
                    if (to, via) in self._mixes and (via, of) in self._before:
                        late = tile.contract(self._leaving(to, via), self._before[via, of], Axis.I)
                        parts.append(tile.rename(late, Axis.I))
                if parts:
                    found[to, of] = tile.total(parts).named("psi")
        return found
