"""What is measured: recurrences, how their operands are drawn, the peers' calls, and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers


class Fill(Enum):
    """How an operand is drawn: random, never zeros, in the range that models feed it."""

    NORMAL = "standard normal"
    QUERY = "normal / sqrt(K): the peers' scale, put into q"
    UNIT_KEY = "normal, then normalised over the channels"
    LOG_DECAY = "log sigmoid(normal) / 2"
    STEP_SIZE = "sigmoid(normal)"
    RETENTION = "log(1 - 2^(-5 - h)), RetNet's decay of head h"


class Axes(Enum):
    """The shape of an operand, by its kind."""

    KEY = "B T H K"
    VALUE = "B T H V"
    SCALAR = "B T H"
    HEAD = "H"


@dataclass(frozen=True, slots=True)
class Input:
    """One operand. `float32` whatever the run's dtype: gates and step sizes per token are small."""

    name: str
    axes: Axes
    fill: Fill
    float32: bool = False
    gradient: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """One recurrence of the library and, where there is one, the peer's call of the same thing."""

    name: str
    inputs: tuple[Input, ...]
    peer: Callable[..., Tensor] | None
    # fla refuses this backward on Triton 3.4.0 to 3.7.0 on Hopper: its results are wrong there
    peer_backward_refused: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """K = V = D and one group of heads; `lengths` of packed sequences, which then sum to T."""

    name: str
    B: int
    T: int
    H: int
    D: int
    lengths: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        packed = f", {len(self.lengths)} packed" if self.lengths else ""
        return f"B{self.B} T{self.T} H{self.H} D{self.D}{packed}"


RAGGED = (1300, 547, 2048, 963, 271, 3063)
SHAPES = {
    s.name: s
    for s in (
        Shape("A", 1, 8192, 96, 128),
        Shape("B", 2, 16384, 16, 128),
        Shape("C", 4, 2048, 16, 128),
        Shape("F", 4, 4096, 16, 128),
        Shape("G", 8, 2048, 32, 256),
        Shape("D", 8, 1024, 8, 64),
        Shape("E", 1, 32768, 8, 128),
        Shape("P1", 1, 8192, 64, 128, (8192,)),
        Shape("P6", 1, 8192, 64, 128, RAGGED),
        Shape("P8", 1, 8192, 64, 128, (1024,) * 8),
        # for a CPU, and for testing the harness itself
        Shape("S", 1, 2048, 8, 64),
        Shape("XS", 2, 96, 2, 16),
    )
}

_Q = Input("q", Axes.KEY, Fill.QUERY)
_K = Input("k", Axes.KEY, Fill.UNIT_KEY)
_V = Input("v", Axes.VALUE, Fill.NORMAL)
_G = Input("g", Axes.SCALAR, Fill.LOG_DECAY, float32=True)
_G_KEY = Input("g", Axes.KEY, Fill.LOG_DECAY)
_WRITTEN = Input("a", Axes.KEY, Fill.UNIT_KEY)
_READ = Input("b", Axes.KEY, Fill.UNIT_KEY)
_BETA = Input("beta", Axes.SCALAR, Fill.STEP_SIZE, float32=True)
# the peer computes this decay itself and gives it no gradient
_RETENTION = Input("g", Axes.HEAD, Fill.RETENTION, float32=True, gradient=False)

CASES = {
    c.name: c
    for c in (
        Case("linear_attention", (_Q, _K, _V), peers.linear_attention),
        Case("retention", (_Q, _K, _V, _RETENTION), peers.retention),
        Case("simple_gla", (_Q, _K, _V, _G), peers.simple_gla, peer_backward_refused=True),
        Case("delta_rule", (_Q, _K, _V, _BETA), peers.delta_rule),
        Case(
            "gated_delta_rule",
            (_Q, _K, _V, _G, _BETA),
            peers.gated_delta_rule,
            peer_backward_refused=True,
        ),
        Case("gla", (_Q, _K, _V, _G_KEY), peers.gla),
        Case("kda", (_Q, _K, _V, _G_KEY, _BETA), peers.kda),
        Case("dplr", (_Q, _K, _V, _WRITTEN, _READ, _G_KEY), None),
    )
}


def sizes(x: Input, s: Shape) -> tuple[int, ...]:
    """The shape of operand `x` at `s`."""
    letters = {"B": s.B, "T": s.T, "H": s.H, "K": s.D, "V": s.D}
    return tuple(letters[a] for a in x.axes.value.split())


def draw(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """The operands of a call, leaves that require gradients where the case says so."""
    generator = torch.Generator(device=device).manual_seed(seed)
    made = {}
    for x in case.inputs:
        y = torch.randn(sizes(x, shape), generator=generator, device=device)
        if x.fill is Fill.QUERY:
            y = y * shape.D**-0.5
        elif x.fill is Fill.UNIT_KEY:
            y = F.normalize(y, dim=-1)
        elif x.fill is Fill.LOG_DECAY:
            y = F.logsigmoid(y) / 2
        elif x.fill is Fill.STEP_SIZE:
            y = torch.sigmoid(y)
        elif x.fill is Fill.RETENTION:
            y = torch.log1p(-(2.0 ** (-5 - torch.arange(shape.H, device=device).float())))
        made[x.name] = y.to(torch.float32 if x.float32 else dtype).requires_grad_(x.gradient)
    return made


def cu_seqlens(shape: Shape, device: torch.device) -> Tensor | None:
    """Boundaries of the packed sequences, int64 `[N + 1]`; None if the batch is dense."""
    if not shape.lengths:
        return None
    return torch.tensor((0, *shape.lengths), device=device).cumsum(0)


def compulsory_bytes(case: Case, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that forward and backward cannot avoid: inputs read once, outputs written once.

    The backward reads the inputs and the output's gradient and writes one gradient per operand.
    """

    def size(x: Input) -> int:
        count = 1
        for n in sizes(x, shape):
            count *= n
        return count * (4 if x.float32 else dtype.itemsize)

    inputs = sum(size(x) for x in case.inputs)
    gradients = sum(size(x) for x in case.inputs if x.gradient)
    output = shape.B * shape.T * shape.H * shape.D * dtype.itemsize
    return inputs + output, inputs + output + gradients
