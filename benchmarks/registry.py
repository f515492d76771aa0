"""The recurrences and shapes of the benchmarks, and how operands are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.ir import Kind, Op, Per
from chunkwise.dsl.library import by_name
from chunkwise.dsl.normal_form import NormalForm, Operand
from chunkwise.runtime.inputs import NEGATIVE, Range, Ranges, ranges, usual_params
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A recurrence of the library.

    Attributes:
        fixed: the operands that peers compute by themselves and give no gradient, as functions of
            the number of the head.
        beside: recurrences of the library that are timed in the same rounds, each with how many
            times its time is allowed.
        split: keys have D / split channels, since as many states make one of D.
    """

    name: str
    fixed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    split: int = 1

    @property
    def declared(self) -> Declaration:
        return by_name(self.name)

    @property
    def form(self) -> NormalForm:
        return self.declared.normal_form(self.declared.default_micro)

    @property
    def differentiated(self) -> tuple[Operand, ...]:
        """The operands that get a gradient."""
        return tuple(o for o in self.form.operands if o.name not in self.fixed)

    @property
    def gates(self) -> tuple[str, ...]:
        """How its log-decays can be drawn: `GATES`, or one way if the caller passes none."""
        return GATES if self._log_decays.keys() - self.fixed.keys() else ("",)

    @property
    def _log_decays(self) -> dict[str, Range]:
        return {name: r for name, r in self._ranges.gates if r == NEGATIVE}

    @property
    def _ranges(self) -> Ranges:
        return ranges(self.form, usual_params(self.form))

    def entries(self, x: Operand, normal: Tensor, gates: str) -> Tensor:
        """The operand `x` of normal samples, with `gates` drawn as `GATES` says."""
        found = self._ranges
        y = found.entries(x, normal)
        if x.name not in dict(found.gates):
            return y
        if gates == "strong" and x.name in self._log_decays:
            return -5.0 * normal.sigmoid() if x.kind is Kind.KEY else 2.0 * y
        return 0.5 * y


# log-decays of a head have mean -0.4 or -1.6, those of a channel -0.4 or -2.5 with no one below -5
GATES = ("mild", "strong")


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
        Case("linear_attention"),
        Case("retention", {"g": _retention}),
        Case("simple_gla"),
        Case("delta_rule"),
        Case("gated_delta_rule"),
        Case("gla"),
        Case("kda"),
        Case("dplr"),
        Case("rwkv7"),
        Case("comba"),
        Case("gated_delta_product"),
        Case("mamba2"),
        Case("momentum_delta", beside={"gated_delta_rule": 1.6}),
        Case("mamba3", beside={"simple_gla": 1.3}, split=2),
        Case("gsa", beside={"gla": 2.2}),
    )
}


def sizes(case: Case, x: Operand, s: Shape) -> tuple[int, ...]:
    """The shape of operand `x` of `case` at `s`."""
    by_letter = {"B": s.B, "T": s.T, "H": s.H, "HV": s.H, "K": s.D // case.split, "V": s.D}
    return tuple({**by_letter, "n": case.declared.default_micro}[a] for a in x.axes)


def dtype_of(x: Operand, dtype: torch.dtype) -> torch.dtype:
    """Gates and step sizes of a head are small, and float32 whatever the dtype of a run."""
    narrow = x.per is Per.TOKEN and x.kind is not Kind.SCALAR
    return dtype if narrow else torch.float32


def draw(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    gates: str = "mild",
) -> dict[str, Tensor]:
    """The operands of a call, as leaves that require gradients, except those in `Case.fixed`.

    They lie in ranges that models produce, and the operand that reads the state is divided by the
    square root of its channels, the peers' scale.
    """
    form, generator = case.form, torch.Generator(device=device).manual_seed(seed)
    read = {r.key.attrs[0] for r in form.reads if r.key.op is Op.OPERAND}
    made = {}
    for x in form.operands:
        y = torch.randn(sizes(case, x, shape), generator=generator, device=device)
        if x.name in case.fixed:
            y = case.fixed[x.name](torch.arange(shape.H, device=device).float())
        elif x.name in read:
            y = y * shape.D**-0.5
        else:
            y = case.entries(x, y, gates)
        made[x.name] = y.to(dtype_of(x, dtype)).requires_grad_(x.name not in case.fixed)
    return made


def cotangent(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """A gradient of the output, `[B,T,H,D]`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = (shape.B, shape.T, shape.H, shape.D)
    return torch.randn(sizes, generator=generator, device=device).to(dtype)


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
        return math.prod(sizes(case, x, shape)) * dtype_of(x, dtype).itemsize

    inputs = sum(map(size, case.form.operands))
    gradients = sum(map(size, case.differentiated))
    output = shape.B * shape.T * shape.H * shape.D * dtype.itemsize
    return inputs + output, inputs + output + gradients
