"""Inputs for any recurrence, drawn from what its normal form says of each operand.

Gates are drawn so that log-decays stay at most 0 and promises (`within`) hold, found by trying
ranges on samples; what is recalled of the state is scaled down until the state does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ..codegen.config import Dims
from ..dsl import errors, oracle
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Node, Op, Per, topological
from ..dsl.normal_form import NormalForm, Operand, StateDecl, expressions
from ..runtime.call import Call, describe

_SAMPLES, _CHANNELS = 512, 4
# of a state over the sequence: rounding grows alike, and is not to be taken for an error
_GROWTH, _BEARABLE = 2.0, 1e3
_HALVINGS = 8


class Family(Enum):
    """The kinds of inputs that a configuration is checked on."""

    ORDINARY = "usual gates; several chunks, the last one unfinished"
    HARD = "gates from -20 to almost 0, steps of 0 and 1, keys that repeat; grouped heads"
    RAGGED = "packed sequences, one of them empty, one of one token"


@dataclass(frozen=True, slots=True)
class Range:
    """Where an operand's entries lie, and how a normal sample gets there."""

    low: float
    high: float

    def of(self, normal: Tensor, *, hard: bool) -> Tensor:
        """`normal` moved into the range; `hard`: a third near each end, channel by channel."""
        low, high = self.low, self.high
        if low <= -4.0 and high >= 4.0:  # no entry of usual size is outside
            value, ends = normal.clamp(low, high), (-4.0, 4.0)
        elif math.isinf(low):
            value, ends = high - softplus(normal), (high - 20.0, high - 1e-4)
        elif math.isinf(high):
            value, ends = low + softplus(normal), (low + 20.0, low + 1e-4)
        else:
            width = high - low
            value, ends = low + width * normal.sigmoid(), (low + 0.01 * width, high - 1e-4 * width)
        return _in_turns(value, *ends) if hard else value


ANY, NEGATIVE = Range(-math.inf, math.inf), Range(-math.inf, 0.0)
POSITIVE, UNIT = Range(0.0, math.inf), Range(0.0, 1.0)
_USUAL = (ANY, NEGATIVE, POSITIVE, UNIT)  # the order in which they are tried


@dataclass(frozen=True, slots=True)
class Ranges:
    """What was found out about the operands of a form; others are plain Keys, Values, Scalars."""

    gates: tuple[tuple[str, Range], ...]
    steps: frozenset[str]  # Scalars that are not gates
    positive_keys: bool  # a KeyState is a denominator

    @property
    def small(self) -> frozenset[str]:
        """Operands whose gradients have the tolerance of gates and steps."""
        return self.steps | {name for name, _ in self.gates}


def ranges(form: NormalForm, params: Mapping[str, float]) -> Ranges:
    """The ranges of the gates that are declared, or the first under which log-decays are negative.

    Raises:
        NotLowered: there are none among those that are tried.
    """
    decays = [u.log_decay for m in form.micro_steps for u in m.updates if u.log_decay is not None]
    every = topological(*expressions(form), form.output)
    promised = [n for n in every if n.op is Op.WITHIN and not _reads(n)]
    names = {str(n.attrs[0]) for n in topological(*decays, *promised) if n.op is Op.OPERAND}
    gates = [o for o in form.operands if o.name in names]
    random = torch.Generator().manual_seed(0)
    normal = {o.name: _normal((_SAMPLES,), random, torch.float32).double() for o in form.operands}
    declared = {str(n.args[0].attrs[0]): Range(*_promise(n)) for n in promised if _direct(n)}
    tried = [(declared[o.name],) if o.name in declared else _USUAL for o in gates]
    for chosen in itertools.product(*tried):
        samples = {name: torch.cat((x, x)) for name, x in normal.items()}
        for o, r in zip(gates, chosen, strict=True):
            x = normal[o.name]
            samples[o.name] = torch.cat((r.of(x, hard=False), r.of(x, hard=True)))
        if _legal(decays, promised, samples, params):
            return Ranges(
                tuple((o.name, r) for o, r in zip(gates, chosen, strict=True)),
                frozenset(o.name for o in form.operands if o.kind is Kind.SCALAR) - names,
                any(s.kind is Kind.KEY_STATE for s in form.states),
            )
    raise errors.NotLowered(
        f"{form.name} cannot be checked on inputs drawn by themselves",
        f"no signs of {', '.join(o.name for o in gates)} keep its log-decay at most 0",
        "declare the bounds of its gates with `within`",
    )


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
    bounds = [(-math.inf, 0.0)] * len(decays) + [_promise(n) for n in promised]
    # written so that a NaN is not legal
    return all(
        bool(((x >= lo) & (x <= hi)).all()) for x, (lo, hi) in zip(values, bounds, strict=True)
    )


def _reads(node: Node) -> bool:
    return any(n.op is Op.RESULT for n in topological(node))


def _direct(within: Node) -> bool:
    return within.args[0].op is Op.OPERAND


def _promise(within: Node) -> tuple[float, float]:
    lo, hi = (float(x) for x in within.attrs if isinstance(x, (int, float)))
    return lo, hi


def draw(
    declaration: Declaration,
    form: NormalForm,
    family: Family,
    dims: Dims,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    micro: int,
    batch: int = 2,
    heads: int = 2,
) -> Call:
    """A call of `family`: Keys and Values in `dtype`, Scalars and per-head operands in float32.

    `tokens`: the length of a sequence, of all packed ones together; `batch`, `heads`: of ordinary
    inputs (others have one key head and two value heads).

    Raises:
        NotLowered: no gates are known to be legal, or states grow whatever is drawn.
    """
    params = {p.name: 1.0 if p.default is None else p.default for p in form.params}
    found = ranges(form, params)
    grouped, packed = family is Family.HARD, family is Family.RAGGED
    B, H, HV = (1, 1, 2) if grouped or packed else (batch, heads, heads)
    lengths = (tokens // 2 + 1, 0, 1, tokens - tokens // 2 - 2) if packed else ()
    random = torch.Generator().manual_seed(1)
    wide = dtype if dtype is torch.float64 else torch.float32
    operands: dict[str, Tensor] = {}
    for o in form.operands:
        heads = H if o.kind is Kind.KEY and o.per is Per.TOKEN else HV
        tail = {Kind.SCALAR: (), Kind.KEY: (dims.K,), Kind.VALUE: (dims.V,)}[o.kind]
        front = () if o.per is Per.HEAD else (B, tokens, *((micro,) if o.micro else ()))
        normal = _normal((*front, heads, *tail), random)
        narrow = o.per is Per.TOKEN and o.kind is not Kind.SCALAR
        value = _entries(o, normal, found, hard=family is Family.HARD)
        operands[o.name] = value.to(device, dtype if narrow else wide)
    initial: tuple[Tensor | None, ...] = (None,) * len(form.states)
    if family is not Family.ORDINARY:
        initial = tuple(
            _initial(s, len(lengths) or B, HV, dims, found, random).to(device, wide)
            for s in form.states
        )
    cu_seqlens = None
    if packed:
        bounds = [0, *itertools.accumulate(lengths)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cpu").to(device)
    static = tuple(declaration.statics.items())
    call = describe(declaration, operands, params, initial, cu_seqlens, static)
    for tame in (_repeating(call, found), call) if family is Family.HARD else (call,):
        contracted = _contracted(tame, found)
        if contracted is not None:
            return contracted
    if _growth(call) > _BEARABLE:
        raise errors.NotLowered(
            f"{form.name} cannot be checked on inputs drawn by themselves",
            "what it recalls of the state makes it grow, however small what is read and scaled by",
            "is a sign forgotten? a correction is `S - beta * outer(k, k @ S)`, beta * k @ k <= 2",
        )
    return call


def _entries(o: Operand, normal: Tensor, found: Ranges, *, hard: bool) -> Tensor:
    chosen = dict(found.gates).get(o.name)
    if chosen is not None:
        return chosen.of(normal, hard=hard)
    if o.kind is Kind.SCALAR:
        return _in_turns(normal.sigmoid(), 0.0, 1.0) if hard else normal.sigmoid()
    if o.kind is Kind.VALUE:
        return normal
    key = normalize(normal, dim=-1)
    return key.abs() if found.positive_keys else key


def _repeating(call: Call, found: Ranges) -> Call:
    """`call` with one and the same Key from the middle on, in every operand that is no gate."""
    gates = {name for name, _ in found.gates}
    operands = dict(call.operands)
    for o in call.form.operands:
        if o.kind is Kind.KEY and o.per is Per.TOKEN and o.name not in gates:
            x = operands[o.name].clone()
            x[:, x.shape[1] // 2 :] = x[:, :1]
            operands[o.name] = x
    return replace(call, operands=operands)


def _normal(
    shape: tuple[int, ...], random: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(shape, generator=random, dtype=dtype, device="cpu")


def _in_turns(value: Tensor, low: float, high: float) -> Tensor:
    """A third of `value` at `low`, a third at `high`, in turns that differ between channels."""
    place = (
        torch.arange(value.numel(), dtype=torch.int64, device=value.device).reshape(value.shape)
        * 7
        % 3
    )
    return torch.where(place == 0, low, torch.where(place == 1, high, value))


def _initial(
    state: StateDecl, count: int, HV: int, dims: Dims, found: Ranges, random: torch.Generator
) -> Tensor:
    shape = (count, HV, dims.K, *((dims.V,) if state.kind is Kind.STATE else ()))
    value = _normal(shape, random)
    return value.abs() if found.positive_keys else value


def _contracted(call: Call, found: Ranges) -> Call | None:
    """`call` with what its feedbacks read and scale by halved until a state does not grow."""
    feedbacks = [
        w.feedback
        for m in call.form.micro_steps
        for u in m.updates
        for w in u.writes
        if w.feedback is not None
    ]
    read = topological(*(n for f in feedbacks for n in (f.key, f.scale)))
    gates = {name for name, _ in found.gates}
    names = {str(n.attrs[0]) for n in read if n.op is Op.OPERAND} - gates
    for _ in range(_HALVINGS):
        if not feedbacks or _growth(call) <= _GROWTH:
            return call
        halved = {n: x / 2 for n, x in call.operands.items() if n in names}
        call = replace(call, operands={**call.operands, **halved})
    return None


def _growth(call: Call) -> float:
    """How much larger, at most over heads, a state is at the end than it was at the beginning."""
    operands = {n: x.double().cpu() for n, x in call.operands.items()}
    cu = None if call.cu_seqlens is None else call.cu_seqlens.cpu()
    random = torch.Generator().manual_seed(2)
    shapes = [call.state_shape(s) for s in call.form.states]
    starts = [_normal(s, random) for s in shapes]
    with torch.no_grad():
        _, moved = oracle.run(call.step, operands, call.params, starts, cu)
        _, still = oracle.run(call.step, operands, call.params, None, cu)
    return max(
        float(((a - b).flatten(2).norm(dim=2) / s.flatten(2).norm(dim=2)).max())
        for a, b, s in zip(moved, still, starts, strict=True)
    )
