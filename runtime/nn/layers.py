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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dsl.ir import Kind, Per, operands_of
from ...dsl.normal_form import NormalForm, Operand
from ...dsl.turns import log_decays
from ..inputs import usual_params
from ..wide import l2norm, wide
from . import decays, fused
from .explanation import explain
from .parts import (
    Mixer,
    RMSNorm,
    ShortConvolution,
    Split,
    again,
    last_tokens,
    multiple,
    own,
    shared,
)
from .roles import FEATURES, OperandRole, own_decays, roles_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..recurrence import Recurrence, States


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of a `RecurrentLayer` between two tokens.

    Attributes:
        convolution: the last inputs of the short convolution, `[B, conv_size - 1, features]`.
        recurrent: the states of the recurrence; None before the first token.
    """

    convolution: Tensor
    recurrent: States | None


def _activate(y: Tensor, role: OperandRole) -> Tensor:
    if role is OperandRole.FEATURE:
        return F.silu(y)
    return F.elu(y) + 1 if role is OperandRole.POSITIVE else y


class RecurrentLayer(nn.Module, Mixer):
    """A sequence mixer around a declared recurrence.

    `[B, T, hidden] -> [B, T, hidden]`: projections for every operand by its kind, short
    convolutions and silu on features, decays and step sizes by their roles, the recurrence, an
    RMS norm per value head, optionally gated, and the output projection. Several outputs have a
    norm each and are projected side by side, which sums a projection of each.

    Args:
        op: the recurrence (`@cw.recurrence`, or one of `cw.library`).
        hidden: size of the token vectors.
        heads: key heads H.
        key_dim: channels K of one head's Keys.
        value_dim: channels V of one head's Values.
        value_heads: value heads HV, a multiple of H; None for H.
        conv_size: taps of the short convolution over feature operands; 0 for none.
        normalise: names of features to scale to unit length; None for those that the step recalls
            the state with, unless the declaration takes their length itself.
        roles: roles by operand name, which override `default_roles`.
        gated: multiply the normalised output by `silu` of a projection.
        micro_steps: n of operands declared as tuples.
        params: the declaration's keyword-only floats, where they have no default.
        engine: passed to the op; None lets the device choose.

    Attributes:
        roles (dict[str, OperandRole]): the role of every operand; `explain` shows what it means.

    Raises:
        ValueError: `normalise` or `roles` names something that is not an operand, PAIRED is the
            role of an operand that no correction reads with, `value_heads` is no multiple of
            `heads`, or an output is a Scalar.
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
        normalise: tuple[str, ...] | None = None,
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
        self.op, self.engine = op, engine
        self.hidden, self.heads, self.value_heads = hidden, heads, value_heads or heads
        if self.value_heads % heads:
            raise ValueError(f"value_heads must be a multiple of heads: got {value_heads}, {heads}")
        self.params: dict[str, Any] = dict(params or {})
        self.key_dim, self.value_dim, self.micro_steps = key_dim, value_dim, micro_steps
        form = op.declaration.normal_form(micro_steps)
        self.operands = form.operands
        names = [x.name for x in self.operands]
        for name in (*(normalise or ()), *(roles or {})):
            if name not in names:
                raise ValueError(f"{form.name} has no operand {name!r}; it has {', '.join(names)}")
        found = roles_of(form, self.params)
        self.roles = found.roles | dict(roles or {})
        self.found = replace(found, roles=self.roles)
        for name in names:
            if self.roles[name] is OperandRole.PAIRED and name not in found.pairs:
                raise ValueError(f"{form.name}: no correction reads with {name!r}; it has no pair")
        self.normalise = found.unit if normalise is None else normalise

        tokens = [x for x in self.operands if x.per is Per.TOKEN]
        self.features = [x for x in tokens if self.roles[x.name] in FEATURES]
        self.others = [x for x in tokens if self.roles[x.name] not in FEATURES]
        self._measure()
        self.project = nn.Linear(hidden, sum(self.feature_sizes), bias=False)
        self.control = nn.Linear(hidden, sum(self.other_sizes), bias=False) if self.others else None
        self.alike = all(self.roles[x.name] is OperandRole.FEATURE for x in self.features)
        self.convolve = (
            ShortConvolution(sum(self.feature_sizes), conv_size, self._spans())
            if conv_size > 1
            else None
        )
        logs = [x for x in self.others if self.roles[x.name] is OperandRole.LOG_DECAY]
        self.decays = nn.ModuleDict(
            {x.name: decays.LogDecay(*self._head_shape(x), self._floor(x)) for x in logs}
        )
        self.per_head = nn.ParameterDict(
            {x.name: self._per_head(x, form) for x in self.operands if x.per is Per.HEAD}
        )
        starts = {x.name: self._bias(x, form) for x in self.others}
        self.biases = nn.ParameterDict({n: b for n, b in starts.items() if b is not None})
        sizes = {Kind.KEY: key_dim, Kind.VALUE: value_dim}
        if any(o.kind not in sizes for o in form.outputs):
            raise ValueError(f"{form.name} returns a Scalar, and a layer norms Keys or Values")
        self.widths = [self.value_heads * sizes[o.kind] for o in form.outputs]
        norms = [RMSNorm(sizes[o.kind]) for o in form.outputs]
        self.norm = norms[0] if len(norms) == 1 else nn.ModuleList(norms)
        self.gate = nn.Linear(hidden, sum(self.widths), bias=False) if gated else None
        self.output = nn.Linear(sum(self.widths), hidden, bias=False)

    def _measure(self) -> None:
        self.feature_sizes = [math.prod(self._shape(x)) for x in self.features]
        self.other_sizes = [math.prod(self._shape(x)) for x in self.others]

    def _spans(self) -> list[tuple[int, bool]]:
        """The channels of each head of each feature, and whether they are scaled to length 1."""
        return [
            (width, x.name in self.normalise)
            for x in self.features
            for *lead, width in [self._shape(x)]
            for _ in range(math.prod(lead))
        ]

    def split(self, ranks: int) -> dict[str, Split | None]:
        """Keep the heads of one of `ranks` alone: how its parameters are split (tensor_parallel).

        Args:
            ranks: how many.

        Returns:
            By the path of each parameter, how ranks split it; None: every rank has all.

        Raises:
            ValueError: the heads or value heads are not a multiple of `ranks`.
        """
        heads, value_heads = self.heads, self.value_heads
        multiple(ranks, heads=heads, value_heads=value_heads)

        def parts(operands: list[Operand]) -> tuple[int, ...]:
            counts = [(x, self.micro_steps if x.micro else 1) for x in operands]
            return tuple(
                math.prod(self._shape(x)) // count for x, count in counts for _ in range(count)
            )

        found: dict[str, Split | None] = {n: Split(0) for n, _ in self.named_parameters()}
        features = parts(self.features)
        found |= {"project.weight": Split(0, features)}
        found |= {n: None for n in found if n.startswith("norm.")}
        found |= {"output.weight": Split(1, tuple(self.widths))}
        if self.gate is not None:
            found["gate.weight"] = Split(0, tuple(self.widths))
        if self.control is not None:
            found["control.weight"] = Split(0, parts(self.others))
        self.heads, self.value_heads = heads // ranks, value_heads // ranks
        self._measure()
        if self.convolve is not None:
            found["convolve.weight"] = Split(1, features)
            self.convolve.set_spans(self._spans(), self.convolve.spans.device)
        return found

    def explain(self) -> str:
        """A page on what the layer does to each operand.

        Returns:
            A line per operand: its kind, its role, and the expression that makes it of x, the
            hidden vectors. `b` and `p` are parameters.
        """
        return explain(self)

    def _head_shape(self, x: Operand) -> tuple[int, int]:
        """Heads and channels of an operand; only Keys that are features have the key heads."""
        if x.kind is Kind.KEY:
            own = self.roles[x.name] in (*FEATURES, OperandRole.PAIRED) and x.per is Per.TOKEN
            return (self.heads if own else self.value_heads), self.key_dim
        return self.value_heads, self.value_dim if x.kind is Kind.VALUE else 1

    def _shape(self, x: Operand) -> tuple[int, ...]:
        """The operand's axes after [B, T]."""
        heads, channels = self._head_shape(x)
        micro = (self.micro_steps,) if x.micro else ()
        return (*micro, heads) if x.kind is Kind.SCALAR else (*micro, heads, channels)

    def _floor(self, x: Operand) -> float | None:
        declared = self.found.declared.get(x.name)
        return None if declared is None else declared.low

    def _start(self, x: Operand, form: NormalForm, wanted: Tensor) -> nn.Parameter | None:
        """Where `x` starts, so that its decay starts at `wanted`; None if it is in no decay."""
        containing = [node for node in own_decays(form) if x.name in operands_of(node)]
        if not containing:
            return None
        activations = {o.name: self.found.range_of(o.name).of for o in self.operands}
        params = usual_params(form) | self.params
        found = decays.start(containing[0], x.name, activations, params, wanted)
        return nn.Parameter(found.to(torch.empty((), dtype=None, device=None)))

    def _bias(self, x: Operand, form: NormalForm) -> nn.Parameter | None:
        """The bias of a gate of a decay, but of log-decays, which have a module of their own."""
        heads = {o.name for o in self.operands if o.per is Per.HEAD}
        together = operands_of(*(n for n in own_decays(form) if x.name in operands_of(n)))
        if self.roles[x.name] is OperandRole.LOG_DECAY or heads & together.keys():
            return None
        heads_channels = self._head_shape(x)
        shape = heads_channels[:1] if x.kind is Kind.SCALAR else heads_channels
        seen = {r.state for r in form.reads}
        own = {state for state, node in log_decays(form) if x.name in operands_of(node)}
        return self._start(x, form, decays.drawn(*shape, read=bool(own & seen)))

    def _per_head(self, x: Operand, form: NormalForm) -> nn.Parameter:
        """A parameter: of a decay RetNet's, 1 for what multiplies, 0 for what is activated.

        Of several operands per head in a decay, the last as declared decides.
        """
        shape = (
            self.value_heads,
            *{Kind.KEY: (self.key_dim,), Kind.VALUE: (self.value_dim,)}.get(x.kind, ()),
        )
        last = {
            [o.name for o in self.operands if o.per is Per.HEAD and o.name in operands_of(n)][-1:][
                0
            ]
            for n in own_decays(form)
            if x.name in operands_of(n)
        }
        if x.name in last:
            factors = decays.of_heads(self.value_heads).reshape(-1, *[1] * (len(shape) - 1))
            started = self._start(x, form, factors.expand(shape))
            assert started is not None
            return started
        fill = float(x.name in self.found.ones)
        return nn.Parameter(torch.full(shape, fill, dtype=torch.get_default_dtype(), device=None))

    def _operands(self, projected: Tensor, hidden: Tensor, activated: bool = False) -> list[Tensor]:
        """The operands in declared order, from convolved projections and hidden vectors."""
        lead = projected.shape[:-1]
        features = F.silu(projected) if self.alike and not activated else projected
        made: dict[str, Tensor] = {}
        for x, part in zip(self.features, features.split(self.feature_sizes, -1), strict=True):
            y = part.reshape(*lead, *self._shape(x))
            if not self.alike:
                y = _activate(y, self.roles[x.name])
            unit = x.name in self.normalise and not activated
            made[x.name] = l2norm(y) if unit else y
        if self.control is not None:
            parts = self.control(hidden).split(self.other_sizes, -1)
            controls = {
                x.name: part.reshape(*lead, *self._shape(x))
                for x, part in zip(self.others, parts, strict=True)
            }
            made |= {x.name: self._control(x, controls[x.name], made) for x in self.others}
        made |= {
            name: self.found.range_of(name).of(own(p, projected))
            for name, p in self.per_head.items()
        }
        return [made[x.name] for x in self.operands]

    def _control(self, x: Operand, y: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        role = self.roles[x.name]
        if role is OperandRole.PAIRED:
            pair = self.found.pairs[x.name]
            of = features[pair.of]
            return pair.sign * of * torch.sigmoid(wide(y)).to(of.dtype)
        if role is OperandRole.LOG_DECAY:
            if x.kind is Kind.SCALAR:
                y = y[..., None]
            decay: Tensor = self.decays[x.name](y)
            return decay[..., 0] if x.kind is Kind.SCALAR else decay
        if x.name in self.biases:
            y = wide(y) + own(self.biases[x.name], y)
        return y if role is OperandRole.RAW else self.found.range_of(x.name).of(wide(y))

    def _finish(self, o: Tensor | tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        outputs = o if isinstance(o, tuple) else (o,)
        gates = [None] * len(outputs)
        if self.gate is not None:
            parts = self.gate(hidden).split([math.prod(x.shape[-2:]) for x in outputs], -1)
            gates = [g.view(x.shape) for g, x in zip(parts, outputs, strict=True)]
        return again(self.output, self._normed, *outputs, *gates)

    def _normed(self, *outputs_and_gates: Any) -> Tensor:
        """The outputs, each with its norm and gate, side by side."""
        norms = self.norm if isinstance(self.norm, nn.ModuleList) else [self.norm]
        outputs, gates = outputs_and_gates[: len(norms)], outputs_and_gates[len(norms) :]
        normed = [f(x, g).flatten(-2) for f, x, g in zip(norms, outputs, gates, strict=True)]
        return normed[0] if len(normed) == 1 else torch.cat(normed, -1)

    def _run(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        final: bool,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> tuple[Tensor, Tensor, States | None]:
        x = shared(x, self.project)
        features = projected = self.project(x)
        fuses = self.convolve is not None and self.alike and fused.serves(projected)
        if self.convolve is not None:
            convolve = self.convolve.activated if fuses else self.convolve
            features = convolve(projected, cu_seqlens, group)
        o, state = self.op(
            *self._operands(features, x, fuses),
            output_final_state=final,
            cu_seqlens=cu_seqlens,
            engine=self.engine,
            group=group,
            **self.params,
        )
        return self._finish(o, x), projected, state

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """The outputs of whole sequences.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, which are independent; then
                B = 1.
            group: the ranks over which the tokens are split in order, as of a call of the op; then
                x has this rank's tokens, and `cu_seqlens` counts those of all.

        Returns:
            `[B, T, hidden]`.
        """
        return self._run(x, cu_seqlens, final=False, group=group)[0]

    def prefill(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, LayerState]:
        y, projected, state = self._run(x, cu_seqlens, final=True)
        return y, LayerState(self._cache(projected, cu_seqlens), state)

    def _cache(self, projected: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if self.convolve is None:
            return last_tokens(projected, 0, cu_seqlens)
        return self.convolve.last(projected, cu_seqlens)

    def initial_state(self, batch: int) -> LayerState:
        weight = self.project.weight
        shape = batch, 0, sum(self.feature_sizes)
        none = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return LayerState(self._cache(none), None)

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        x = shared(x, self.project)
        features, cache = self.project(x), state.convolution
        if self.convolve is not None:
            features, cache = self.convolve.step(features, cache)
        operands = self._operands(features, x)
        o, recurrent = self.op.step(*operands, state=state.recurrent, **self.params)
        return self._finish(o, x), LayerState(cache, recurrent)
