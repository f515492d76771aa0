"""One token at a time: the declared step in torch, for decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..dsl import errors, oracle
from ..dsl.ir import Per
from .call import arrange, describe, initial_states

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration


def step(
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    state: Tensor | Sequence[Tensor | None] | None,
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """`(o, new state)` of one token; the state is computed and returned as a call would.

    The operands come without T (`[B,H,K]`), or all of them with T = 1.

    Raises: what a call raises, in terms of T = 1.
    """
    operands, params, static = arrange(declaration, args, named)
    per_token = [x for x in declaration.operands if x.per is Per.TOKEN]
    axes = {x.name: 3 + bool(x.kind.value) + x.micro for x in per_token}
    has_time = all(operands[n].ndim == ndim for n, ndim in axes.items())
    if not has_time:
        operands = {n: x.unsqueeze(1) if n in axes else x for n, x in operands.items()}
    call = describe(declaration, operands, params, initial_states(declaration, state), None, static)
    if call.T != 1:
        raise errors.BadShape(
            per_token[0].name,
            operands[per_token[0].name].shape,
            "one token: T = 1, or no T axis",
            help="call the recurrence itself for several tokens (output_final_state=True)",
        )
    o, new = oracle.run(call.step, operands, params, call.initial, dtype=call.state_dtype)
    o = o.to(call.dtype)
    return (o if has_time else o[:, 0]), (new[0] if len(new) == 1 else new)
