"""FLOPs of recurrences for torch's own counter, which knows no products within an opaque op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...codegen.config import Dims, held
from ...codegen.interface import Dtype
from ...codegen.plan import Hoist
from ...codegen.programs import backward_program, chunk_program, forward_program
from ...codegen.triton.defaults import default_config
from ...dsl import errors
from ..ops import REGISTRY, Flat

if TYPE_CHECKING:
    from ...dsl.declaration import Declaration


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What a call of each recurrence that is declared so far spends on matrix products.

    They are those of the default plan and chunk of a GPU: what it computes again counts again, and
    what a forward keeps for its backward does not. One token at a time, and steps without a chunk
    form, count as nothing.

    Returns:
        By op, for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=flop_formulas())`.
    """
    found = {}
    for declaration, ops in REGISTRY.known():
        for op, backward in ((ops.forward, False), (ops.backward, True)):
            found[op._overloadpacket] = _counter(declaration, backward=backward)
        for op, backward in ((ops.saving, False), (ops.saved_backward, True)):
            found[op._overloadpacket] = _counter(declaration, backward=backward, keeps=True)
    return found


def _counter(
    declaration: Declaration, *, backward: bool, keeps: bool = False
) -> Callable[..., int]:
    """`keeps`: of an op whose argument but one says what the forward keeps for the backward."""
    flat = Flat(declaration)
    first = 1 + flat.states if backward else 0  # the cotangents come before the inputs

    def count(*args: Any, out_val: Any = None) -> int:
        from ...codegen import cost  # SymPy takes half a second to import

        call = flat.call(args[first : first + flat.numbers + len(declaration.statics)])
        try:
            body = chunk_program(call.form)
        except errors.NotLowered:
            return 0
        dims = Dims(call.K, call.V)
        config = default_config(body, dims, wide_dtype=call.dtype == torch.float32)
        config = config.saving(Hoist(args[-2])) if keeps else config
        plan = config.backward if backward else config.forward
        program = (backward_program if backward else forward_program)(call.form, plan)
        products = cost.program_cost(program, Dtype.BFLOAT16).products
        own = held(dims, transposed=body.transposed)
        return round(cost.evaluate(products, config.chunk, own) * call.B * call.T * call.HV)

    count._get_raw = True  # type: ignore[attr-defined]  # it wants tensors, not their shapes
    return count
