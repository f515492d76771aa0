"""The sizes of a call, from shapes alone, or the error that names the operand at fault.

A pure function of what never changes from one training step to the next, hence remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import Operand, StateDecl

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRAILING = {Kind.SCALAR: (), Kind.KEY: ("K",), Kind.VALUE: ("V",)}


class Form(NamedTuple):
    """What is known of a tensor without looking into it."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout = torch.strided

    @classmethod
    def of(cls, x: Tensor) -> Form:
        """That of a tensor."""
        return cls(x.shape, x.dtype, x.device, x.layout)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call (`Call` says what each is), its output's dtype, its device."""

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


def kind_name(x: Operand) -> str:
    """The operand's kind as the user wrote it."""
    bare = x.kind.name.title()
    if x.micro:
        return f"tuple[{bare}, ...]"
    return f"Head{bare}" if x.per is Per.HEAD else bare


def letters(x: Operand) -> tuple[str, ...]:
    """An operand's axes; n counts micro-steps, H the heads of Keys, which may divide the others."""
    if x.per is Per.HEAD:
        return ("HV", *_TRAILING[x.kind])
    micro = ("n",) if x.micro else ()
    return ("B", "T", *micro, "H" if x.kind is Kind.KEY else "HV", *_TRAILING[x.kind])


def state_letters(state: StateDecl) -> tuple[str, ...]:
    """A state's axes: `N HV K V`, or `N HV K`."""
    return ("N", "HV", "K", "V") if state.kind is Kind.STATE else ("N", "HV", "K")


def pattern(x: Operand) -> str:
    """The shape an operand must have, in letters: `[B,T,H|HV,K]`."""
    return "[" + ",".join("H|HV" if a == "H" else a for a in letters(x)) + "]"


def measure(
    declaration: Declaration,
    operands: tuple[Form, ...],
    states: tuple[Form | None, ...],
    cu_seqlens: Form | None,
) -> Sizes:
    """Compare the operands' forms, in the declaration's order, and name the sizes.

    Raises:
        BadShape, BadDtype, BadDevice, HeadMismatch, BadBatch, BadCuSeqlens: as their names say.
    """
    device = operands[0].device
    sizes: dict[str, tuple[int, str]] = {}
    key_heads: dict[str, int] = {}
    for x, form in zip(declaration.operands, operands, strict=True):
        _check_placement(x.name, form, device)
        _compare(x, form.shape, sizes, key_heads)
    if "T" not in sizes:
        raise errors.MissingOperand(
            "per token", "Key, Value or Scalar", "[B,T,...]", op=declaration.name
        )
    if "HV" not in sizes:
        widest = max(key_heads, key=lambda n: key_heads[n])
        sizes["HV"] = (key_heads[widest], widest)
    B, T, HV = (sizes[s][0] for s in ("B", "T", "HV"))
    # no operand says so only where no state has the axis
    K, V = (sizes.get(s, (1, ""))[0] for s in ("K", "V"))
    if cu_seqlens is not None:
        _check_packing(cu_seqlens, B, sizes["B"][1], device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for state, start in zip(declaration.states, states, strict=True):
        if start is not None:
            what = f"initial_state ({state.name})"
            _check_placement(what, start, device)
            axes = state_letters(state)
            expected = [{"N": N, "HV": HV, "K": K, "V": V}[a] for a in axes]
            if list(start.shape) != expected:
                raise errors.BadShape(what, start.shape, f"[{','.join(axes)}] = {expected}")
    lead = next(
        (
            form
            for x, form in zip(declaration.operands, operands, strict=True)
            if x.kind is Kind.VALUE and x.per is Per.TOKEN
        ),
        operands[0],
    )
    return Sizes(
        B=B,
        T=T,
        H=_key_heads(key_heads, HV, sizes["HV"][1]),
        HV=HV,
        K=K,
        V=V,
        N=N,
        micro=int(sizes.get("n", (1, ""))[0]),
        dtype=lead.dtype,
        device=device,
    )


measured = lru_cache(maxsize=4096)(measure)


def _check_placement(name: str, form: Form, device: torch.device) -> None:
    _check_layout(name, form)
    if form.dtype not in FLOATS:
        raise errors.BadDtype(
            name, str(form.dtype), "one of " + ", ".join(str(d)[len("torch.") :] for d in FLOATS)
        )
    if form.device != device:
        raise errors.BadDevice(name, str(form.device), str(device))


def _check_layout(name: str, form: Form) -> None:
    if form.layout is not torch.strided:
        raise errors.BadLayout(name, f"a tensor of layout {form.layout}")


def _compare(
    x: Operand, shape: Sequence[int], sizes: dict[str, tuple[int, str]], key_heads: dict[str, int]
) -> None:
    """Compare one operand's shape with the sizes known so far; add those it is first to show."""
    axes = letters(x)
    if len(shape) != len(axes):
        raise errors.BadShape(x.name, shape, f"{pattern(x)}, {len(axes)} axes", kind=kind_name(x))
    for letter, size in zip(axes, shape, strict=True):
        if letter == "H":
            key_heads[x.name] = size
            continue
        known = sizes.setdefault(letter, (size, x.name))
        if known[0] != size:
            raise errors.BadShape(
                x.name,
                shape,
                f"{pattern(x)} with {letter} = {known[0]}, as in operand {known[1]!r}",
                kind=kind_name(x),
            )
    if x.micro and shape[2] == 0:
        raise errors.BadShape(
            x.name, shape, f"{pattern(x)} with at least one micro-step", kind=kind_name(x)
        )


def _key_heads(key_heads: dict[str, int], HV: int, witness: str) -> int:
    """H: the head count of the Keys that do not belong to the value heads."""
    grouped = {n: h for n, h in key_heads.items() if h != HV}
    if not grouped:
        return HV
    first, H = next(iter(grouped.items()))
    for name, h in grouped.items():
        if h != H:
            raise errors.HeadMismatch(
                name, h, f"{H} as operand {first!r} has, or {HV} as operand {witness!r} has"
            )
    if H == 0 or HV % H != 0:
        raise errors.HeadMismatch(
            first, H, f"{HV} as operand {witness!r} has, or a divisor of that"
        )
    return H


def _check_packing(cu_seqlens: Form, B: int, witness: str, device: torch.device) -> None:
    _check_layout("cu_seqlens", cu_seqlens)
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise errors.BadDevice("cu_seqlens", str(cu_seqlens.device), str(device))
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.BadCuSeqlens(f"of dtype {cu_seqlens.dtype}", "int32 or int64")
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 2:
        raise errors.BadCuSeqlens(
            f"of shape {list(cu_seqlens.shape)}", "[N+1], the boundaries of N >= 1 sequences"
        )
    if B != 1:
        raise errors.BadBatch(
            witness,
            B,
            "1, as cu_seqlens packs sequences along T",
            help="reshape the operands to [1, B*T, ...]",
        )
