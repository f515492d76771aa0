"""Sums of angles over the tokens of a chunk, right however many turns they make.

An angle is a whole number of steps, 64 to the turn, and a rest of at most half a step. Sums of
whole numbers are exact, and so is their remainder of a whole turn; the rests of a chunk add up to a
turn at most. The sum of a chunk's angles, in floats, would have the resolution of its largest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import tile
from .tile import Tile, TileOp

_STEPS = 64  # of a turn
_STEP = 2.0 * math.pi / _STEPS


def _parts(x: float, bits: int, count: int) -> tuple[float, ...]:
    """`x` as a sum: numbers of as few bits, then what is left."""
    found = []
    for _ in range(count):
        unit = 2.0 ** (math.frexp(x)[1] - bits)
        found.append(math.floor(x / unit) * unit)
        x -= found[-1]
    return (*found, x)


# Products of 18 bits, up to 25,000 radians, with all but the last are exact in float32.
_STEP_PARTS = _parts(_STEP, 6, 3)


@dataclass(frozen=True, slots=True)
class Angle:
    """The angle of each row in radians, [I] or [I, K]: `steps`, a whole number, and a `rest`.

    The gradient is that of the rest.
    """

    steps: Tile
    rest: Tile

    @staticmethod
    def of(angle: Tile | None, half_turns: Tile | None) -> Angle:
        """An angle and so many half turns more."""
        steps, rest = tile.const(0.0), tile.const(0.0)
        if angle is not None:
            whole, rest = tile.round(tile.mul(angle, tile.const(1.0 / _STEP))), angle
            for part in _STEP_PARTS:
                rest = tile.sub(rest, tile.mul(whole, tile.const(part)))
            steps = _of_a_turn(whole)
        if half_turns is not None:
            steps = tile.add(steps, tile.mul(tile.const(_STEPS / 2), half_turns))
        return Angle(steps, rest)

    def total(self, summed: Callable[[Tile], Tile]) -> Tile:
        """A sum over rows, by at most half a turn and the sum of the rests."""
        turned = tile.mul(_of_a_turn(summed(self.steps)), tile.const(_STEP))
        if self.rest.op is TileOp.CONST:
            return turned
        return tile.add(turned, summed(self.rest))


def _of_a_turn(steps: Tile) -> Tile:
    """So many steps but whole turns."""
    turns = tile.round(tile.mul(steps, tile.const(1.0 / _STEPS)))
    return tile.sub(steps, tile.mul(turns, tile.const(float(_STEPS))))
