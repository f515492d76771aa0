"""The sizes of a call by letter, from its tensors' shapes, or the refusal of a tensor at fault.

The letters: B batch, T tokens, H heads of the Keys, HV value heads, K and V channels, n micro-steps
(or their number, where kernels are printed for that many), N sequences.

This file imports torch only, because exported packages carry it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Letters = Sequence[str]


class Fault(NamedTuple):
    """A tensor at fault.

    Attributes:
        kind: "shape", "device", "layout", "heads", "batch" or "cu_seqlens".
        got, expected: what the tensor `name` has, and what was expected.
        sizes: of a shape, what is known of sizes by letter.
    """

    kind: str
    name: str
    got: Any
    expected: str
    sizes: Mapping[str, int] = {}  # never changed


Refuse = Callable[[Fault], Exception]


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


def pattern(letters: Letters) -> str:
    """The shape that an operand must have: `[B,T,H|HV,K]`."""
    return "[" + ",".join("H|HV" if a == "H" else a for a in letters) + "]"


def measure(
    operands: Mapping[str, Letters],
    forms: Sequence[Form],
    states: Mapping[str, Letters],
    starts: Sequence[Form | None],
    cu_seqlens: Form | None,
    refuse: Refuse,
) -> dict[str, int]:
    """Compare the forms of operands, first states and boundaries; the sizes by letter.

    Raises what `refuse` makes of the first fault.
    """
    device = forms[0].device
    known: dict[str, tuple[int, str]] = {}
    key_heads: dict[str, int] = {}
    for (name, letters), form in zip(operands.items(), forms, strict=True):
        _check_place(name, form, device, refuse)
        expected, fault = pattern(letters), ""
        if len(form.shape) != len(letters):
            raise refuse(Fault("shape", name, form.shape, f"{expected}, {len(letters)} axes"))
        for letter, size in zip(letters, form.shape, strict=True):
            if letter == "H":
                key_heads[name] = size
            elif letter == "n" and size == 0:
                fault = f"{expected} with at least one micro-step"
            elif letter.isdigit() and size != int(letter):
                fault = expected
            elif known.setdefault(letter, (size, name))[0] != size:
                have, of = known[letter]
                fault = f"{expected} with {letter} = {have}, as in operand {of!r}"
            if fault:
                so_far = {a: n for a, (n, _) in known.items()}
                raise refuse(Fault("shape", name, form.shape, fault, so_far))
    if "HV" not in known:
        widest = max(key_heads, key=lambda name: key_heads[name])
        known["HV"] = (key_heads[widest], widest)
    # no operand says so only where no state has the axis
    sizes = {"K": 1, "V": 1, **{letter: size for letter, (size, _) in known.items()}}
    sizes["H"] = _heads_of_keys(key_heads, *known["HV"], refuse)
    sizes["N"] = sizes["B"]
    if cu_seqlens is not None:
        check_packing(cu_seqlens, *known["B"], device, refuse)
        sizes["N"] = cu_seqlens.shape[0] - 1
    for (name, letters), start in zip(states.items(), starts, strict=True):
        if start is not None:
            what = f"initial_state ({name})"
            _check_place(what, start, device, refuse)
            shape = [sizes[a] for a in letters]
            if list(start.shape) != shape:
                expected = f"{pattern(letters)} = {shape}"
                raise refuse(Fault("shape", what, start.shape, expected, sizes))
    return sizes


def check_boundaries(cu_seqlens: Tensor, T: int, refuse: Refuse) -> None:
    """That `cu_seqlens` rises from 0 to T; waits for its device, so only for CPU tensors or checks.

    Raises what `refuse` makes of the first entry at fault.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise refuse(Fault("cu_seqlens", "cu_seqlens", f"{bounds[0]} at [0]", "0"))
    for n in range(1, len(bounds)):
        if bounds[n] < bounds[n - 1]:
            got = f"{bounds[n]} at [{n}] after {bounds[n - 1]}"
            raise refuse(Fault("cu_seqlens", "cu_seqlens", got, "offsets that do not decrease"))
    if bounds[-1] != T:
        got, expected = f"{bounds[-1]} at [{len(bounds) - 1}]", "the length of the packed operands"
        raise refuse(Fault("cu_seqlens", "cu_seqlens", got, f"T = {T}, {expected}"))


def _check_place(name: str, form: Form, device: torch.device, refuse: Refuse) -> None:
    if form.layout is not torch.strided:
        raise refuse(Fault("layout", name, form.layout, "torch.strided"))
    if form.device != device:
        raise refuse(Fault("device", name, form.device, str(device)))


def _heads_of_keys(key_heads: Mapping[str, int], HV: int, witness: str, refuse: Refuse) -> int:
    """H: the head count of the Keys that do not belong to the value heads."""
    grouped = {name: heads for name, heads in key_heads.items() if heads != HV}
    if not grouped:
        return HV
    first, H = next(iter(grouped.items()))
    for name, heads in grouped.items():
        if heads != H:
            expected = f"{H} as operand {first!r} has, or {HV} as operand {witness!r} has"
            raise refuse(Fault("heads", name, heads, expected))
    if H == 0 or HV % H != 0:
        expected = f"{HV} as operand {witness!r} has, or a divisor of that"
        raise refuse(Fault("heads", first, H, expected))
    return H


def check_packing(
    cu_seqlens: Form, B: int, witness: str, device: torch.device, refuse: Refuse
) -> None:
    """That `cu_seqlens` may be boundaries within the B rows of the operand `witness`."""
    if cu_seqlens.device.type == "cpu":  # boundaries may come from the host
        device = cu_seqlens.device
    _check_place("cu_seqlens", cu_seqlens, device, refuse)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"of dtype {cu_seqlens.dtype}"
        raise refuse(Fault("cu_seqlens", "cu_seqlens", got, "int32 or int64"))
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 2:
        got = f"of shape {list(cu_seqlens.shape)}"
        expected = "[N+1], the boundaries of N >= 1 sequences"
        raise refuse(Fault("cu_seqlens", "cu_seqlens", got, expected))
    if B != 1:
        raise refuse(Fault("batch", witness, B, "1, as cu_seqlens packs sequences along T"))
