"""Checks the results of both sides against the float64 oracle, before anything is timed.

Heads and sequences are independent, so that a fixed sample of (batch, head) pairs suffices. It is
cut out of operands, output and gradients, and the oracle runs the declared step on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from chunkwise.autotune.tolerance import BY_DTYPE, FLOAT32_HARD, Tolerance, relative_errors, within
from chunkwise.dsl import oracle as step_oracle
from chunkwise.dsl.ir import Per
from chunkwise.dsl.normal_form import Operand
from torch import Tensor

from .registry import Case, Shape

# a float32 product is three tf32 products, and sums have thousands of terms
TOLERANCE = {
    **BY_DTYPE,
    torch.float32: FLOAT32_HARD,
    torch.float64: Tolerance(1e-9, 1e-9, 1e-9),
}
SAMPLE = 3


@dataclass(frozen=True, slots=True)
class TensorError:
    """The relative RMS and maximum error of one tensor, and the limit of its RMS error."""

    name: str
    rms: float
    maximum: float
    limit: float

    @property
    def ok(self) -> bool:
        return within(self.rms, self.maximum, self.limit)

    def __str__(self) -> str:
        mark = "" if self.ok else " FAILED"
        return f"{self.name} {self.rms:.1e} (max {self.maximum:.1e}){mark}"


@dataclass(frozen=True, slots=True)
class Side:
    """One side's call, whose gradients can be compared with the oracle's.

    Attributes:
        call: the output.
        operands: ours, by name.
        own: what the call reads, leaves; ours where they are the same.
        made: `own` as it was made of ours, by which gradients find their way back; None likewise.
        note: what is to be said of its backward.
    """

    call: Callable[[], Tensor]
    operands: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    made: Mapping[str, Tensor] | None = None
    note: str | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient from a backward."""
        return [x for x in self.own.values() if x.requires_grad]

    def gradients(self) -> dict[str, Tensor | None]:
        """Those of our operands, after a backward."""
        for name, made in (self.made or {}).items():
            if (grad := self.own[name].grad) is not None:
                made.backward(grad, retain_graph=True)
        return {name: x.grad for name, x in self.operands.items()}


def sample(case: Case, shape: Shape) -> list[tuple[int, int]]:
    """The (batch, head) pairs that are checked: the first, the last, and one in between.

    The gradient of a head's own operand is a sum over the batch: then the last head is checked, in
    every batch entry.
    """
    if any(x.per is Per.HEAD for x in case.differentiated):
        return [(b, shape.H - 1) for b in range(shape.B)]
    pairs = shape.B * shape.H
    chosen = sorted({0, pairs // 2 + shape.H // 2, pairs - 1} & set(range(pairs)))[:SAMPLE]
    return [divmod(p, shape.H) for p in chosen]


def cut(x: Tensor, pairs: list[tuple[int, int]], axes: Sequence[str]) -> Tensor:
    """The sampled heads of `x`, in float64: `[B,T,...,H,...]` as the heads of one batch entry.

    An operand of heads, `[H,...]`, has each head once.
    """
    if axes[0] != "B":
        return x[sorted({h for _, h in pairs})].double()
    heads = axes.index("H" if "H" in axes else "HV")
    return torch.stack([x[b].select(heads - 1, h) for b, h in pairs], heads - 1)[None].double()


_OUTPUT = ("B", "T", "HV", "V")


def oracle(
    op: Any,
    case: Case,
    operands: Mapping[str, Tensor],
    do: Tensor,
    cu_seqlens: Tensor | None,
    pairs: list[tuple[int, int]],
) -> dict[str, Tensor]:
    """Output and gradients of the sampled heads in float64, by the declared step and autograd."""
    leaves = {
        x.name: cut(operands[x.name].detach(), pairs, x.axes).requires_grad_(
            x in case.differentiated
        )
        for x in case.form.operands
    }
    step = op.declaration.step(case.declared.default_micro)
    heads = sorted({h for _, h in pairs})
    index = [heads.index(h) for _, h in pairs]
    given = {
        x.name: leaves[x.name][index] if x.per is Per.HEAD else leaves[x.name]
        for x in case.form.operands
    }
    o, _ = step_oracle.run(step, given, cu_seqlens=cu_seqlens)
    wanted = [x.name for x in case.differentiated]
    grads = torch.autograd.grad(o, [leaves[n] for n in wanted], cut(do, pairs, _OUTPUT))
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def compare(
    side: Side,
    case: Case,
    do: Tensor,
    expected: Mapping[str, Tensor],
    pairs: list[tuple[int, int]],
) -> list[TensorError]:
    """The errors of one side's output and gradients on the sampled heads."""
    for leaf in (*side.operands.values(), *side.own.values()):
        leaf.grad = None
    limits = TOLERANCE[do.dtype]
    with torch.no_grad():
        # without gradients, other kernels may run than those that save values for a backward
        inferred = _error(
            "o alone", cut(side.call(), pairs, _OUTPUT), expected["o"], limits.outputs
        )
    o = side.call()
    o.backward(do)
    errors = [
        inferred,
        _error("o", cut(o.detach(), pairs, _OUTPUT), expected["o"], limits.outputs),
    ]
    found = side.gradients()
    for x in case.differentiated:
        errors.append(_gradient_error(x, found[x.name], expected, limits, pairs))
    return errors


def _gradient_error(
    x: Operand,
    grad: Tensor | None,
    expected: Mapping[str, Tensor],
    limits: Tolerance,
    pairs: list[tuple[int, int]],
) -> TensorError:
    limit = limits.gradients if x.name in ("q", "k", "v") else limits.gates
    if grad is None:
        return TensorError(f"d{x.name}", float("nan"), float("nan"), limit)
    return _error(f"d{x.name}", cut(grad, pairs, x.axes), expected[f"d{x.name}"], limit)


def _error(name: str, got: Tensor, expected: Tensor, limit: float) -> TensorError:
    return TensorError(name, *relative_errors(got, expected), limit)
