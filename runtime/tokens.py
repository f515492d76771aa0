"""Calls as kernels of the token form take them: what micro-steps have, as tensors of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codegen.token import row_names
from ..dsl.ir import Per

if TYPE_CHECKING:
    from ..dsl.normal_form import Operand
    from .call import Call

# from the values of a step, operands and states, to its output and new states
Serve = Callable[[Sequence[object]], tuple[Tensor, Tensor | tuple[Tensor, ...]]]
Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Token:
    """A step of one layout, to be served again and again.

    Attributes:
        call: a call of it, with a time axis of 1.
        places: where each operand stands among the values of a step.
        first_state: where the states begin; one that is None stands there too.
        has_time: whether the values of tokens have a time axis.
    """

    call: Call
    places: dict[str, int]
    first_state: int
    has_time: bool

    def filled(self, values: Sequence[Any]) -> Call:
        """The call of these values."""
        operands = {}
        for o in self.call.step.operands:
            x = values[self.places[o.name]]
            operands[o.name] = x if self.has_time or o.per is Per.HEAD else x.unsqueeze(1)
        count = len(self.call.initial)
        initial = tuple(values[self.first_state : self.first_state + count])
        return replace(self.call, operands=operands, initial=initial)

    def source(self, name: str) -> tuple[int, Convert | None]:
        """The place of a tensor that a kernel takes, and what makes it `[B,H,channels]` there."""
        for o in self.call.step.operands:
            names = row_names(o, self.call.micro)
            if name in names:
                return self.places[o.name], self._converted(o, names.index(name))
        raise KeyError(name)

    def _converted(self, o: Operand, index: int) -> Convert | None:
        per_token = o.per is Per.TOKEN
        x = self.call.operands[o.name]
        gaps = x.stride(-1) != 1 and (o.kind.value != "" or not per_token)
        if not gaps and not (per_token and (self.has_time or o.micro)):
            return None

        def convert(x: Tensor) -> Tensor:
            if per_token and self.has_time:
                x = x.select(1, 0)
            if o.micro:
                x = x.select(1, index)
            return x.contiguous() if gaps else x

        return convert

    def state(self, index: int) -> tuple[int, Convert | None]:
        """The place of a first state, and what makes it float32 without gaps there."""
        given = self.call.initial[index]
        shape = self.call.state_shape(self.call.step.states[index])
        place = self.first_state + index
        if given is None:
            device = self.call.device
            return place, lambda _: torch.zeros(shape, dtype=torch.float32, device=device)
        if given.dtype is torch.float32 and given.is_contiguous():
            return place, None
        return place, lambda x: x.float().contiguous()


def of_tokens(call: Call) -> Call:
    """`call` with the tensors of micro-steps apart, `[B,T,n,...]` as n of `[B,T,...]`."""
    if not any(o.micro for o in call.step.operands):
        return call
    operands: dict[str, Tensor] = {}
    for o in call.step.operands:
        names = row_names(o, call.micro)
        x = call.operands[o.name]
        operands |= dict(zip(names, x.unbind(2), strict=True)) if o.micro else {o.name: x}
    return replace(call, operands=operands)
