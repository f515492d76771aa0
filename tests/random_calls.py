"""Random calls of a recurrence: sizes, contents, and how every tensor lies in memory.

What an operand holds follows from what the recurrence does with it (its normal form), never from
its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.ir import Kind, Op, Per, topological
from chunkwise.dsl.normal_form import NormalForm, expressions
from chunkwise.runtime.inputs import ANY, UNIT, Range, ranges
from torch import Tensor

from tests.harness import Inputs
from tests.random_rules import Pick


class Layout(Enum):
    """How a tensor lies in memory."""

    PLAIN = "contiguous"
    HEADS_FIRST = "tokens and heads transposed"
    INSIDE = "a slice of a larger tensor that holds NaN"
    ODD = "an odd offset into its storage"
    STRIDED = "the last axis has a stride"
    BROADCAST = "one token for all, stride 0"
    NEGATED = "with torch's negation bit"
    REVERSED = "every axis in the opposite order"


class Boundaries(Enum):
    """How `cu_seqlens` lie in memory."""

    LONG = "int64"
    INT = "int32"
    COLUMN = "int32, a column of a matrix"
    LONG_COLUMN = "int64, a column of a matrix"
    ODD = "int32, an odd offset"


class Loss(Enum):
    """What the gradients are taken of."""

    BOTH = "the output and the final states"
    OUTPUT = "the output only"
    STATES = "the final states only"


class Probe(Enum):
    """What is asked of a call."""

    RUN = "its numbers"
    META = "its shapes, on the meta device"
    STEP = "its numbers, by `step`, a token at a time"
    MIXED = "to refuse one operand on another device"


# what is put into a gate: as a log-decay (or before a sigmoid or softplus), as a factor
RESETS: tuple[tuple[float, float] | None, ...] = (
    *(None, None, None, None, None),
    *((-1e3, 1e-4), (-1e6, 1e-6), (-1e9, 1e-9), (-math.inf, 0.0)),
)
_USUAL = ("LONG", "BOTH", "RUN")
_LARGEST = 1e6  # of a truth that float32 is held to


@dataclass(frozen=True)
class Plan:
    """One call; `lengths` packs sequences (else there are B of T tokens)."""

    B: int
    T: int
    lengths: tuple[int, ...] | None
    H: int
    group: int
    K: int
    V: int
    micro: int
    initial: tuple[bool, ...]  # for each state, in turn
    wide_keys: tuple[bool, ...]  # whether a Key belongs to the value heads, in turn
    dtype: torch.dtype
    reset: tuple[float, float] | None
    resets: int
    zeros: bool  # tokens that are 0 throughout
    layouts: tuple[Layout, ...]  # of the operands and initial states, in turn
    boundaries: Boundaries
    default_dtype: torch.dtype
    loss: Loss
    cotangents: Layout
    check: bool | None
    probe: Probe
    statics: bool  # whether int and bool keywords have other values than their defaults
    seed: int

    def __str__(self) -> str:
        """What differs from the simplest call."""
        parts = [f"B={self.B} T={self.T} H={self.H}x{self.group} K={self.K} V={self.V}"]
        parts.append(str(self.dtype).removeprefix("torch."))
        for name in ("lengths", "micro", "reset", "resets", "zeros", "check", "statics", "seed"):
            parts.append(f"{name}={getattr(self, name)}")
        parts += [f"initial={self.initial} wide_keys={self.wide_keys}"]
        layouts = {x.name for x in (*self.layouts, self.cotangents)} - {"PLAIN"}
        parts += sorted(layouts)
        parts += [x.name for x in (self.boundaries, self.loss, self.probe) if x.name not in _USUAL]
        if self.default_dtype is not torch.float32:
            parts.append(f"default {self.default_dtype}")
        return " ".join(parts)

    @property
    def given_statics(self) -> dict[str, int | bool]:
        """Other values of the int and bool keywords that rules have."""
        return {"power": 3, "flag": False} if self.statics else {}

    @property
    def tokens(self) -> int:
        return self.T if self.lengths is None else sum(self.lengths)

    @property
    def sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


def plan(
    pick: Pick, *, chunk: int, longest: int, dtypes: tuple[torch.dtype, ...], wide: int = 17
) -> Plan:
    """A call around chunks of `chunk` tokens, at most about `longest` of them in a sequence.

    `wide`: a number of channels that is more than a tile of the engine.
    """
    edges = (1, 2, 3, 5, 9, chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1, 0)
    lengths = tuple(n for n in edges if n <= longest)
    channels = (2, 3, 4, 5, 2, 3, 4, 5, 1, 8, 16, wide)
    packed = tuple(pick(lengths) for _ in range(pick((0, 0, 0, 1, 2, 3)))) or None
    layouts = (Layout.PLAIN,) if pick((True, False)) else tuple(Layout)
    made = Plan(
        B=pick((1, 2)),
        T=pick(lengths),
        lengths=packed,
        H=pick((1, 2)),
        group=pick((1, 1, 2)),
        K=pick(channels),
        V=pick(channels),
        micro=pick((2, 1, 3)),
        initial=pick(((False,), (True,), (True, False), (False, True))),
        wide_keys=pick(((False,), (False, True), (True, False), (True,))),
        dtype=pick(dtypes),
        reset=pick(RESETS),
        resets=pick((1, 1, 8)),
        zeros=pick((False,) * 7 + (True,)),
        layouts=tuple(pick(layouts) for _ in range(5)),
        boundaries=pick(tuple(Boundaries)),
        default_dtype=pick((*(torch.float32,) * 4, torch.float64, torch.bfloat16)),
        loss=pick((Loss.BOTH, Loss.BOTH, *Loss)),
        cotangents=pick(layouts),
        check=pick((None, None, None, True)),
        probe=pick((*(Probe.RUN,) * 20, Probe.STEP, Probe.STEP, Probe.META, Probe.MIXED)),
        statics=pick((False, False, True)),
        seed=pick(range(8)),
    )
    same = pick((0,) * 18 + (chunk, 64 if longest >= 40 else chunk))
    if same:  # of every axis
        return replace(made, B=1, T=same, lengths=None, H=1, group=1, K=same, V=same)
    return made


@dataclass(frozen=True)
class Made:
    """The tensors of a call, and which operands are gates or steps."""

    inputs: Inputs
    gates: frozenset[str]


def make(declaration: Declaration, form: NormalForm, params: dict[str, float], plan: Plan) -> Made:
    """Operands, initial states and boundaries; the same for the same plan."""
    random = torch.Generator().manual_seed(plan.seed)
    gates, small = _gates(form, params)
    only_gates = _only_in_decays(form)
    heads, T = plan.H * plan.group, plan.tokens
    batch = plan.B if plan.lengths is None else 1
    tails: dict[Kind, tuple[int, ...]] = {Kind.SCALAR: (), Kind.KEY: (plan.K,)}
    tails[Kind.VALUE] = (plan.V,)
    turn = iter(range(1000))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    operands, keys = {}, 0
    for x in declaration.operands:
        own = heads
        if x.kind is Kind.KEY and x.per is Per.TOKEN:
            own = heads if plan.wide_keys[keys % len(plan.wide_keys)] else plan.H
            keys += 1
        per_token = (batch, T, *((plan.micro,) if x.micro else ()))
        front = per_token if x.per is Per.TOKEN else ()
        value = normal(*front, own, *tails[x.kind])
        within = gates.get(x.name)
        if within in (None, ANY):
            value = _no_shorter(0.7 * value, 0.3) if tails[x.kind] else 0.7 * value
        else:
            value = within.of(value)
        if x.per is Per.TOKEN and T:
            at = torch.randint(T, (plan.resets,), generator=random)
            if plan.reset is not None and within is not None:
                if within == UNIT:
                    value[:, at] = plan.reset[1]
                elif x.name in only_gates:
                    sign = -1.0 if within.low == 0.0 else 1.0
                    value[:, at] = sign * plan.reset[0]
            if plan.zeros and within is None:
                value[:, at] = 0.0
        layout = plan.layouts[next(turn) % len(plan.layouts)]
        operands[x.name] = laid_out(value.to(plan.dtype), layout, x.per is Per.TOKEN)
    initial = None
    if any(plan.initial):
        shapes = [
            (plan.sequences, heads, plan.K, *((plan.V,) if s.kind is Kind.STATE else ()))
            for s in declaration.states
        ]
        states = [
            laid_out(0.7 * normal(*s).to(plan.dtype), plan.layouts[n % 5], False)
            for n, s in enumerate(shapes)
        ]
        initial = tuple(
            s if plan.initial[n % len(plan.initial)] else None for n, s in enumerate(states)
        )
    bounds = None if plan.lengths is None else boundaries(plan.lengths, plan.boundaries)
    return Made(Inputs(operands, initial, bounds, params), small)


def _no_shorter(vectors: Tensor, least: float) -> Tensor:
    """Vectors, those shorter than `least` made that long: what is divided by a norm cancels then.

    Vectors of zeros, whose norm is no number to divide by, are drawn by themselves.
    """
    return vectors * (least / vectors.norm(dim=-1, keepdim=True)).clamp(min=1.0)


def _gates(form: NormalForm, params: dict[str, float]) -> tuple[dict[str, Range], frozenset[str]]:
    found = ranges(form, params)
    return dict(found.gates), found.small


def _only_in_decays(form: NormalForm) -> set[str]:
    """Operands that are read by log-decays and by nothing else."""
    decays = {u.log_decay for m in form.micro_steps for u in m.updates if u.log_decay is not None}
    others = [n for n in expressions(form) if n not in decays]
    used = {n.attrs[0] for n in topological(*others, *form.outputs) if n.op is Op.OPERAND}
    every = {str(n.attrs[0]) for n in topological(*decays) if n.op is Op.OPERAND}
    return every - used


def laid_out(x: Tensor, layout: Layout, tokens: bool = True) -> Tensor:
    """The same values (but for BROADCAST: those of its first token), laid out so; a leaf."""
    x = x.detach()
    if layout is Layout.HEADS_FIRST and x.ndim > 2:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout is Layout.INSIDE:
        large = x.new_full([n + 3 for n in x.shape], torch.nan)
        x = large[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    elif layout is Layout.ODD:
        flat = x.new_full([x.numel() + 3], torch.nan)
        x = flat[3:].view(x.shape).copy_(x)
    elif layout is Layout.STRIDED:
        x = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    elif layout is Layout.BROADCAST and tokens and x.ndim > 1 and x.shape[1]:
        x = x[:, :1].expand_as(x)
    elif layout is Layout.NEGATED:
        x = torch._neg_view(x.neg())
    elif layout is Layout.REVERSED:
        axes = list(reversed(range(x.ndim)))
        x = x.permute(axes).contiguous().permute(axes)
    return x.detach().requires_grad_()


def boundaries(lengths: tuple[int, ...], how: Boundaries, device: str = "cpu") -> Tensor:
    """`cu_seqlens` of sequences of those lengths, laid out so."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)
    if how not in (Boundaries.LONG, Boundaries.LONG_COLUMN):
        bounds = bounds.to(torch.int32)
    if how in (Boundaries.COLUMN, Boundaries.LONG_COLUMN):
        bounds = torch.stack((torch.full_like(bounds, 999_999), bounds), -1)[:, 1]
    if how is Boundaries.ODD:
        bounds = torch.cat((torch.full_like(bounds[:1], 999_999), bounds))[1:]
    return bounds


def is_sound(truth: dict[str, Tensor]) -> bool:
    """Whether a truth is one: finite, and no larger than what rounding can be told from."""
    return all(
        bool(torch.isfinite(x).all()) and (not x.numel() or float(x.abs().max()) <= _LARGEST)
        for x in truth.values()
    )
