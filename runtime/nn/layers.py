"""The torch module around a declared recurrence: projections, the recurrence, a norm.

`RecurrentLayer` reads the declaration. The operands, their kinds and their roles determine its
projections, so that a new recurrence needs no new code here. Every mixer has three methods of one
meaning: `forward` takes whole sequences (packed or not), `prefill` also returns the state after
them, and `step` takes one token at a time.

Parameters are made in torch's default dtype and on its default device, like those of `nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dsl.ir import Kind, Node, Op, Per, operands_of
from ...dsl.normal_form import NormalForm, Operand
from .parts import Mixer, RMSNorm, ShortConvolution, l2norm, wide

if TYPE_CHECKING:
    from ..recurrence import Recurrence, States


class OperandRole(Enum):
    """How a layer computes an operand from the hidden vector."""

    FEATURE = "projection, short convolution, silu: queries, keys and values"
    LOG_DECAY = "projection to a log-decay <= 0"
    UNIT = "sigmoid of a projection: a step size, or a decay factor, in (0, 1)"
    RAW = "projection only: the declaration applies its own activation"


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of a `RecurrentLayer` between two tokens.

    Attributes:
        convolution: the last inputs of the short convolution, `[B, conv_size - 1, features]`.
        recurrent: the states of the recurrence; None before the first token.
    """

    convolution: Tensor
    recurrent: States | None


def _strip(node: Node) -> Node:
    """The node under promises and floors: f for `max(within(f), tiny)`."""
    while node.op in (Op.WITHIN, Op.MAXIMUM, Op.AT_LEAST):
        node = next((a for a in node.args if a.op is not Op.CONST), node.args[0])
    return node


def _decay_roles(log_decay: Node) -> dict[str, OperandRole]:
    """The roles of a log-decay's operands: in sums of `g` and `log f`; RAW in other expressions."""
    node = _strip(log_decay)
    if node.op is Op.OPERAND:
        return {str(node.attrs[0]): OperandRole.LOG_DECAY}
    if node.op is Op.ADD:
        return _decay_roles(node.args[0]) | _decay_roles(node.args[1])
    if node.op is Op.LOG and _strip(node.args[0]).op is Op.OPERAND:
        return {str(_strip(node.args[0]).attrs[0]): OperandRole.UNIT}
    return dict.fromkeys(operands_of(node), OperandRole.RAW)


def default_roles(form: NormalForm) -> dict[str, OperandRole]:
    """The role of every per-token operand, by its kind and its use in decays.

    Scalars are step sizes (UNIT), Keys and Values are features. An operand that is a log-decay or
    a decay factor is made as one; one in any other expression of a decay is RAW.

    Args:
        form: the normal form of a recurrence (`op.declaration.normal_form()`).

    Returns:
        Roles by operand name.
    """
    roles = {
        x.name: OperandRole.UNIT if x.kind is Kind.SCALAR else OperandRole.FEATURE
        for x in form.operands
        if x.per is Per.TOKEN
    }
    for _, log_decay in form.log_decays:
        decays = _decay_roles(log_decay)
        roles |= {name: role for name, role in decays.items() if name in roles}
    return roles


def log_decay_floors(form: NormalForm) -> dict[str, float]:
    """The declared lower bounds of the operands that are themselves log-decays, by name."""
    floors: dict[str, float] = {}
    for micro_step in form.micro_steps:
        for update in micro_step.updates:
            node = update.log_decay
            if (
                node is not None
                and _strip(node).op is Op.OPERAND
                and math.isfinite(update.bound.lo)
            ):
                floors[str(_strip(node).attrs[0])] = float(update.bound.lo)
    return floors


class _LogDecay(nn.Module):
    """Turns a projection into a log-decay: `-e^A softplus(x + b)`, or bounded, `floor sigmoid(x)`.

    The initial values are Mamba-2's: decays per token between about e^-0.001 and e^-1.6.
    """

    def __init__(self, heads: int, channels: int, floor: float | None) -> None:
        super().__init__()
        self.floor = floor
        self.log_rate = nn.Parameter(
            torch.empty(heads, 1, dtype=None, device=None).uniform_(1.0, 16.0).log_()
        )
        dt = (
            torch.empty(heads, channels, dtype=None, device=None)
            .uniform_(math.log(1e-3), math.log(1e-1))
            .exp()
        )
        self.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt

    def forward(self, x: Tensor) -> Tensor:
        if self.floor is not None:
            return self.floor * torch.sigmoid(wide(x) + self.bias)
        return -self.log_rate.exp() * F.softplus(wide(x) + self.bias)


class RecurrentLayer(nn.Module, Mixer):
    """A sequence mixer around a declared recurrence.

    `[B, T, hidden] -> [B, T, hidden]`: projections for every operand by its kind, short
    convolutions and silu on features, decays and step sizes by their roles, the recurrence, an
    RMS norm per value head, optionally gated, and the output projection.

    Args:
        op: the recurrence (`@cw.recurrence`, or one of `cw.library`).
        hidden: size of the token vectors.
        heads: key heads H.
        key_dim: channels K of one head's Keys.
        value_dim: channels V of one head's Values.
        value_heads: value heads HV, a multiple of H; None for H.
        conv_size: taps of the short convolution over feature operands; 0 for none.
        normalise: names of Key operands to scale to unit length, for declarations without `l2norm`.
        roles: roles by operand name, which override `default_roles`.
        gated: multiply the normalised output by `silu` of a projection.
        micro_steps: n of operands declared as tuples.
        params: the declaration's keyword-only floats, where they have no default.
        engine: passed to the op; None lets the device choose.

    Raises:
        ValueError: `normalise` or `roles` names something that is not an operand.
        TypeError: `op` is no recurrence.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(
        self,
        op: Recurrence,
        hidden: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        value_heads: int | None = None,
        conv_size: int = 4,
        normalise: tuple[str, ...] = (),
        roles: Mapping[str, OperandRole] | None = None,
        gated: bool = False,
        micro_steps: int = 1,
        params: Mapping[str, float] | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(op, "declaration"):
            raise TypeError(
                f"op is {op!r}, expected a recurrence: chunkwise.library.NAME, or one of your own"
            )
        self.op, self.engine, self.normalise = op, engine, normalise
        self.heads, self.value_heads = heads, value_heads or heads
        self.params: dict[str, Any] = dict(params or {})
        self.key_dim, self.value_dim, self.micro_steps = key_dim, value_dim, micro_steps
        form = op.declaration.normal_form(micro_steps)
        self.operands = form.operands
        self.roles = default_roles(form) | dict(roles or {})
        names = [x.name for x in self.operands]
        for name in (*normalise, *(roles or {})):
            if name not in names:
                raise ValueError(f"{form.name} has no operand {name!r}; it has {', '.join(names)}")

        tokens = [x for x in self.operands if x.per is Per.TOKEN]
        floors = log_decay_floors(form)
        self.features = [x for x in tokens if self.roles[x.name] is OperandRole.FEATURE]
        self.others = [x for x in tokens if self.roles[x.name] is not OperandRole.FEATURE]
        self.feature_sizes = [math.prod(self._shape(x)) for x in self.features]
        self.other_sizes = [math.prod(self._shape(x)) for x in self.others]
        self.project = nn.Linear(hidden, sum(self.feature_sizes), bias=False)
        self.control = nn.Linear(hidden, sum(self.other_sizes), bias=False) if self.others else None
        self.convolve = (
            ShortConvolution(sum(self.feature_sizes), conv_size) if conv_size > 1 else None
        )
        self.decays = nn.ModuleDict(
            {
                x.name: _LogDecay(*self._head_shape(x), floor=floors.get(x.name))
                for x in self.others
                if self.roles[x.name] is OperandRole.LOG_DECAY
            }
        )
        self.per_head = nn.ParameterDict(
            {x.name: self._per_head(x, form) for x in self.operands if x.per is Per.HEAD}
        )
        channels = {Kind.KEY: key_dim, Kind.VALUE: value_dim}.get(form.output.kind)
        if channels is None:
            raise ValueError(f"{form.name} returns a Scalar, and a layer norms Keys or Values")
        self.norm = RMSNorm(channels)
        width = self.value_heads * channels
        self.gate = nn.Linear(hidden, width, bias=False) if gated else None
        self.output = nn.Linear(width, hidden, bias=False)

    def _is_feature(self, x: Operand) -> bool:
        return self.roles[x.name] is OperandRole.FEATURE

    def _head_shape(self, x: Operand) -> tuple[int, int]:
        """Heads and channels of an operand; only Keys that are features have the key heads."""
        if x.kind is Kind.KEY:
            return (self.heads if self._is_feature(x) else self.value_heads), self.key_dim
        return self.value_heads, self.value_dim if x.kind is Kind.VALUE else 1

    def _shape(self, x: Operand) -> tuple[int, ...]:
        """The operand's axes after [B, T]."""
        heads, channels = self._head_shape(x)
        micro = (self.micro_steps,) if x.micro else ()
        return (*micro, heads) if x.kind is Kind.SCALAR else (*micro, heads, channels)

    def _per_head(self, x: Operand, form: NormalForm) -> nn.Parameter:
        """The initial parameter: RetNet's decay 1 - 2^(-5-h) of head h; zero for other operands."""
        shape = {
            Kind.SCALAR: (self.value_heads,),
            Kind.KEY: (self.value_heads, self.key_dim),
            Kind.VALUE: (self.value_heads, self.value_dim),
        }[x.kind]
        factor = 1 - 2.0 ** (-5 - torch.arange(self.value_heads, dtype=torch.float32, device=None))
        factor = factor.reshape(-1, *([1] * (len(shape) - 1))).expand(shape)
        role = OperandRole.RAW
        for _, log_decay in form.log_decays:
            role = _decay_roles(log_decay).get(x.name, role)
        self.roles[x.name] = role
        if role is OperandRole.LOG_DECAY:
            return nn.Parameter(torch.log(torch.expm1(-factor.log())))  # -softplus(p) = log factor
        return nn.Parameter(
            torch.logit(factor)
            if role is OperandRole.UNIT
            else torch.zeros(shape, dtype=None, device=None)
        )

    def _apply_per_head(self, name: str) -> Tensor:
        p: Tensor = self.per_head[name]
        role = self.roles[name]
        if role is OperandRole.LOG_DECAY:
            return -F.softplus(p)
        return torch.sigmoid(p) if role is OperandRole.UNIT else p

    def _operands(self, features: Tensor, hidden: Tensor) -> list[Tensor]:
        """The operands in declared order, from convolved features and hidden vectors."""
        lead = features.shape[:-1]
        made: dict[str, Tensor] = {}
        for x, part in zip(self.features, features.split(self.feature_sizes, -1), strict=True):
            y = part.reshape(*lead, *self._shape(x))
            made[x.name] = l2norm(y) if x.name in self.normalise else y
        if self.control is not None:
            parts = self.control(hidden).split(self.other_sizes, -1)
            for x, part in zip(self.others, parts, strict=True):
                made[x.name] = self._activate(x, part.reshape(*lead, *self._shape(x)))
        for name in self.per_head:
            made[name] = self._apply_per_head(name)
        return [made[x.name] for x in self.operands]

    def _activate(self, x: Operand, y: Tensor) -> Tensor:
        role = self.roles[x.name]
        if role is OperandRole.LOG_DECAY:
            if x.kind is Kind.SCALAR:
                y = y[..., None]
            decay: Tensor = self.decays[x.name](y)
            return decay[..., 0] if x.kind is Kind.SCALAR else decay
        return torch.sigmoid(wide(y)) if role is OperandRole.UNIT else y

    def _finish(self, o: Tensor, hidden: Tensor) -> Tensor:
        y = self.norm(o).flatten(-2)
        if self.gate is not None:
            y = y * F.silu(self.gate(hidden))
        out: Tensor = self.output(y)
        return out

    def _run(
        self, x: Tensor, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, States | None]:
        projected = self.project(x)
        features = projected if self.convolve is None else self.convolve(projected, cu_seqlens)
        o, state = self.op(
            *self._operands(F.silu(features), x),
            output_final_state=final,
            cu_seqlens=cu_seqlens,
            engine=self.engine,
            **self.params,
        )
        return self._finish(o, x), projected, state

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The outputs of whole sequences.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, which are independent; then
                B = 1.

        Returns:
            `[B, T, hidden]`.
        """
        return self._run(x, cu_seqlens, final=False)[0]

    def prefill(self, x: Tensor) -> tuple[Tensor, LayerState]:
        y, projected, state = self._run(x, None, final=True)
        return y, LayerState(self._cache(projected), state)

    def _cache(self, projected: Tensor) -> Tensor:
        if self.convolve is None:
            return projected[:, :0]
        return self.convolve.last(projected)

    def initial_state(self, batch: int) -> LayerState:
        weight = self.project.weight
        return LayerState(self._cache(weight.new_zeros(batch, 0, weight.shape[0])), None)

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        features, cache = self.project(x), state.convolution
        if self.convolve is not None:
            features, cache = self.convolve.step(features, cache)
        operands = self._operands(F.silu(features), x)
        o, recurrent = self.op.step(*operands, state=state.recurrent, **self.params)
        return self._finish(o, x), LayerState(cache, recurrent)
