"""Runs a recurrence as calls of simpler ones (dsl/stages): what lies between them is torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codegen.refusals import refusals
from ..dsl import oracle
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Node, Op, Per, operands_of, topological
from ..dsl.normal_form import NormalForm, Operand, Param, result_leaf, results_of
from ..dsl.stages import Lag, Made, Stage, stages_of
from ..dsl.step import operand_leaf, param_leaf
from .call import Call
from .engines import EngineName
from .prepared import chosen

if TYPE_CHECKING:
    from .recurrence import Recurrence

Tensors = Mapping[str, Tensor]


class Stages:
    """The calls that take the place of one of a recurrence, each a recurrence of its own."""

    def __init__(self, form: NormalForm, stages: Sequence[tuple[Stage, Recurrence]]) -> None:
        self._names = [s.name for s in form.states]
        self._tokens = [o.name for o in form.operands if o.per is Per.TOKEN]
        self._stages = tuple(_Run(form, stage, op) for stage, op in stages)
        self._has_lags = any(stage.lags for stage, _ in stages)

    def __str__(self) -> str:
        return ", then of ".join(repr(run.op) for run in self._stages)

    def serve(self, operands: Tensors, engine: str | None) -> bool:
        """Whether such stages are faster than one call: on a GPU."""
        return chosen(operands.values(), engine) is EngineName.TRITON

    def take(self, call: Call, *, finals: bool) -> bool:
        """Whether they take the place of a call: with states of lags, if it is dense."""
        stateless = not finals and all(x is None for x in call.initial)
        dense = call.cu_seqlens is None or stateless
        return 0 not in (call.B, call.T, call.HV) and (dense or not self._has_lags)

    def __call__(
        self, call: Call, *, finals: bool, **options: Any
    ) -> tuple[Any, Tensor | tuple[Tensor, ...] | None]:
        """The outputs, and the final states if they are asked for."""
        if torch.is_autocast_enabled(call.device.type):  # it may change no dtype within a call
            with torch.autocast(call.device.type, enabled=False):
                return self(call, finals=finals, **options)
        before = dict(zip(self._names, call.initial, strict=True))
        after: dict[str, Tensor] = {}
        results: dict[int, Tensor] = {}
        last = dict(call.operands)
        if finals and self._has_lags:
            last |= {n: last[n][:, -1:] for n in self._tokens}
        o: Any = None
        for run in self._stages:
            given: dict[str, Any] = {n: call.operands[n] for n in run.operands}
            given |= {n: call.params[n] for n in run.params}
            made = [m.value(call, results) for m in run.made]
            for m, x in zip(run.made, made, strict=True):
                given[m.name] = _ahead(x, call.cu_seqlens) if m.ahead else x
            first = dict(before)
            for lag in run.lags:
                first[lag.into] = _with_lag(first[lag.into], first[lag.name], made[lag.factor])
            states = tuple(first[name] for name in run.states)
            o, ends = run.op(
                **given,
                initial_state=None if all(x is None for x in states) else states,
                output_final_state=finals,
                cu_seqlens=call.cu_seqlens,
                **options,
            )
            if finals:
                found = ends if isinstance(ends, tuple) else (ends,)
                after |= {n: x for n, x in zip(run.states, found, strict=True) if x is not None}
                after |= {lag.name: lag.value(call, last) for lag in run.lags}
            outputs = o if isinstance(o, tuple) else (o,)
            results |= dict(zip(run.reads, outputs, strict=False))
        cast = tuple(x.to(call.dtype) for x in outputs)  # the last stage may lead with another
        o = cast if isinstance(o, tuple) else cast[0]
        return o, tuple(after[name] for name in self._names) if finals else None


def stages(declaration: Declaration, made: Callable[[Declaration], Recurrence]) -> Stages | None:
    """The stages of a recurrence, whose recurrences `made` makes; None where it is one call."""
    if declaration.any_step or declaration.has_micro or declaration.statics:
        return None
    form = declaration.normal_form()
    found = stages_of(form)
    if any(True for s in found for _ in refusals(s.declaration.normal_form())):
        return None
    return Stages(form, [(s, made(s.declaration)) for s in found]) if found else None


class _Run:
    """A stage with what it needs, by names."""

    def __init__(self, form: NormalForm, stage: Stage, op: Recurrence) -> None:
        self.op, self.states, self.reads = op, stage.states, stage.reads
        self.made = [_Made(form, m) for m in stage.made]
        own = {m.name for m in self.made}
        self.operands = [o.name for o in op.declaration.operands if o.name not in own]
        self.params = [p.name for p in op.declaration.params]
        self.lags = [_Lag(form, lag, stage.made.index(lag.factor)) for lag in stage.lags]


class _Made:
    """An operand that is made."""

    def __init__(self, form: NormalForm, made: Made) -> None:
        self.name, self.ahead = made.operand.name, made.ahead
        self._narrow = not made.decays and made.value.kind is not Kind.SCALAR
        self._below = results_of(made.value)
        scores = _of_softmax(made.value)
        self._is_softmax = scores is not None
        self._alone = scores is not None and scores.op is Op.RESULT
        self._expression = _Expressions(form, [made.value if scores is None else scores])

    def value(self, call: Call, results: Mapping[int, Tensor]) -> Tensor:
        """In the dtype of the results that it is made of; numbers and gates in float32."""
        below = {n: results[n] for n in self._below}
        if self._alone:
            return torch.softmax(below[self._below[0]], -1)
        (x,) = self._expression(call, call.operands, below)
        x = torch.softmax(x, -1) if self._is_softmax else x
        return x.to(below[self._below[0]].dtype) if self._narrow and below else x


class _Lag:
    """A state that was taken out; `factor`: the number of what it is added by."""

    def __init__(self, form: NormalForm, lag: Lag, factor: int) -> None:
        self.name, self.into, self.factor = lag.state, lag.into, factor
        pairs = [(w.key, w.value) for w in lag.writes if w.value is not None]
        self._pairs = [
            _Expressions(form, pair if pair[0].kind is Kind.KEY else pair[::-1]) for pair in pairs
        ]

    def value(self, call: Call, last: Tensors) -> Tensor:
        """`[B,HV,K,V]`: what the last token wrote."""
        pairs = [pair(call, last, {}) for pair in self._pairs]
        written = [key.unsqueeze(-1) * value.unsqueeze(-2) for key, value in pairs]
        return torch.stack(written).sum(0).squeeze(1)


class _Expressions:
    """Some expressions, in order: what torch.compile traces has no expression to look up."""

    def __init__(self, form: NormalForm, nodes: Sequence[Node]) -> None:
        order = topological(*nodes)
        number = {node: n for n, node in enumerate(order)}
        leaves: dict[Node, Operand | Param | int] = {operand_leaf(o): o for o in form.operands}
        leaves |= {param_leaf(p): p for p in form.params}
        leaves |= {result_leaf(form, n): n for n in results_of(*nodes)}
        self._order = [
            (leaves.get(node), node, tuple(number[a] for a in node.args)) for node in order
        ]
        self._ends = [number[node] for node in nodes]
        names = operands_of(*nodes)
        self._operands = [o.name for o in form.operands if o.name in names]

    def __call__(
        self, call: Call, operands: Tensors, results: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """Their values, `[B,T,HV,...]`, in float32, or float64 where something below is."""
        below = [operands[name] for name in self._operands] + [*results.values()]
        double = any(x.dtype is torch.float64 for x in below)
        wide = torch.float64 if double else torch.float32
        device = next(iter(operands.values())).device
        values: list[Tensor] = []
        for leaf, node, arguments in self._order:
            if isinstance(leaf, Operand):
                x = operands[leaf.name].to(wide)
                x = x[None, None] if leaf.per is Per.HEAD else x
                axis = -1 - len(leaf.kind.axes)
                repeats = call.HV // x.shape[axis]
                values.append(x if repeats == 1 else x.repeat_interleave(repeats, axis))
            elif isinstance(leaf, Param):
                values.append(torch.full((), call.params[leaf.name], dtype=wide, device=device))
            elif isinstance(leaf, int):
                values.append(results[leaf].to(wide))
            elif node.op is Op.CONST:
                number: Any = node.attrs[0]
                values.append(torch.full((), number, dtype=wide, device=device))
            else:
                values.append(oracle.apply(node, [values[n] for n in arguments]))
        return [values[n] for n in self._ends]


def _of_softmax(node: Node) -> Node | None:
    """The scores of which `node` is the softmax, exp(x) / sum(exp(x)), if it is one."""
    if node.op is not Op.DIV:
        return None
    top, bottom = node.args
    is_one = top.op is Op.EXP and bottom == Node(Op.SUM, (top,), (), Kind.SCALAR)
    return top.args[0] if is_one else None


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
