"""StepIR expressions to TileIR: the preamble and postamble of a recurrence on tiles of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..dsl import oracle
from ..dsl.elementwise import ELEMENTWISE
from ..dsl.ir import Kind, Node, Op, Per
from ..dsl.ir import topological as step_order
from ..dsl.normal_form import NormalForm, has_entries_apart
from . import tile
from .tile import Axes, Axis, Tile

_AXES: dict[Kind, Axes] = {kind: tuple(Axis[a] for a in kind.axes) for kind in Kind}
_EXCHANGED = {Kind.KEY: Kind.VALUE, Kind.VALUE: Kind.KEY}


def kind_axes(kind: Kind, *, transposed: bool = False) -> Axes:
    """The channel axes of a value of this kind; `transposed`: where states are held transposed."""
    return _AXES[_EXCHANGED.get(kind, kind) if transposed else kind]


def lower(form: NormalForm, roots: list[Node], results: Mapping[int, Tile]) -> list[Tile]:
    """`roots` as tiles; `results` gives the tile of each RESULT leaf (reads of the state).

    The rows of a transposed form's tiles are its columns: its Values have axis K, its Keys axis V.

    With several micro-steps a row is one micro-step of a token: an operand of micro-steps is then a
    tensor of rows like any other, and an operand of tokens has its value in each of their rows.
    Where one row takes several entries of a tuple, each is a tensor of its own.
    """
    per = {operand.name: operand.per for operand in form.operands}
    apart = has_entries_apart(form)

    def axes(kind: Kind) -> Axes:
        return kind_axes(kind, transposed=form.transposed)

    done: dict[Node, Tile] = {}
    for node in step_order(*roots):
        if node.op is Op.OPERAND:
            done[node] = _operand(node, per, axes(node.kind), apart=apart)
        elif node.op is Op.RESULT:
            (index,) = node.attrs
            assert isinstance(index, int)
            done[node] = results[index]
        else:
            done[node] = lower_expression(node, [done[a] for a in node.args], axes)
    return [done[r] for r in roots]


def _operand(node: Node, per: Mapping[str, Per], axes: Axes, *, apart: bool) -> Tile:
    name, index = node.attrs
    assert isinstance(name, str)
    if per[name] is Per.HEAD:
        return tile.head(name, axes)
    return tile.token(entry_name(name, index) if apart and isinstance(index, int) else name, axes)


def entry_name(operand: str, index: int) -> str:
    """The tensor `[B,T,...]` of one entry of a tuple."""
    return f"{operand}_at{index}"


def lower_expression(
    node: Node, args: list[Tile], axes: Callable[[Kind], Axes] = kind_axes
) -> Tile:
    """A number, a sum over channels or an elementwise function, of lowered arguments."""
    if node.op is Op.PARAM:
        return tile.param(str(node.attrs[0]))
    if node.op is Op.CONST:
        (value,) = node.attrs
        assert isinstance(value, float)
        return tile.const(value)
    if node.op is Op.SUM:
        (x,) = args
        if x.is_map(Op.MUL):
            a, b = x.args
            channel = axes(node.args[0].kind)[0]
            if channel in a.axes and channel in b.axes:
                return tile.contract(a, b, channel)
        return tile.reduce(x, axes(node.args[0].kind))
    assert node.op in ELEMENTWISE, f"{node.op.name} is not lowered as an expression"
    if all(a.op is tile.TileOp.CONST for a in args):  # its value: kernels compute with fewer digits
        values = [torch.tensor(a.value, dtype=torch.float64, device="cpu") for a in args]
        return tile.const(float(oracle.apply(node, values)))
    return tile.fmap(node.op, *args)
