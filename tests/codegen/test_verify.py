"""The verifier refuses what no pass may produce: tiles that no op makes, statements that lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chunkwise.codegen import tile as ir
from chunkwise.codegen.buffers import output
from chunkwise.codegen.chunk import ChunkProgram
from chunkwise.codegen.config import Dims, Precision, Tiles
from chunkwise.codegen.interface import Dtype, Signature
from chunkwise.codegen.plan import Hoist, Plan
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.tile import Axis, Tile, TileOp
from chunkwise.codegen.tiled import (
    Advance,
    Compute,
    Finish,
    Load,
    Product,
    Store,
    TiledKernel,
    Zero,
)
from chunkwise.codegen.tiling import tile
from chunkwise.codegen.verify import verify_tiled, verify_tiles
from chunkwise.dsl.errors import InvalidIR
from chunkwise.dsl.library import by_name

_Q, _K, _V = (ir.token(n, (a,)) for n, a in (("q", Axis.K), ("k", Axis.K), ("v", Axis.V)))
_SCORES = ir.contract(_Q, ir.rename(_K, Axis.J), Axis.K)


@pytest.mark.parametrize(
    "wrong",
    [
        Tile(TileOp.DOT, (_Q, _V), (Axis.K,), (Axis.I, Axis.V)),  # shares I, which is not summed
        Tile(TileOp.DOT, (_Q, _K), (Axis.K,), (Axis.I,)),  # a sum of rows, not a matrix product
        Tile(TileOp.SUM, (_Q,), ((Axis.V,),), (Axis.I, Axis.K)),  # an axis that is not there
        Tile(TileOp.CUMSUM, (ir.rename(_Q, Axis.J),), (False, False), (Axis.J, Axis.K)),
        Tile(TileOp.INVERSE, (_Q,), (), (Axis.I, Axis.K)),
        Tile(TileOp.RENAME, (_SCORES,), (Axis.J,), (Axis.J,)),  # has both time axes
        Tile(TileOp.EXPAND, (_Q,), ((Axis.I,),), (Axis.I,)),
        ir.mul(_SCORES, _Q),  # three axes
    ],
    ids=lambda t: t.op.name,
)
def test_a_tile_that_its_op_does_not_make(wrong: Tile) -> None:
    with pytest.raises(InvalidIR, match="please report"):
        verify_tiles(ChunkProgram(((output("o"), wrong),), ()))


def test_a_product_that_the_notation_cannot_express() -> None:
    with pytest.raises(InvalidIR, match="two C x C tiles"):
        ir.contract(_SCORES, _SCORES, Axis.J)


def _tiled(name: str, kernel: str) -> TiledKernel:
    form, plan = by_name(name).normal_form(), Plan(Hoist.ALL)
    kernels = (*forward_program(form, plan).kernels, *backward_program(form, plan).kernels)
    (found,) = (k for k in kernels if k.name == kernel)
    signature = Signature(Dims(20, 36), Dtype.BFLOAT16, (), Precision.TF32X3)
    return tile(found, signature, Tiles(16, v=16, k=256))


def _changed(kernel: TiledKernel, kind: type, change: Callable[[Any], Any]) -> TiledKernel:
    """The kernel with the first statement of that kind that `change` changes changed, or gone."""
    parts = {}
    done = False
    for phase in ("before", "inside", "after"):
        made = []
        for s in getattr(kernel, phase):
            new = change(s) if isinstance(s, kind) and not done else s
            done = done or new != s
            made += [] if new is None else [new]
        parts[phase] = tuple(made)
    assert done, "nothing to change"
    return replace(kernel, **parts)


def _without_mask(s: Any) -> Any:
    return replace(s, mask=())


def _unclean(s: Any) -> Any:
    if isinstance(s, Product):
        return replace(s, left=s.left._replace(clean=()))
    return replace(s, args=tuple(u._replace(clean=()) for u in s.args))


_SCAN, _SUMS = ("gated_delta_rule", "forward_scan"), ("gated_delta_rule", "backward_gradients")
_CHANGES: dict[str, tuple[tuple[str, str], type, Callable[[Any], Any]]] = {
    "a load without a mask": (_SCAN, Load, _without_mask),
    "a store without a mask": (_SCAN, Store, _without_mask),
    "a final state without a mask": (_SCAN, Finish, _without_mask),
    "a value that nobody loads": (_SCAN, Load, lambda s: None),
    "a carry that stays": (_SCAN, Advance, lambda s: None),
    "a product of other rows": (_SCAN, Product, lambda s: replace(s, left=s.right, right=s.left)),
    "a store by all parts of V": (_SCAN, Store, lambda s: replace(s, once=True)),
    "a sum that is not begun": (_SUMS, Zero, lambda s: None),
    "a sum of the last tile": (_SUMS, Product, lambda s: replace(s, adds=False)),
    "decayed padding": (("hgrn2", "backward_prep"), Compute, _unclean),
    "a product over padding": (("hgrn2", "forward_post"), Product, _unclean),
}  # fmt: skip


@pytest.mark.parametrize("what", _CHANGES)
def test_a_kernel_that_loses_something(what: str) -> None:
    (name, kernel), kind, change = _CHANGES[what]
    found = _tiled(name, kernel)
    verify_tiled(found)
    with pytest.raises(InvalidIR, match=kernel):
        verify_tiled(_changed(found, kind, change))
