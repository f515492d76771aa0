"""One token at a time, for decoding: by a kernel, or by an op where torch must see what happens.

A decoder repeats the layout of the token before, so what a layout takes is worked out once; a call
then goes to the kernel, past torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dsl import errors
from ..dsl.ir import Per
from .call import PLAIN, Call, Places, Pool, Static, arrange, describe, initial_states, places_of
from .check import asked, check_accepted, check_slots
from .engines import EngineName, engine_of_environment, load
from .pool import MOST_TOKENS, check_integers, with_pool
from .prepared import Records, Run, Values, chosen, prepare_step

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
        self._records: Records[_Kept] = Records()
        self._pools: Records[_Kept] = Records()
        self._no_states = (None,) * len(declaration.states)
        # axes of operands of tokens, with that of time
        self._axes = {x.name: len(x.axes) for x in declaration.operands if x.per is Per.TOKEN}

    def one(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        engine: str | None,
    ) -> tuple[Tensor, States]:
        """`(o, new state)` of one token; the state is computed and returned as a call would.

        The operands come without T (`[B,H,K]`), or all of them with T, which several tokens have:
        then as `kept`. `engine` must serve.

        Raises: what a call raises, in terms of T = 1. EngineUnavailable: the named engine has no
        kernel for this step, or gradients are wanted of it.
        """
        if torch.compiler.is_compiling():
            return self._by_op(args, named, state, engine)
        values = [*args, *named.values()]
        if state is None:
            values += self._no_states
        elif isinstance(state, Tensor) or not isinstance(state, (list, tuple)):
            values.append(state)
        else:
            values += state
        usual = self._usual
        if engine is None and usual is None:
            usual = engine_of_environment()
        rest = (engine, usual, torch.is_grad_enabled(), len(args), *named)
        kept = self._records.latest(values, rest) if forward_ad._current_level < 0 else None
        if kept is None:  # a new layout
            if self._several(args, named):
                return self.kept(args, named, state, None, None, engine)
            if _watched() or not all(map(_lies_open, values)):
                if engine is not None:
                    self._refuse_to_record(self._checked(args, named, state)[0], engine)
                return self._by_op(args, named, state, engine)
            prepare = partial(self._prepare, args, named, state, engine, usual)
            kept = self._records.find(values, rest, prepare)
        values += kept.floats
        made = kept.run(values)
        return made[0], (made[1] if len(made) == 2 else tuple(made[1:]))

    def kept(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        indices: Tensor | None,
        accepted: Tensor | None,
        engine: str | None,
    ) -> tuple[Tensor, States]:
        """`(o, states)` of up to `MOST_TOKENS` tokens, with the state after each, or with a pool.

        Raises: as a call of this; BadSlots: an index is no slot, or one of two sequences.
        """
        if indices is not None:
            return self._in_pool(args, named, state, indices, accepted, engine)
        if not torch.compiler.is_compiling():
            self._checked(args, named, None)
        operands, params, static, has_time = self._arranged(args, named)
        self._refuse_many(operands)
        states = initial_states(self._declaration, state)
        if accepted is not None:
            states = tuple(None if x is None else _after(x, accepted) for x in states)
        given, outputs, series = {**params, **dict(static)}, [], []
        for t in range(operands[next(iter(self._axes))].shape[1]):
            token = [x[:, t : t + 1] if n in self._axes else x for n, x in operands.items()]
            o, new = self.one(token, given, states, engine)
            states = (new,) if isinstance(new, Tensor) else new
            outputs.append(o)
            series.append(states)
        o = torch.cat(outputs, 1) if has_time else outputs[0][:, 0]
        each = tuple(torch.stack(x, 1) for x in zip(*series, strict=True))
        return o, (each[0] if len(each) == 1 else each)

    def _in_pool(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        indices: Tensor,
        accepted: Tensor | None,
        engine: str | None,
    ) -> tuple[Tensor, States]:
        states = tuple(x for x in initial_states(self._declaration, state) if x is not None)
        if len(states) < len(self._no_states):
            what = "a pool", "[slots,HV,K,V] where state_indices are given"
            raise errors.MissingOperand("state", *what, op=self._declaration.name)
        same: States = states[0] if isinstance(state, Tensor) else states
        pool = Pool(states, indices, accepted)
        if torch.compiler.is_compiling() or _watched():
            return self._in_pool_by_op(args, named, pool, engine), same
        values = [*args, *named.values(), *pool.tensors]
        usual = self._usual
        if engine is None and usual is None:
            usual = engine_of_environment()
        rest = (engine, usual, torch.is_grad_enabled(), len(args), *named)
        found = self._pools.latest(values, rest)
        if found is None:
            if not all(map(_lies_open, values)):
                return self._in_pool_by_op(args, named, pool, engine), same
            prepare = partial(self._prepare, args, named, None, engine, usual, pool)
            found = self._pools.find(values, rest, prepare)
        if indices.device.type == "cpu" or asked():
            check_slots(pool)
        (o,) = found.run([*values, *found.floats])
        torch.autograd.graph.increment_version([x for x in states if not x.is_inference()])
        return o, same

    def _in_pool_by_op(
        self, args: Sequence[Any], named: Mapping[str, Any], pool: Pool, engine: str | None
    ) -> Tensor:
        """The output, by a node of graphs that changes the pool."""
        operands, params, static, has_time = self._arranged(args, named)
        self._refuse_many(operands)
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (*operands.values(), *pool.states)
        ):
            raise errors.EngineUnavailable(
                chosen(operands.values(), engine or self._declared).value,
                "states of a pool are overwritten: a step in place has no gradient",
                help="call it under torch.no_grad(), or pass the states themselves",
            )
        numbers = (*params.values(), *(number for _, number in static))
        name = engine or self._declared
        o: Tensor = self._ops.pooled(*operands.values(), *pool.tensors, *numbers, name)
        return o if has_time else o[:, 0]

    def _prepare(
        self,
        args: Sequence[Any],
        named: Mapping[str, Any],
        state: Given,
        engine: str | None,
        usual: str | None,
        pool: Pool | None = None,
    ) -> _Kept:
        call, has_time = self._checked(args, named, state)
        call = call if pool is None else with_pool(call, pool)
        places = places_of(call, given=self._names(args, named), time=has_time)
        made = prepare_step(call, engine, usual, places)
        run = self._past_kernels(call, places, engine) if made is None else made.run
        return _Kept(run, list(call.params.values()))

    def _past_kernels(self, call: Call, places: Places, engine: str | None) -> Run:
        """What passes such values to the op, where no kernel serves them."""
        lacking = () if places.time else self._axes  # operands without a time axis
        operands = [(at, name in lacking) for name, at in places.operands.items()]
        states, floats = [*places.states.values()], [*places.params.values()]
        rest = (*(number for _, number in call.static), engine or self._declared)

        def run(values: Values) -> list[Tensor]:
            o, *new = self._ops.step(
                *[values[at].unsqueeze(1) if short else values[at] for at, short in operands],
                *[values[at] for at in states],
                None,
                *[values[at] for at in floats],
                *rest,
            )
            return [o if places.time else o[:, 0], *new]

        return run

    def _names(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[str]:
        """The names of operands and numbers, as they are given."""
        declared = self._declaration.operands
        return [*(x.name for x, _ in zip(declared, args, strict=False)), *named]

    def _checked(
        self, args: Sequence[Any], named: Mapping[str, Any], state: Given
    ) -> tuple[Call, bool]:
        operands, params, static, has_time = self._arranged(args, named)
        initial = initial_states(self._declaration, state)
        call = describe(self._declaration, operands, params, initial, None, static)
        self._refuse_many(operands)
        return call, has_time

    def _arranged(
        self, args: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, float], Static, bool]:
        """Operands with a time axis, floats, static numbers; whether that axis was given."""
        operands, params, static = arrange(self._declaration, args, named)
        axes = self._axes
        if all(operands[n].ndim == ndim for n, ndim in axes.items()):
            return operands, params, static, True
        with_time = {n: x.unsqueeze(1) if n in axes else x for n, x in operands.items()}
        return with_time, params, static, False

    def _several(self, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether these are operands of more than one token."""
        given = dict(zip(self._names(args, named), (*args, *named.values()), strict=False))
        tensors = {n: x for n, x in given.items() if n in self._axes and isinstance(x, Tensor)}
        return all(x.ndim == self._axes[n] and x.shape[1] > 1 for n, x in tensors.items())

    def _refuse_many(self, operands: dict[str, Tensor]) -> None:
        for name in self._axes:
            if not 1 <= operands[name].shape[1] <= MOST_TOKENS:
                raise errors.BadShape(
                    name,
                    operands[name].shape,
                    f"1 to {MOST_TOKENS} tokens, or no T axis",
                    help="call the recurrence itself for more tokens (output_final_state=True)",
                )

    def _by_op(
        self, args: Sequence[Any], named: Mapping[str, Any], state: Given, engine: str | None
    ) -> tuple[Tensor, States]:
        """The step as one node that torch differentiates, transforms and compiles."""
        if not torch.compiler.is_compiling():
            self._checked(args, named, state)
        operands, params, static, has_time = self._arranged(args, named)
        if has_time and self._several(args, named):
            return self.kept(args, named, state, None, None, engine)
        self._refuse_many(operands)
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
    """What serves a layout, and the floats that follow the values which it is given."""

    run: Run
    floats: list[float]


def _after(states: Tensor, accepted: Tensor) -> Tensor:
    """Of states after each of several tokens `[B,W,HV,K,V]` those after so many of them, `[B]`."""
    check_integers("num_accepted", accepted, states.device)
    if states.ndim < 3 or accepted.shape != states.shape[:1]:
        expected = "[B], for states [B,W,HV,K,V]"
        raise errors.BadShape("num_accepted", accepted.shape, expected)
    W = states.shape[1]
    if accepted.device.type == "cpu" and not torch.compiler.is_compiling():
        check_accepted(accepted, W)
    sequences = torch.arange(len(states), dtype=torch.int64, device=states.device)
    return states[sequences, accepted.long().clamp(1, W) - 1]


def _watched() -> bool:
    """Whether somebody looks at what torch computes: a transform, a mode."""
    return (
        torch._C._are_functorch_transforms_active()
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
