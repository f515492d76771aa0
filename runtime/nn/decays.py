"""Decays of layers, and where they start: log-decays between about -0.001 and -0.5 per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dsl import oracle
from ...dsl.ir import Kind, Node, Op, topological
from ..wide import wide
from .parts import own

_WIDEST, _POINTS, _ROUNDS = 20.0, 201, 5  # of the search for a start: where, and how closely


class LogDecay(nn.Module):
    """Turns a projection into a log-decay: `-e^A softplus(x + b)`, or bounded, `floor sigmoid(x)`.

    The initial values are Mamba-2's (Dao, Gu 2024): decays per token between about e^-0.001 and
    e^-1.6.
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
        bias = own(self.bias, x)
        if self.floor is not None:
            return self.floor * torch.sigmoid(wide(x) + bias)
        return -own(self.log_rate, x).exp() * F.softplus(wide(x) + bias)


def of_heads(heads: int) -> Tensor:
    """RetNet's log-decays (Sun et al. 2023): log(1 - 2^(-5-h)) of head h, `[heads]`."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64, device="cpu"))))


def drawn(*shape: int, read: bool = True) -> Tensor:
    """Log-decays from -0.001 to -0.5, uniform in their logarithm; of a state that is read.

    One that only moves other states, as a momentum or a copy does, forgets at once: from -0.5 to
    -3. It would otherwise go on moving them in directions that they have left.
    """
    low, high = (1e-3, 0.5) if read else (0.5, 3.0)
    size = torch.empty(shape, dtype=torch.float64, device="cpu")
    return -size.uniform_(math.log(low), math.log(high)).exp()


def start(
    log_decay: Node,
    name: str,
    activations: Mapping[str, Callable[[Tensor], Tensor]],
    params: Mapping[str, float],
    wanted: Tensor,
) -> Tensor:
    """What to begin an operand of a decay with, before its activation, the other operands at 0.

    Args:
        log_decay: the declaration's expression.
        name: the operand.
        activations: of every operand, by name.
        params: run-time floats of the call.
        wanted: log-decays, of any shape; where there is none such, the nearest.

    Returns:
        Numbers from -20 to 20 of the shape of `wanted`.
    """
    target = wanted.double().reshape(-1, 1)
    centre, width = torch.zeros_like(target), _WIDEST
    grid = torch.linspace(-1.0, 1.0, _POINTS, dtype=torch.float64, device="cpu")
    for _ in range(_ROUNDS):
        tried = (centre + width * grid).clamp(-_WIDEST, _WIDEST)
        missed = (_values(log_decay, name, activations, params, tried) - target).abs()
        centre = tried.gather(1, missed.nan_to_num(math.inf).argmin(1, keepdim=True))
        width *= 2.0 / _POINTS
    return centre.reshape(wanted.shape)


def _values(
    log_decay: Node,
    name: str,
    activations: Mapping[str, Callable[[Tensor], Tensor]],
    params: Mapping[str, float],
    tried: Tensor,
) -> Tensor:
    """The log-decays where the operand starts at `tried`, of its shape."""
    env = {}
    for n in topological(log_decay):
        if n.op is Op.OPERAND:
            own = str(n.attrs[0])
            x = activations[own](tried if own == name else torch.zeros_like(tried)).flatten()
            env[n] = x if n.kind is Kind.SCALAR else x[:, None]
        elif n.op is Op.PARAM:
            env[n] = torch.tensor(params[str(n.attrs[0])], dtype=torch.float64, device="cpu")
    return oracle.evaluate([log_decay], env)[0].reshape(tried.shape)
