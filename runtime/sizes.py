"""The sizes of a call, from shapes alone, or the error that names the operand at fault.

A pure function of what never changes from one training step to the next, hence remembered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import Operand
from . import shapes
from .shapes import Fault, Form, pattern

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call by the letters of `shapes`, and `micro`, the entries of its tuples.

    N is B, or the number of packed sequences. `dtype` is that of the first Value operand, and of
    the output.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    micro: int
    dtype: torch.dtype
    device: torch.device


def shape_of(x: Operand) -> str:
    """The shape an operand must have, in letters: `[B,T,H|HV,K]`."""
    return pattern(x.axes)


def measure(
    declaration: Declaration,
    operands: tuple[Form, ...],
    states: tuple[Form | None, ...],
    cu_seqlens: Form | None,
) -> Sizes:
    """Compare the operands' forms, in the declaration's order, and name the sizes.

    Raises:
        MissingOperand: no operand has tokens.
        BadShape, BadDtype, BadDevice, BadLayout, HeadMismatch, BadBatch, BadCuSeqlens: as their
            names say.
    """
    declared = {x.name: x for x in declaration.operands}
    if all(x.per is Per.HEAD for x in declaration.operands):
        raise errors.MissingOperand(
            "per token", "Key, Value or Scalar", "[B,T,...]", op=declaration.name
        )

    def refuse(fault: Fault) -> Exception:
        x = declared.get(fault.name)
        return refusal(fault, kind="" if x is None else x.spelled)

    sizes = shapes.measure(
        {x.name: x.axes for x in declaration.operands},
        operands,
        {s.name: s.axes for s in declaration.states},
        states,
        cu_seqlens,
        refuse,
    )
    starts = (f"initial_state ({s.name})" for s in declaration.states)
    for name, form in zip((*declared, *starts), (*operands, *states), strict=True):
        if form is not None and form.dtype not in FLOATS:
            expected = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
            raise errors.BadDtype(name, str(form.dtype), f"one of {expected}")
    values = (
        form
        for x, form in zip(declaration.operands, operands, strict=True)
        if x.kind is Kind.VALUE and x.per is Per.TOKEN
    )
    lead = next(values, operands[0])
    axes = {a: sizes[a] for a in ("B", "T", "H", "HV", "K", "V", "N")}
    micro = int(sizes.get("n", 1))  # of torch.compile's symbols too: it decides what is traced
    return Sizes(**axes, micro=micro, dtype=lead.dtype, device=operands[0].device)


measured = lru_cache(maxsize=4096)(measure)


def _other_order(fault: Fault) -> str:
    """What mends a shape whose axes are in another library's order; empty for other shapes."""
    got, sizes = list(fault.got), fault.sizes
    if "N" in sizes and got == [sizes[a] for a in ("N", "HV", "V", "K")]:
        return "states are K×V: a V×K state is passed as x.transpose(-1, -2)"
    if "T" in sizes and "N" not in sizes and got[1:2] != [sizes["T"]] and got[2:3] == [sizes["T"]]:
        return (
            "time comes before heads: a head-first tensor [B,H,T,…] is passed as x.transpose(1, 2)"
        )
    return ""


def refusal(fault: Fault, *, kind: str = "") -> Exception:
    """The error of a fault that `shapes` found; `kind`: of the operand at fault."""
    name, got, expected = fault.name, fault.got, fault.expected
    if fault.kind == "shape":
        return errors.BadShape(name, got, expected, kind=kind, help=_other_order(fault))
    if fault.kind == "layout":
        return errors.BadLayout(name, f"a tensor of layout {got}")
    if fault.kind == "device":
        return errors.BadDevice(name, str(got), expected)
    if fault.kind == "heads":
        return errors.HeadMismatch(name, got, expected)
    if fault.kind == "batch":
        return errors.BadBatch(name, got, expected, help="reshape the operands to [1, B*T, ...]")
    return errors.BadCuSeqlens(str(got), expected)


def check_packing(cu_seqlens: Tensor, x: Tensor, name: str) -> None:
    """That `cu_seqlens` packs the operand `name`, `[B,T,...]`; waits for its device.

    Raises:
        BadCuSeqlens, BadBatch: as their names say.
    """
    shapes.check_packing(Form.of(cu_seqlens), x.shape[0], name, x.device, refusal)
    check_boundaries(cu_seqlens, x.shape[1])


def check_boundaries(cu_seqlens: Tensor, T: int) -> None:
    """That `cu_seqlens` rises from 0 to T; waits for its device, so only for CPU tensors or checks.

    Raises:
        BadCuSeqlens: names the first entry at fault.
    """
    shapes.check_boundaries(cu_seqlens, T, refusal)
