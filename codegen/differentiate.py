"""The backward of a chunk, derived: vector-Jacobian rules for TileIR, and the scan run in reverse.

Reverse the scan over chunks: its body becomes the VJP of the body (mathematics, the gradient). It
carries R, the gradient of the state as the chunk ends, and needs S, the state as the chunk began.
Rules are a table by op. One rule is for a pattern: the solve, a product of (1+L)^-1 and a
right-hand side.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl.ir import Op
from . import gates, tile
from .buffers import gradient
from .chunk import Carried, ChunkProgram, Named
from .elementwise import FUNCTIONS, Cotangents, Rule
from .gates import decayed_apply, decayed_crossing, decayed_dot, gate_of
from .solve import gather, substitute
from .tile import Axis, Tile, TileOp, Which

GRADIENT = "d_"  # the gradient of x is called d_x; of an output, it is an operand of that name


@dataclass(frozen=True, slots=True)
class Adjoint:
    """The chunk of the reversed scan: gradients of the leaves, and the carried gradients.

    `saved`: the forward scan's carries, which the gradients read as each chunk began.
    """

    outputs: Named
    carried: tuple[Carried, ...]
    saved: tuple[Tile, ...]
    transposed: bool = False


def differentiate(body: ChunkProgram) -> Adjoint:
    """The adjoint of `body`, with respect to every TOKEN and HEAD leaf and every carry."""
    incoming: dict[Tile, list[Tile]] = {}
    roots = []
    for name, output in body.outputs:
        incoming.setdefault(output, []).append(tile.token(GRADIENT + name.of, output.axes[1:]))
        roots.append(output)
    for c in body.carried:
        incoming.setdefault(c.end, []).append(tile.carry(GRADIENT + c.name, c.start.axes))
        roots.append(c.end)

    gradients: dict[Tile, Tile] = {}
    for node in reversed(tile.topological(*roots)):
        parts = incoming.pop(node, None)
        if parts is None:
            continue
        g = tile.total(parts)
        if node.hint:
            g = g.named(GRADIENT + node.hint)
        gradients[node] = g
        for argument, part in _propagate(node, g):
            assert part.axes == argument.axes, "a gradient has the axes of its argument"
            incoming.setdefault(argument, []).append(part)

    starts = {c.start: c for c in body.carried}
    outputs = [
        (gradient(str(node.attrs[0])), tile.expand(g, node.axes))
        for node, g in gradients.items()
        if node.op in (TileOp.TOKEN, TileOp.HEAD)
    ]
    carried = tuple(
        Carried(
            tile.carry(GRADIENT + c.name, s.axes),
            gradients.get(s, tile.expand(tile.const(0.0), s.axes)),
        )
        for s, c in starts.items()
    )
    outputs.sort(key=lambda output: output[0].of)
    return Adjoint(tuple(outputs), carried, tuple(starts), body.transposed)


def _propagate(node: Tile, g: Tile) -> Cotangents:
    solve = _solve_rule(node, g)
    if solve is not None:
        return solve
    if node.op is TileOp.MAP:
        parts = FUNCTIONS[node.attr(Op)].gradient(node, g)
    else:
        parts = _RULES[node.op](node, g)
    return [(x, _to_axes(part, x)) for x, part in parts]


def _to_axes(g: Tile, x: Tile) -> Tile:
    """`g` with the axes of `x`, along which it may be constant.

    Summed over those along which `x` was broadcast (rows beyond the end do not count).
    """
    extra = tuple(a for a in g.axes if a not in x.axes)
    if Axis.I in extra:
        g = tile.rows(g)
    return tile.expand(tile.reduce(g, extra), x.axes)


# ---- rules by op ---------------------------------------------------------------------------------


def _dot(z: Tile, g: Tile) -> Cotangents:
    x, y = z.args
    (over,) = z.attrs
    (x_free,) = (a for a in x.axes if a is not over)
    (y_free,) = (a for a in y.axes if a is not over)
    return [(x, tile.contract(g, y, y_free)), (y, tile.contract(x, g, x_free))]


def _product(z: Tile, g: Tile) -> Cotangents:
    """Of Z = X Y: dX = G Y^T and dY = X^T G; of a transposed factor, the transpose."""
    x, y = z.args
    tx, ty = (bool(t) for t in z.attrs)
    if tx:
        dx = tile.product(y, g, transpose_x=ty, transpose_y=True)
    else:
        dx = tile.product(g, y, transpose_y=not ty)
    if ty:
        dy = tile.product(g, x, transpose_x=True, transpose_y=tx)
    else:
        dy = tile.product(x, g, transpose_x=not tx)
    return [(x, dx), (y, dy)]


def _cumsum(z: Tile, g: Tile) -> Cotangents:
    reverse, exclusive = z.attrs
    g = tile.expand(g, z.axes)
    assert g.op is not TileOp.EXPAND, "the gradient of a prefix sum varies over tokens"
    return [(z.args[0], gates.cumsum(g, reverse=not reverse, exclusive=bool(exclusive)))]


def _floor(z: Tile, g: Tile) -> Cotangents:
    """The gradient of a factor passes; a log-decay below the floor has gradient 0.

    The chain rule may multiply that gradient by a large number, so it has to be 0 exactly. It does
    not for an operand, whose gradient is small of itself where the decay is 0.
    """
    (x,), least = z.args, z.attr(float)
    if least > 0.0 or _is_operand(x):
        return [(x, g)]
    below = tile.step(tile.sub(tile.const(least), x))
    return [(x, tile.mul(g, tile.sub(tile.const(1.0), below)))]


def _decay(z: Tile, g: Tile) -> Cotangents:
    """Every entry that crosses a token is proportional to its decay; the diagonal crosses none."""
    _, exclusive = z.attrs
    crossing = gates.crossing(tile.mask(tile.mul(g, z), Which.STRICT), exclusive=bool(exclusive))
    return [(z.args[0], crossing)]


def _inverse(z: Tile, g: Tile) -> Cotangents:
    raise AssertionError("(1 + L)^-1 is differentiated with what it is applied to: _solve_rule")


def _substitute(z: Tile, g: Tile) -> Cotangents:
    """U = x - b (L U): dX = dU - L^T (b dX), dL = -stril((b dX) U^T) and db = -dX (L U)."""
    lower, b, x = z.args
    assert z.attrs == (False,), "a gradient is not differentiated"
    dx = substitute(lower, b, g, transposed=True).named(GRADIENT + (x.hint or "X"))
    dl = tile.contract(tile.mul(b, dx), tile.rename(z, Axis.J), Axis.V)
    db = tile.mul(dx, gather(lower, z))
    return [(x, dx), (b, tile.neg(db)), (lower, tile.neg(tile.mask(dl, Which.STRICT)))]


def _decayed_dot(z: Tile, g: Tile) -> Cotangents:
    """No diagonal: the op is strict."""
    x, y = z.args[:2]
    dx = decayed_apply(g, y, gate_of(z), Axis.I)
    dy = decayed_apply(g, x, gate_of(z), Axis.J)
    return [(x, dx), (y, dy), *_vector_gate(z, g, (x, dx), (y, dy))]


def _decayed_apply(z: Tile, g: Tile) -> Cotangents:
    """sum g z is the form sum A_ij x_ik y_jk e^(..), z the derivative for the side that g is on."""
    a, other = z.args[:2]
    gate = gate_of(z)
    if z.attrs[0] is Axis.I:
        x, dx, y, dy = g, z, other, decayed_apply(a, g, gate, Axis.J)
        passed = (y, dy)
    else:
        x, dx, y, dy = other, decayed_apply(a, g, gate, Axis.I), g, z
        passed = (x, dx)
    return [(a, decayed_dot(x, y, gate)), passed, *_vector_gate(z, a, (x, dx), (y, dy))]


def _vector_gate(
    z: Tile, a: Tile, rows: tuple[Tile, Tile], columns: tuple[Tile, Tile]
) -> Cotangents:
    """Of the gate of `z`, for sum A_ij x_ik y_jk e^(..); x and y with their derivatives dx, dy.

    The gradient sums the entries that cross each token. If the log-decay is an operand itself, a
    difference of sums of x dx and y dy will do: its rounding is small beside the gradient of tokens
    that the state survives, and no derivative of an expression (1/f, for a factor f) multiplies it.
    """
    (x, dx), (y, dy) = rows, columns
    p, q, log_decay = z.args[-3:]
    if _is_operand(log_decay):
        return [(p, tile.mul(x, dx)), (q, tile.neg(tile.mul(y, dy)))]
    return [(log_decay, decayed_crossing(a, x, y, dx, dy, gate_of(z)))]


def _is_operand(log_decay: Tile) -> bool:
    while log_decay.op in (TileOp.FLOOR, TileOp.ROWS, TileOp.EXPAND):
        (log_decay,) = log_decay.args
    return log_decay.op in (TileOp.TOKEN, TileOp.HEAD)


def _solve_rule(z: Tile, g: Tile) -> Cotangents | None:
    """U = T X with T = (1+L)^-1: dX = T^T dU and dL = -stril(dX U^T); X a tile or a vector.

    The same as the rules of a product and INVERSE together, with two C x C x C products folded
    away.
    """
    if z.op is TileOp.PRODUCT and z.args[0].op is TileOp.INVERSE:
        assert z.attrs == (False, False), "an inverse is applied as it is"
        t, x = z.args
        dx = tile.product(t, g, transpose_x=True).named(GRADIENT + (x.hint or "X"))
        dl = tile.product(dx, z, transpose_y=True)
        return [(x, dx), (t.args[0], tile.neg(tile.mask(dl, Which.STRICT)))]
    if z.op not in (TileOp.DOT, TileOp.SUM) or z.attrs not in ((Axis.J,), ((Axis.J,),)):
        return None
    factors = z.args
    if z.op is TileOp.SUM:
        (product,) = z.args
        if product.op is not TileOp.MAP or product.attrs != (Op.MUL,):
            return None
        factors = product.args
    t, x = factors if factors[0].op is TileOp.INVERSE else factors[::-1]
    if t.op is not TileOp.INVERSE:
        return None
    dx = tile.contract(t, g, Axis.I).named(GRADIENT + (x.hint or "X"))  # axes [J, ...] like x
    (lower,) = t.args
    left, right = tile.rename(dx, Axis.I), tile.rename(z, Axis.J)
    free = [a for a in z.axes if a is not Axis.I]
    dl = tile.contract(left, right, free[0]) if free else tile.mul(left, right)
    return [(x, dx), (lower, tile.neg(tile.mask(dl, Which.STRICT)))]


_RULES: dict[TileOp, Rule] = {
    TileOp.TOKEN: lambda z, g: [],
    TileOp.HEAD: lambda z, g: [],
    TileOp.PARAM: lambda z, g: [],
    TileOp.CONST: lambda z, g: [],
    TileOp.EXTENT: lambda z, g: [],
    TileOp.CARRY: lambda z, g: [],
    TileOp.STEP: lambda z, g: [],
    TileOp.ROUND: lambda z, g: [],
    TileOp.EXPAND: lambda z, g: [(z.args[0], g)],
    TileOp.RENAME: lambda z, g: [
        (z.args[0], tile.rename(g, Axis.I if z.attrs == (Axis.J,) else Axis.J))
    ],
    TileOp.ROWS: lambda z, g: [(z.args[0], tile.rows(g))],
    TileOp.FLOOR: _floor,
    TileOp.FLUSH: lambda z, g: [(z.args[0], g)],
    TileOp.PHASE: lambda z, g: [(z.args[0], tile.phase(g, z.attrs))],
    TileOp.MASK: lambda z, g: [(z.args[0], tile.mask(g, z.attr(Which)))],
    TileOp.SUM: lambda z, g: [(z.args[0], tile.expand(g, z.args[0].axes))],
    TileOp.DOT: _dot,
    TileOp.PRODUCT: _product,
    TileOp.CUMSUM: _cumsum,
    TileOp.DECAY: _decay,
    TileOp.INVERSE: _inverse,
    TileOp.SUBSTITUTE: _substitute,
    TileOp.DECAYED_DOT: _decayed_dot,
    TileOp.DECAYED_APPLY: _decayed_apply,
}
