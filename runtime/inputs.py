"""Inputs for any recurrence, drawn from what its normal form says of each operand, not from names.

Gates are drawn so that log-decays stay at most 0 and promises (`within`) hold, found by trying
ranges on samples; what is recalled of the state is scaled down until the state does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ..dsl import errors, oracle
from ..dsl.bounds import interval
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Node, Op, Per, bounds_of, operands_of, promises_of, topological
from ..dsl.normal_form import NormalForm, Operand, expressions, results_of
from ..dsl.turns import log_decays

_SAMPLES, _CHANNELS = 512, 4
# of a state over the sequence: rounding grows alike, and is not to be taken for an error
_GROWTH, _BEARABLE = 2.0, 1e3
_HALVINGS = 8

Declared = NormalForm | Declaration


@dataclass(frozen=True, slots=True)
class Extremes:
    """What hard inputs hold beside usual ones.

    Attributes:
        step: the largest step size; the smallest is 0.
        margin: how near the lower end of a finite range they come, as a part of its width.
    """

    step: float = 1.0
    margin: float = 0.01


HARD = Extremes()


@dataclass(frozen=True, slots=True)
class Range:
    """Where an operand's entries lie, and how a normal sample gets there."""

    low: float
    high: float

    @property
    def _wide(self) -> bool:
        return self.low <= -4.0 and self.high >= 4.0  # no entry of usual size is outside

    def of(self, normal: Tensor, extremes: Extremes | None = None) -> Tensor:
        """`normal` moved into the range; with `extremes`, a third near each end, in turns."""
        low, high = self.low, self.high
        if self._wide:
            value, ends = normal.clamp(low, high), (-4.0, 4.0)
        elif low == -math.inf:  # torch.compile may hold a bound as a symbol, which isinf refuses
            value, ends = high - softplus(normal), (high - 20.0, high - 1e-4)
        elif high == math.inf:
            value, ends = low + softplus(normal), (low + 20.0, low + 1e-4)
        else:
            width = high - low
            value = low + width * normal.sigmoid()
            margin = 0.01 if extremes is None else extremes.margin
            ends = (low + margin * width, high - 1e-4 * width)
        return value if extremes is None else _in_turns(value, *ends)

    def text(self, normal: str) -> str:
        """`of` as Python: an expression of the expression `normal`."""
        low, high = self.low, self.high
        if self._wide:
            bounds = [f"{n}={x}" for n, x in (("min", low), ("max", high)) if math.isfinite(x)]
            return f"{normal}.clamp({', '.join(bounds)})" if bounds else normal
        if math.isinf(low) or math.isinf(high):
            bound, sign = (high, "-") if math.isinf(low) else (low, "+")
            start = f"{bound} {sign} " if bound else sign.strip("+")
            return f"{start}softplus({normal})"
        squeezed = f"{normal}.sigmoid()"
        return squeezed if self == UNIT else f"{low} + {high - low} * {squeezed}"


ANY, NEGATIVE = Range(-math.inf, math.inf), Range(-math.inf, 0.0)
POSITIVE, UNIT = Range(0.0, math.inf), Range(0.0, 1.0)
_USUAL = (ANY, NEGATIVE, POSITIVE, UNIT)  # the order in which they are tried


@dataclass(frozen=True, slots=True)
class Ranges:
    """What was found out about the operands of a form; others are plain Keys, Values, Scalars."""

    gates: tuple[tuple[str, Range], ...]
    steps: frozenset[str]  # Scalars that are not gates
    positive_keys: bool  # a KeyState, or what is read, is a denominator, and stays away from 0

    @property
    def small(self) -> frozenset[str]:
        """Operands whose gradients have the tolerance of gates and steps."""
        return self.steps | {name for name, _ in self.gates}

    def entries(self, o: Operand, normal: Tensor, extremes: Extremes | None = None) -> Tensor:
        """The operand `o`, made of normal samples of its shape: a gate, a step, a unit vector."""
        gate = dict(self.gates).get(o.name)
        if gate is not None:
            return gate.of(normal, extremes)
        if o.kind is Kind.SCALAR:
            step = UNIT.of(normal)
            return step if extremes is None else _in_turns(step, 0.0, extremes.step)
        if o.kind is Kind.VALUE:
            return normal
        key = normalize(normal, dim=-1)
        return key.abs() if self.positive_keys else key

    def text(self, o: Operand, normal: str) -> str:
        """`entries` as Python: an expression of the expression `normal`."""
        gate = dict(self.gates).get(o.name)
        if gate is not None or o.kind is Kind.SCALAR:
            return (gate or UNIT).text(normal)
        if o.kind is Kind.VALUE:
            return normal
        return f"normalize({normal}, dim=-1)" + (".abs()" if self.positive_keys else "")


def usual_params(form: NormalForm) -> dict[str, float]:
    """The run-time floats of a call: their defaults, or 1."""
    return {p.name: 1.0 if p.default is None else p.default for p in form.params}


def kinds_only(declared: Declared) -> Ranges:
    """What the kinds of operands and states alone tell: that of steps without a normal form."""
    scalars = frozenset(o.name for o in declared.operands if o.kind is Kind.SCALAR)
    return Ranges((), scalars, any(s.kind is Kind.KEY_STATE for s in declared.states))


def ranges(form: NormalForm, params: Mapping[str, float], also: Sequence[Node] = ()) -> Ranges:
    """The ranges of the gates that are declared, or the first under which log-decays are negative.

    `also`: further expressions of operands that are to be at most 0.

    Raises:
        NotLowered: there are none among those that are tried.
    """
    decays = [*(node for _, node in log_decays(form) if not results_of(node)), *also]
    every = topological(*expressions(form), *form.outputs)
    promised = [n for n in every if n.op is Op.WITHIN and not results_of(n)]
    names = operands_of(*decays, *promised).keys()
    gates = [o for o in form.operands if o.name in names]
    random = torch.Generator().manual_seed(0)
    normal = {o.name: _normal((_SAMPLES,), random, torch.float32).double() for o in form.operands}
    declared = {name: Range(*bounds) for name, bounds in promises_of(*every).items()}
    tried = [(declared[o.name],) if o.name in declared else _USUAL for o in gates]
    for chosen in itertools.product(*tried):
        samples = {name: torch.cat((x, x)) for name, x in normal.items()}
        for o, r in zip(gates, chosen, strict=True):
            x = normal[o.name]
            samples[o.name] = torch.cat((r.of(x), r.of(x, HARD)))
        if _legal(decays, promised, samples, params):
            found = tuple((o.name, r) for o, r in zip(gates, chosen, strict=True))
            plain = kinds_only(form)
            positive = plain.positive_keys or _divides_by_reads(form)
            return Ranges(found, plain.steps - names, positive)
    raise errors.NotLowered(
        f"{form.name} cannot be checked on inputs drawn by themselves",
        f"no signs of {', '.join(o.name for o in gates)} keep its log-decay at most 0",
        "declare the bounds of its gates with `within`",
    )


def _divides_by_reads(form: NormalForm) -> bool:
    """Whether a divisor is made of what is read of a state, and may be 0."""
    every = topological(*expressions(form), *form.outputs)
    divisors = [n.args[1] for n in every if n.op is Op.DIV and results_of(n.args[1])]
    return any(interval(d).lo <= 0.0 <= interval(d).hi for d in divisors)


def _legal(
    decays: list[Node],
    promised: list[Node],
    samples: Mapping[str, Tensor],
    params: Mapping[str, float],
) -> bool:
    inside = [n.args[0] for n in promised]
    env: dict[Node, Tensor] = {}
    for n in topological(*decays, *inside):
        if n.op is Op.OPERAND:
            x = samples[str(n.attrs[0])]
            env[n] = x[::_CHANNELS] if n.kind is Kind.SCALAR else x.reshape(-1, _CHANNELS)
        elif n.op is Op.PARAM:
            env[n] = torch.tensor(params[str(n.attrs[0])], dtype=torch.float64, device="cpu")
    if not env:
        return True
    values = oracle.evaluate([*decays, *inside], env)
    bounds = [(-math.inf, 0.0)] * len(decays) + [bounds_of(n) for n in promised]
    # written so that a NaN is not legal
    return all(
        bool(((x >= lo) & (x <= hi)).all()) for x, (lo, hi) in zip(values, bounds, strict=True)
    )


def draw(
    declared: Declared,
    found: Ranges,
    sizes: Mapping[str, int],
    random: torch.Generator,
    extremes: Extremes | None = None,
) -> dict[str, Tensor]:
    """The operands of a call, float64 on the CPU; `sizes` by letter (B, T, n, H, HV, K, V)."""
    return {
        o.name: found.entries(o, _normal([sizes[a] for a in o.axes], random), extremes)
        for o in declared.operands
    }


def draw_states(
    declared: Declared, found: Ranges, sizes: Mapping[str, int], random: torch.Generator
) -> list[Tensor]:
    """Initial states of a call, float64 on the CPU; `sizes` by letter (N, HV, K, V)."""
    drawn = [_normal([sizes[a] for a in s.axes], random) for s in declared.states]
    return [x.abs() for x in drawn] if found.positive_keys else drawn


def contracted(
    form: NormalForm,
    found: Ranges,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float],
    sizes: Mapping[str, int],
    cu_seqlens: Tensor | None,
    *,
    repeating: bool = False,
) -> dict[str, Tensor]:
    """`operands`, what is read and scaled by in corrections halved until a state does not grow.

    With `repeating`, Keys are one and the same from the middle of the time axis on, if the state
    can be kept from growing under that.

    Raises:
        NotLowered: states grow whatever is drawn.
    """
    corrections = [
        w.correction
        for m in form.micro_steps
        for u in m.updates
        for w in u.writes
        if w.correction is not None
    ]
    read = operands_of(*(n for f in corrections for n in (f.key, f.scale)))
    halved = read.keys() - {name for name, _ in found.gates}

    def growth(x: Mapping[str, Tensor]) -> float:
        return _growth(form, x, params, sizes, cu_seqlens)

    for repeat in (True, False) if repeating else (False,):
        x = _repeating(form, found, operands) if repeat else dict(operands)
        for _ in range(_HALVINGS):
            if not corrections or growth(x) <= _GROWTH:
                return x
            x |= {n: x[n] / 2 for n in x.keys() & halved}
    if growth(operands) > _BEARABLE:
        raise errors.NotLowered(
            f"{form.name} cannot be checked on inputs drawn by themselves",
            "what it recalls of the state makes it grow, however small what is read and scaled by",
            "is a sign forgotten? a correction is `S - beta * outer(k, k @ S)`, beta * k @ k <= 2",
        )
    return dict(operands)


def _repeating(
    form: NormalForm, found: Ranges, operands: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`operands` with one and the same Key from the middle on, in all that are no gates."""
    repeated = dict(operands)
    gates = {name for name, _ in found.gates}
    for o in form.operands:
        if o.kind is Kind.KEY and o.per is Per.TOKEN and o.name not in gates:
            x = repeated[o.name] = operands[o.name].clone()
            x[:, x.shape[1] // 2 :] = x[:, :1]
    return repeated


def _growth(
    form: NormalForm,
    operands: Mapping[str, Tensor],
    params: Mapping[str, float],
    sizes: Mapping[str, int],
    cu_seqlens: Tensor | None,
) -> float:
    """How much larger, at most over heads, a state is at the end than it was at the beginning."""
    exact = {n: x.double().cpu() for n, x in operands.items()}
    bounds = None if cu_seqlens is None else cu_seqlens.cpu()
    random = torch.Generator().manual_seed(2)
    starts = [_normal([sizes[a] for a in s.axes], random) for s in form.states]
    with torch.no_grad():
        _, moved = oracle.run(form, exact, params, starts, bounds)
        _, still = oracle.run(form, exact, params, None, bounds)
    return max(
        float(((a - b).flatten(2).norm(dim=2) / s.flatten(2).norm(dim=2)).max())
        for a, b, s in zip(moved, still, starts, strict=True)
    )


def _normal(
    shape: Sequence[int], random: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(tuple(shape), generator=random, dtype=dtype, device="cpu")


def _in_turns(value: Tensor, low: float, high: float) -> Tensor:
    """A third of `value` at `low`, a third at `high`, in turns that differ between channels."""
    place = torch.arange(value.numel(), dtype=torch.int64, device=value.device)
    place = place.reshape(value.shape) * 7 % 3
    return torch.where(place == 0, low, torch.where(place == 1, high, value))
