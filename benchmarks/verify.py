"""Checks the results of both sides against the float64 oracle, before anything is timed.

Heads and sequences are independent, so that a fixed sample of (batch, head) pairs suffices. It is
cut out of operands, output and gradients, and the oracle runs the declared step on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def sample(shape: Shape) -> list[tuple[int, int]]:
    """The (batch, head) pairs that are checked: the first, the last, and one in between."""
    pairs = shape.B * shape.H
    chosen = sorted({0, pairs // 2 + shape.H // 2, pairs - 1} & set(range(pairs)))[:SAMPLE]
    return [divmod(p, shape.H) for p in chosen]


def cut(x: Tensor, pairs: list[tuple[int, int]], per: Per = Per.TOKEN) -> Tensor:
    """The sampled heads of `x` as the heads of one batch entry, in float64."""
    if per is Per.HEAD:
        return x[[h for _, h in pairs]].double()
    return torch.stack([x[b, :, h] for b, h in pairs], 1)[None].double()


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
        x.name: cut(operands[x.name].detach(), pairs, x.per).requires_grad_(
            x in case.differentiated
        )
        for x in case.form.operands
    }
    o, _ = step_oracle.run(op.declaration.step(), leaves, cu_seqlens=cu_seqlens)
    wanted = [x.name for x in case.differentiated]
    grads = torch.autograd.grad(o, [leaves[n] for n in wanted], cut(do, pairs))
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def compare(
    call: Callable[[], Tensor],
    case: Case,
    operands: Mapping[str, Tensor],
    do: Tensor,
    expected: Mapping[str, Tensor],
    pairs: list[tuple[int, int]],
) -> list[TensorError]:
    """The errors of one side's output and gradients on the sampled heads."""
    for operand in operands.values():
        operand.grad = None
    limits = TOLERANCE[do.dtype]
    with torch.no_grad():
        # without gradients, other kernels may run than those that save values for a backward
        inferred = _error("o alone", cut(call(), pairs), expected["o"], limits.outputs)
    o = call()
    o.backward(do)
    errors = [
        inferred,
        _error("o", cut(o.detach(), pairs), expected["o"], limits.outputs),
    ]
    for x in case.differentiated:
        errors.append(_gradient_error(x, operands[x.name].grad, expected, limits, pairs))
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
    return _error(f"d{x.name}", cut(grad, pairs, x.per), expected[f"d{x.name}"], limit)


def _error(name: str, got: Tensor, expected: Tensor, limit: float) -> TensorError:
    return TensorError(name, *relative_errors(got, expected), limit)
