"""One token at a time, for decoding: by a kernel, or by an op where torch must see what happens.

A decoder repeats the layout of the token before, so what a layout takes is worked out once; a call
then goes to the kernel, past torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dsl import errors
from ..dsl.ir import Per
from .call import PLAIN, Call, Places, arrange, describe, initial_states
from .engines import EngineName, engine_of_environment, load
from .prepared import Records, Run, chosen, prepare_step

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration
    from .ops import Ops

States = Tensor | tuple[Tensor, ...]
Given = Tensor | Sequence[Tensor | None] | None


class Stepper:
    """The steps of a recurrence; `usual` names the engine of its calls, which need not serve."""

    def __init__(self, declaration: Declaration, ops: Ops, usual: str | None) -> None:
        self._declaration, self._ops, self._usual = declaration, ops, usual
        # an op's engine must serve, which of the usual ones only the reference always does
        self._declared = usual if usual == EngineName.REFERENCE.value else None
        self._records: Records[_Kept | None] = Records()
        self._no_states = (None,) * len(declaration.states)
        # axes of operands of tokens, with that of time
        self._axes = {x.name: len(x.axes) for x in declaration.operands if x.per is Per.TOKEN}

    def __call__(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        engine: str | None,
    ) -> tuple[Tensor, States]:
        """`(o, new state)` of one token; the state is computed and returned as a call would.

        The operands come without T (`[B,H,K]`), or all of them with T = 1. `engine` must serve.

        Raises: what a call raises, in terms of T = 1. EngineUnavailable: the named engine has no
        kernel for this step, or gradients are wanted of it.
        """
        if torch.compiler.is_compiling():
            return self._by_op(args, named, state, engine)
        values = [*args, *named.values()]
        if isinstance(state, (list, tuple)):
            values += state
        elif state is None:
            values += self._no_states
        else:
            values.append(state)
        usual = self._usual
        if engine is None and usual is None:
            usual = engine_of_environment()
        rest = (engine, usual, torch.is_grad_enabled(), len(args), *named)
        kept = self._records.latest(values, rest) if forward_ad._current_level < 0 else None
        if kept is None:  # a new layout, or one that no kernel serves
            if _watched() or not all(map(_lies_open, values)):
                if engine is not None:
                    self._refuse_to_record(self._checked(args, named, state)[0], engine)
                return self._by_op(args, named, state, engine)
            kept = self._records.find(
                values, rest, lambda: self._prepare(args, named, state, engine, usual)
            )
            if kept is None:
                return self._by_op(args, named, state, engine)
        values += kept.floats
        made = kept.run(values)
        return made[0], (made[1] if len(made) == 2 else tuple(made[1:]))

    def _prepare(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        engine: str | None,
        usual: str | None,
    ) -> _Kept | None:
        call, has_time = self._checked(args, named, state)
        names = [*(x.name for x, _ in zip(call.step.operands, args, strict=False)), *named]
        states = [s.name for s in call.step.states]
        after = len(names) + len(states)
        places = Places(
            operands={n: names.index(n) for n in call.operands},
            states={n: len(names) + i for i, n in enumerate(states)},
            params={n: after + i for i, n in enumerate(call.params)},
            time=has_time,
        )
        made = prepare_step(call, engine, usual, places)
        return None if made is None else _Kept(made.run, list(call.params.values()))

    def _checked(
        self, args: Sequence[Any], named: Mapping[str, Any], state: Given
    ) -> tuple[Call, bool]:
        operands, params, static = arrange(self._declaration, args, named)
        operands, has_time = self._with_time(operands)
        initial = initial_states(self._declaration, state)
        call = describe(self._declaration, operands, params, initial, None, static)
        self._refuse_several(operands)
        return call, has_time

    def _with_time(self, operands: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The operands with a time axis, and whether they came with one."""
        axes = self._axes
        if all(operands[n].ndim == ndim for n, ndim in axes.items()):
            return operands, True
        return {n: x.unsqueeze(1) if n in axes else x for n, x in operands.items()}, False

    def _refuse_several(self, operands: dict[str, Tensor]) -> None:
        for name in self._axes:
            if operands[name].shape[1] != 1:
                raise errors.BadShape(
                    name,
                    operands[name].shape,
                    "one token: T = 1, or no T axis",
                    help="call the recurrence itself for several tokens (output_final_state=True)",
                )

    def _by_op(
        self, args: Sequence[Any], named: Mapping[str, Any], state: Given, engine: str | None
    ) -> tuple[Tensor, States]:
        """The step as one node that torch differentiates, transforms and compiles."""
        if not torch.compiler.is_compiling():
            self._checked(args, named, state)
        operands, params, static = arrange(self._declaration, args, named)
        operands, has_time = self._with_time(operands)
        self._refuse_several(operands)
        initial = initial_states(self._declaration, state)
        o, *new = self._ops.step(
            *operands.values(),
            *initial,
            None,
            *params.values(),
            *[number for _, number in static],
            engine or self._declared,
        )
        return (o if has_time else o[:, 0]), (new[0] if len(new) == 1 else tuple(new))

    def _refuse_to_record(self, call: Call, engine: str) -> None:
        serving = load(chosen(call.operands.values(), engine))
        if serving.has_steps:
            raise errors.EngineUnavailable(
                serving.name.value,
                "its kernels take tensors as they lie in memory: they have no gradient of a single "
                "step, torch.func does not see them, and nothing is negated when it is read",
                help="call step under torch.no_grad() (with x.resolve_neg() where x.is_neg()), or "
                "name no engine: torch then does it",
            )


@dataclass(frozen=True, slots=True)
class _Kept:
    """The kernel of a layout, and the floats that follow the values which it is given."""

    run: Run
    floats: list[float]


def _watched() -> bool:
    """Whether somebody looks at what torch computes: a transform, a mode."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _lies_open(x: object) -> bool:
    """Whether a kernel may read `x`: its numbers are those in its memory, and not recorded."""
    return not isinstance(x, Tensor) or (
        type(x) in PLAIN
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and not x.is_nested
        and not (torch.is_grad_enabled() and x.requires_grad)
    )
