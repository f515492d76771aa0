"""The declared step as tiles without a time axis: one token at a time, no chunk.

For decoding, and for sequences so short that chunks do not pay. Any legal step has this form. Sums
over the state are taken of the state as the token finds it, and the token's own write is read
apart: `q (a S + k u^T)` is `a (q S) + (q k) u`. So all reads see one state, and one write follows.
"""

from __future__ import annotations

from ..dsl.errors import NotLowered
from ..dsl.ir import Kind, Node, Op, Per, topological
from ..dsl.normal_form import Operand
from ..dsl.step import Step, output_names
from . import tile
from .buffers import output
from .chunk import Carried, ChunkProgram
from .expressions import unaliased
from .lower import entry_name, kind_axes, lower_expression
from .plan import Kernel, Loop
from .tile import Axis, Tile, TileOp


def row_names(operand: Operand, micro: int) -> tuple[str, ...]:
    """The tensors `[B,T,...]` that a token's kernel takes of an operand: one per micro-step."""
    if not operand.micro:
        return (operand.name,)
    return tuple(entry_name(operand.name, m) for m in range(micro))


def token_program(step: Step) -> ChunkProgram:
    """`step` on the tiles of one token."""
    operands = {o.name: o for o in step.operands}
    done: dict[Node, Tile] = {}
    for node in topological(*step.roots):
        args = [done[a] for a in node.args]
        if node.op is Op.OPERAND:
            name, index = node.attrs
            done[node] = _leaf(operands[str(name)], index, step.micro, node.kind)
        else:
            done[node] = _lowered(node, args)
    outputs = tuple(
        (output(name), tile.expand(done[n], kind_axes(n.kind)).named(name))
        for name, n in zip(output_names(len(step.outputs)), step.outputs, strict=True)
    )
    carried = tuple(
        Carried(tile.carry(s.name, kind_axes(s.kind)), done[n].named(f"{s.name}_next"))
        for s, n in zip(step.states, step.next_states, strict=True)
    )
    return ChunkProgram(outputs, carried)


def token_kernel(step: Step, *, pooled: bool = False) -> Kernel:
    """The one kernel of the token form: a scan over tokens that carries the state.

    `pooled`: the state lies in a pool, where each token's is kept.

    Raises:
        NotLowered: a state becomes another one's old value, which kernels overwrite.
    """
    body = token_program(step)
    for c in body.carried:
        if unaliased(c.end).op is TileOp.CARRY and unaliased(c.end) != c.start:
            raise NotLowered(
                what=f"{step.name}: state {c.name} becomes the old value of another state",
                why="kernels overwrite a state where it lies, and would pass on the new value",
                instead='engine="reference" runs it, in torch',
            )
    name = "token_pool" if pooled else "token_scan"
    return Kernel(name, Loop.FORWARD, body.outputs, body.carried, (), pooled=pooled)


def _leaf(operand: Operand, index: object, micro: int, kind: Kind) -> Tile:
    if operand.per is Per.HEAD:
        return tile.head(operand.name, kind_axes(kind))
    names = row_names(operand, micro)
    return tile.row(names[index if isinstance(index, int) else 0], kind_axes(kind))


def _lowered(node: Node, args: list[Tile]) -> Tile:
    if node.op is Op.STATE:
        return tile.carry(str(node.attrs[0]), kind_axes(node.kind))
    if node.op in (Op.SCALE, Op.OUTER):
        return _scaled(*args)
    if node.op is Op.READ:
        key, state = args
        return _read(key, state, Axis.K)
    if node.op is Op.READ_VALUE:
        state, key = args
        return _read(key, state, Axis.V)
    return lower_expression(node, args)


def _scaled(x: Tile, factor: Tile) -> Tile:
    """`factor * x`, the factor on a smaller tile where `x` is made from one that has its axes."""
    if x.is_map(Op.MUL):
        for a, b in (x.args, x.args[::-1]):
            if len(a.axes) < len(x.axes) and set(factor.axes) <= set(a.axes):
                return tile.mul(_scaled(a, factor), b)
    return tile.mul(factor, x)


def _read(x: Tile, state: Tile, over: Axis) -> Tile:
    """The sum over an axis of `x * state`, taken apart down to the state as the token finds it."""
    if len(state.axes) < 2:
        return tile.reduce(tile.mul(x, state), (over,))
    if state.op is not TileOp.MAP:
        return tile.reduce(tile.mul(x, state), (over,))
    fn = state.attr(Op)
    if fn in (Op.ADD, Op.SUB, Op.NEG):
        return tile.fmap(fn, *(_read(x, part, over) for part in state.args))
    if fn is Op.MUL:
        for a, b in (state.args, state.args[::-1]):
            if over not in a.axes:  # leaves the sum
                return tile.mul(a, _read(x, b, over))
        for a, b in (state.args, state.args[::-1]):
            if a.axes == (over,):  # joins the vector
                return _read(tile.mul(x, a), b, over)
    return tile.reduce(tile.mul(x, state), (over,))
