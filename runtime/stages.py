"""Runs a recurrence as calls of simpler ones (dsl/stages): what lies between them is torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codegen.refusals import refusals
from ..dsl import oracle
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Node, Op, operands_of, topological
from ..dsl.normal_form import NormalForm, Write, result_leaf, results_of
from ..dsl.stages import Lag, Made, Stage, stages_of
from ..dsl.step import param_leaf
from .call import Call
from .engines import EngineName
from .prepared import chosen

if TYPE_CHECKING:
    from .recurrence import Recurrence

Tensors = Mapping[str, Tensor]


class Stages:
    """The calls that take the place of one of a recurrence, each a recurrence of its own."""

    def __init__(self, form: NormalForm, stages: Sequence[tuple[Stage, Recurrence]]) -> None:
        self._form, self._stages = form, tuple(stages)
        self._has_lags = any(stage.lags for stage, _ in stages)
        self._inputs = {m: _inputs(form, m.value) for stage, _ in stages for m in stage.made}
        writes = [w for stage, _ in stages for lag in stage.lags for w in lag.writes]
        self._written = {w: _inputs(form, w.key, *_values(w)) for w in writes}

    def takes(self, call: Call, engine: str | None, *, finals: bool) -> bool:
        """Whether it takes the place of a call: on a GPU; with states of lags, if it is dense."""
        if chosen(call.operands.values(), engine) is not EngineName.TRITON:
            return False
        dense = call.cu_seqlens is None or not (finals or any(x is not None for x in call.initial))
        return 0 not in (call.B, call.T, call.HV) and (dense or not self._has_lags)

    def __call__(
        self, call: Call, *, finals: bool, **options: Any
    ) -> tuple[Any, Tensor | tuple[Tensor, ...] | None]:
        """The outputs, and the final states if they are asked for."""
        operands, params, cu_seqlens = call.operands, call.params, call.cu_seqlens
        names = [s.name for s in self._form.states]
        before = dict(zip(names, call.initial, strict=True))
        after: dict[str, Tensor] = {}
        results: dict[int, Tensor] = {}
        o: Any = None
        for stage, op in self._stages:
            given: dict[str, Any] = {
                o.name: operands[o.name] for o in op.declaration.operands if o.name in operands
            }
            made = {m: self._value(m, call, results) for m in stage.made}
            given |= {
                m.operand.name: _ahead(x, cu_seqlens) if m.ahead else x for m, x in made.items()
            }
            first = dict(before)
            for lag in stage.lags:
                first[lag.into] = _with_lag(first[lag.into], first[lag.state], made[lag.factor])
            given |= {p.name: params[p.name] for p in op.declaration.params}
            states = tuple(first[name] for name in stage.states)
            o, ends = op(
                **given,
                initial_state=None if all(x is None for x in states) else states,
                output_final_state=finals,
                cu_seqlens=cu_seqlens,
                **options,
            )
            if finals:
                last = ends if isinstance(ends, tuple) else (ends,)
                after |= {n: x for n, x in zip(stage.states, last, strict=True) if x is not None}
                after |= {lag.state: self._lag(lag, call) for lag in stage.lags}
            outputs = o if isinstance(o, tuple) else (o,)
            results |= dict(zip(stage.reads, outputs, strict=False))
        return o, tuple(after[name] for name in names) if finals else None

    def _value(self, made: Made, call: Call, results: Mapping[int, Tensor]) -> Tensor:
        """What a stage is given, in the dtype of what it is made of, gates in float32."""
        node, form = made.value, self._form
        below = {n: results[n] for n in results_of(node)}
        scores = _of_softmax(node)
        if scores is not None and scores.op is Op.RESULT:
            return torch.softmax(below[results_of(scores)[0]], -1)
        env = self._inputs[made](call, call.operands)
        wide = next(iter(env.values())).dtype if env else torch.float32
        env |= {result_leaf(form, n): x.to(wide) for n, x in below.items()}
        if scores is not None:
            (x,) = oracle.evaluate([scores], env)
            env[node] = torch.softmax(x, -1)
        (x,) = oracle.evaluate([node], env)
        if made.decays or node.kind is Kind.SCALAR or not below:
            return x
        return x.to(next(iter(below.values())).dtype)

    def _lag(self, lag: Lag, call: Call) -> Tensor:
        """What the last token wrote."""
        last = dict(call.operands)
        last |= {n: x[:, -1:] for n, x in last.items() if n in self._tokens}
        parts = []
        for w in lag.writes:
            env = self._written[w](call, last)
            key, value = oracle.evaluate([w.key, *_values(w)], env)
            if w.key.kind is not Kind.KEY:
                key, value = value, key
            parts.append(key.unsqueeze(-1) * value.unsqueeze(-2))
        return torch.stack(parts).sum(0).squeeze(1)

    @property
    def _tokens(self) -> set[str]:
        return {o.name for o in self._form.operands if o.axes[0] == "B"}


def stages(declaration: Declaration, made: Callable[[Declaration], Recurrence]) -> Stages | None:
    """The stages of a recurrence, whose recurrences `made` makes; None where it is one call."""
    if declaration.any_step or declaration.has_micro or declaration.statics:
        return None
    form = declaration.normal_form()
    found = stages_of(form)
    if any(True for s in found for _ in refusals(s.declaration.normal_form())):
        return None
    return Stages(form, [(s, made(s.declaration)) for s in found]) if found else None


def _values(w: Write) -> list[Node]:
    return [] if w.value is None else [w.value]


class _Inputs:
    """The leaves of some expressions, as tensors."""

    def __init__(self, form: NormalForm, nodes: Sequence[Node]) -> None:
        names = operands_of(*nodes)
        below = set(topological(*nodes))
        self._of = replace(
            form,
            operands=tuple(o for o in form.operands if o.name in names),
            params=tuple(p for p in form.params if param_leaf(p) in below),
        )

    def __call__(self, call: Call, operands: Tensors) -> dict[Node, Tensor]:
        own = [operands[o.name] for o in self._of.operands]
        wide = torch.float64 if any(x.dtype is torch.float64 for x in own) else torch.float32
        return oracle.leaves(self._of, operands, call.params, wide, {"HV": call.HV, "n": 1})


def _inputs(form: NormalForm, *nodes: Node) -> _Inputs:
    return _Inputs(form, nodes)


def _of_softmax(node: Node) -> Node | None:
    """The scores of which `node` is the softmax, exp(x) / sum(exp(x)), if it is one."""
    if node.op is not Op.DIV:
        return None
    top, bottom = node.args
    return (
        top.args[0]
        if top.op is Op.EXP and bottom == Node(Op.SUM, (top,), (), Kind.SCALAR)
        else None
    )


def _ahead(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[B,T,HV]` of the next token; 0 where a sequence ends."""
    moved = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)
    if cu_seqlens is None:
        return moved
    at = torch.arange(1, x.shape[1] + 1, dtype=cu_seqlens.dtype, device=x.device)
    ends = torch.isin(at, cu_seqlens.to(x.device))
    return torch.where(ends[None, :, None], 0.0, moved)


def _with_lag(state: Tensor | None, lag: Tensor | None, factor: Tensor) -> Tensor | None:
    """A state with what its lag will add at the first token."""
    if lag is None:
        return state
    added = factor[:, 0, :, None, None] * lag
    return added if state is None else state + added
