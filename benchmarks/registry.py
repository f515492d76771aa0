"""The recurrences and shapes of the benchmarks, how operands are drawn, and the peers' calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from chunkwise.dsl.ir import Kind, Op, Per
from chunkwise.dsl.library import by_name
from chunkwise.dsl.normal_form import NormalForm, Operand
from chunkwise.runtime.inputs import ranges, usual_params
from torch import Tensor

from . import peers


@dataclass(frozen=True, slots=True)
class Case:
    """A recurrence of the library, and the peer's call of the same recurrence if there is one.

    `fixed` has the operands that the peer computes by itself and gives no gradient, as functions of
    the number of the head.
    """

    name: str
    peer: Callable[..., Tensor] | None
    fixed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    # fla refuses this backward on Triton 3.4.0 to 3.7.0 on Hopper: its results are wrong there
    peer_backward_refused: bool = False

    @property
    def form(self) -> NormalForm:
        return by_name(self.name).normal_form()

    @property
    def differentiated(self) -> tuple[Operand, ...]:
        """The operands that get a gradient."""
        return tuple(o for o in self.form.operands if o.name not in self.fixed)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a call with K = V = D; the `lengths` of packed sequences sum to T."""

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


def _retention(heads: Tensor) -> Tensor:
    """RetNet's log-decay of head h."""
    return torch.log1p(-(2.0 ** (-5 - heads)))


CASES = {
    c.name: c
    for c in (
        Case("linear_attention", peers.linear_attention),
        Case("retention", peers.retention, {"g": _retention}),
        Case("simple_gla", peers.simple_gla, peer_backward_refused=True),
        Case("delta_rule", peers.delta_rule),
        Case("gated_delta_rule", peers.gated_delta_rule, peer_backward_refused=True),
        Case("gla", peers.gla),
        Case("kda", peers.kda),
        Case("dplr", None),
    )
}


def sizes(x: Operand, s: Shape) -> tuple[int, ...]:
    """The shape of operand `x` at `s`."""
    by_letter = {"B": s.B, "T": s.T, "H": s.H, "HV": s.H, "K": s.D, "V": s.D}
    return tuple(by_letter[a] for a in x.axes)


def dtype_of(x: Operand, dtype: torch.dtype) -> torch.dtype:
    """Gates and step sizes of a head are small, and float32 whatever the dtype of a run."""
    narrow = x.per is Per.TOKEN and x.kind is not Kind.SCALAR
    return dtype if narrow else torch.float32


def draw(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """The operands of a call, as leaves that require gradients, except those in `Case.fixed`.

    They lie in ranges that models produce: log-decays are mild, and the operand that reads the
    state is divided by the square root of its channels, the peers' scale.
    """
    form, generator = case.form, torch.Generator(device=device).manual_seed(seed)
    found = ranges(form, usual_params(form))
    gates, read = dict(found.gates), {r.key.attrs[0] for r in form.reads if r.key.op is Op.OPERAND}
    made = {}
    for x in form.operands:
        y = torch.randn(sizes(x, shape), generator=generator, device=device)
        if x.name in case.fixed:
            y = case.fixed[x.name](torch.arange(shape.H, device=device).float())
        elif x.name in read:
            y = y * shape.D**-0.5
        else:
            y = found.entries(x, y) * (0.5 if x.name in gates else 1.0)
        made[x.name] = y.to(dtype_of(x, dtype)).requires_grad_(x.name not in case.fixed)
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

    def size(x: Operand) -> int:
        return math.prod(sizes(x, shape)) * dtype_of(x, dtype).itemsize

    inputs = sum(map(size, case.form.operands))
    gradients = sum(map(size, case.differentiated))
    output = shape.B * shape.T * shape.H * shape.D * dtype.itemsize
    return inputs + output, inputs + output + gradients
