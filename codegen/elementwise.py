"""The elementwise functions of the language on targets, a row each: gradient and spellings.

`dsl/elementwise.py` has their meaning. TIR has vectors of floats and no functions: `tir/math.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..dsl.ir import Op
from . import tile
from .tile import Tile

Cotangents = list[tuple[Tile, Tile]]
Rule = Callable[[Tile, Tile], Cotangents]


@dataclass(frozen=True, slots=True)
class Function:
    """One function as the backward and the printers of text see it.

    `gradient`: from its value and the gradient of it, the gradient of each argument.
    `triton`, `torch`: the function's names there; empty for operators, which are printed infix.
    """

    gradient: Rule
    triton: str = ""
    torch: str = ""


_HALF, _ONE = tile.const(0.5), tile.const(1.0)


def _unary(derivative: Callable[[Tile, Tile], Tile]) -> Rule:
    """A rule from d(x, z): the derivative given the argument and the value."""
    return lambda z, g: [(z.args[0], tile.mul(g, derivative(z.args[0], z)))]


def _sign(x: Tile) -> Tile:
    """1, 0 or -1."""
    return tile.sub(tile.step(x), tile.step(tile.neg(x)))


def _sech2(x: Tile) -> Tile:
    """1 - tanh(x)^2, as 4 sigmoid(2x) sigmoid(-2x): in all digits where tanh is almost 1."""
    twice = tile.add(x, x)
    halves = tile.fmap(Op.SIGMOID, twice), tile.fmap(Op.SIGMOID, tile.neg(twice))
    return tile.mul(tile.const(4.0), tile.mul(*halves))


def _selected(second: Callable[[Tile, Tile], Tile]) -> Rule:
    """The gradient goes to the argument that was taken; `second`: how much of it to y."""

    def rule(z: Tile, g: Tile) -> Cotangents:
        x, y = z.args
        taken = second(x, y)
        return [(x, tile.mul(g, tile.sub(_ONE, taken))), (y, tile.mul(g, taken))]

    return rule


def _more(x: Tile, y: Tile) -> Tile:
    return tile.step(tile.sub(x, y))


def _half_more(x: Tile, y: Tile) -> Tile:
    """`_more`, but 1/2 where they are equal."""
    return tile.mul(_HALF, tile.add(_ONE, _sign(tile.sub(x, y))))


FUNCTIONS: dict[Op, Function] = {
    Op.ADD: Function(lambda z, g: [(z.args[0], g), (z.args[1], g)]),
    Op.SUB: Function(lambda z, g: [(z.args[0], g), (z.args[1], tile.neg(g))]),
    Op.MUL: Function(
        lambda z, g: [(z.args[0], tile.mul(g, z.args[1])), (z.args[1], tile.mul(g, z.args[0]))]
    ),
    Op.DIV: Function(
        lambda z, g: [
            (z.args[0], tile.div(g, z.args[1])),
            (z.args[1], tile.neg(tile.div(tile.mul(g, z), z.args[1]))),
        ]
    ),
    Op.MAXIMUM: Function(_selected(lambda x, y: _half_more(y, x)), "tl.maximum", "torch.maximum"),
    Op.MINIMUM: Function(_selected(_half_more), "tl.minimum", "torch.minimum"),
    Op.AT_LEAST: Function(_selected(lambda x, y: _more(y, x)), "tl.maximum", "torch.clamp_min"),
    Op.AT_MOST: Function(_selected(_more), "tl.minimum", "torch.clamp_max"),
    Op.NEG: Function(lambda z, g: [(z.args[0], tile.neg(g))]),
    Op.EXP: Function(_unary(lambda x, z: z), "tl.exp", "torch.exp"),
    Op.LOG: Function(lambda z, g: [(z.args[0], tile.div(g, z.args[0]))], "tl.log", "torch.log"),
    Op.EXPM1: Function(_unary(lambda x, z: tile.add(z, _ONE)), "expm1", "torch.expm1"),
    Op.LOG1P: Function(
        lambda z, g: [(z.args[0], tile.div(g, tile.add(z.args[0], _ONE)))], "log1p", "torch.log1p"
    ),
    # not of 1 - z, which has few digits left where z is almost 1
    Op.SIGMOID: Function(
        _unary(lambda x, z: tile.mul(z, tile.fmap(Op.SIGMOID, tile.neg(x)))),
        "tl.sigmoid",
        "torch.sigmoid",
    ),
    Op.LOGSIGMOID: Function(
        _unary(lambda x, z: tile.fmap(Op.SIGMOID, tile.neg(x))), "logsigmoid", "F.logsigmoid"
    ),
    Op.SOFTPLUS: Function(_unary(lambda x, z: tile.fmap(Op.SIGMOID, x)), "softplus", "F.softplus"),
    Op.TANH: Function(_unary(lambda x, z: _sech2(x)), "tanh", "torch.tanh"),
    Op.COS: Function(_unary(lambda x, z: tile.neg(tile.fmap(Op.SIN, x))), "tl.cos", "torch.cos"),
    Op.SIN: Function(_unary(lambda x, z: tile.fmap(Op.COS, x)), "tl.sin", "torch.sin"),
    Op.SQRT: Function(
        lambda z, g: [(z.args[0], tile.div(tile.mul(g, _HALF), z))], "tl.sqrt", "torch.sqrt"
    ),
    Op.RSQRT: Function(
        lambda z, g: [
            (z.args[0], tile.neg(tile.mul(tile.mul(g, _HALF), tile.mul(z, tile.mul(z, z)))))
        ],
        "tl.rsqrt",
        "torch.rsqrt",
    ),
    Op.ABS: Function(_unary(lambda x, z: _sign(x)), "tl.abs", "torch.abs"),
}
