"""One bound and checked call: every mistake a caller can make is named here, before an engine runs.

Nothing in this file but `check_boundaries` reads what a tensor holds, so nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import NormalForm, Operand, StateDecl

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration, Step

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRAILING = {Kind.SCALAR: (), Kind.KEY: ("K",), Kind.VALUE: ("V",)}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a recurrence whose shapes, dtypes and devices agree.

    `operands` are as the user passed them: Key `[B,T,H,K]` or `[B,T,HV,K]`, Value `[B,T,HV,V]`,
    Scalar `[B,T,HV]`, per head `[HV]`, `[HV,K]`, `[HV,V]`; those of micro-steps `[B,T,n,...]`.
    `initial` has one entry per state, `[N,HV,K,V]` or `[N,HV,K]`. N is B, or the number of packed
    sequences. `dtype` is that of the first Value operand, and of the output.
    """

    declaration: Declaration
    operands: dict[str, Tensor]
    params: dict[str, float]
    initial: tuple[Tensor | None, ...]
    cu_seqlens: Tensor | None
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

    @property
    def step(self) -> Step:
        """The traced step, retraced for this number of micro-steps."""
        return self.declaration.step(self.micro)

    @property
    def form(self) -> NormalForm:
        """The normal form; raises NotAffine for a step that only the reference engine can run."""
        return self.declaration.normal_form(self.micro)

    @property
    def state_dtype(self) -> torch.dtype:
        """What states are computed and returned in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def state_shape(self, state: StateDecl) -> tuple[int, ...]:
        """`[N,HV,K,V]`, or `[N,HV,K]` for a KeyState."""
        tail = (self.K, self.V) if state.kind is Kind.STATE else (self.K,)
        return (self.N, self.HV, *tail)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`[B,T,HV,V]` for an output that is a Value."""
        tail = {Kind.VALUE: (self.V,), Kind.KEY: (self.K,)}.get(self.step.output.kind, ())
        return (self.B, self.T, self.HV, *tail)


def arrange(
    declaration: Declaration, args: Sequence[object], named: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Operands and parameters by name, each present once.

    Raises:
        MissingOperand, UnknownOperand: as their names say.
        BadDtype: an operand is not a tensor, or a parameter is not a number.
    """
    title = declaration.name
    expected = ", ".join(x.name for x in declaration.operands)
    if len(args) > len(declaration.operands):
        raise errors.UnknownOperand(
            f"{title}: got {len(args)} positional operands, expected {len(declaration.operands)}: "
            f"{expected}"
        )
    given = {x.name: value for x, value in zip(declaration.operands, args, strict=False)}
    for name in named:
        if name in given:
            raise errors.UnknownOperand(f"{title}: operand {name!r} was given twice")
    given.update(named)
    operands: dict[str, Tensor] = {}
    for x in declaration.operands:
        value = given.pop(x.name, None)
        if value is None:
            raise errors.MissingOperand(
                f"{title}: operand {x.name!r} is missing; expected {expected}"
            )
        if not isinstance(value, Tensor):
            raise errors.BadDtype(
                f"{title}: operand {x.name!r}: got {type(value).__name__}, "
                f"expected a tensor {pattern(x)}"
            )
        operands[x.name] = value
    params: dict[str, float] = {}
    for p in declaration.params:
        number = given.pop(p.name, None)
        if number is None:
            number = p.default
        if number is None:
            raise errors.MissingOperand(f"{title}: parameter {p.name!r} is missing: a float")
        if isinstance(number, Tensor) or not isinstance(number, (int, float)):
            raise errors.BadDtype(
                f"{title}: parameter {p.name!r}: got {type(number).__name__}, expected a Python "
                "number (it has no gradient; declare a HeadScalar for one that is learnt)"
            )
        params[p.name] = float(number)
    for name in given:
        raise errors.UnknownOperand(
            f"{title}: {name!r} is not an operand or parameter; expected {expected}"
            + "".join(f", {p.name}" for p in declaration.params)
        )
    return operands, params


def pattern(x: Operand) -> str:
    """The shape an operand must have, in letters: `[B,T,H|HV,K]`."""
    if x.per is Per.HEAD:
        return "[" + ",".join(("HV", *_TRAILING[x.kind])) + "]"
    heads = "H|HV" if x.kind is Kind.KEY else "HV"
    micro = ("n",) if x.micro else ()
    return "[" + ",".join(("B", "T", *micro, heads, *_TRAILING[x.kind])) + "]"


def bind(
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    *,
    initial_state: Tensor | Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | None = None,
) -> Call:
    """The call that these arguments mean, or the error that names the one at fault."""
    operands, params = arrange(declaration, args, named)
    initial = initial_states(declaration, initial_state)
    return describe(declaration, operands, params, initial, cu_seqlens)


def initial_states(
    declaration: Declaration, given: Tensor | Sequence[Tensor | None] | None
) -> tuple[Tensor | None, ...]:
    """One entry per declared state."""
    count = len(declaration.states)
    if given is None:
        return (None,) * count
    states = (given,) if isinstance(given, Tensor) else tuple(given)
    if len(states) != count:
        names = ", ".join(s.name for s in declaration.states)
        raise errors.BadShape(
            f"{declaration.name}: initial_state: got {len(states)} tensors, expected {count}, "
            f"one per state: ({names})"
        )
    return states


def describe(
    declaration: Declaration,
    operands: dict[str, Tensor],
    params: dict[str, float],
    initial: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
) -> Call:
    """Check shapes, dtypes and devices against one another, and name the sizes.

    Raises:
        BadShape, BadDtype, BadDevice, HeadMismatch, BadBatch, BadCuSeqlens: as their names say.
    """
    title = declaration.name
    device = next(iter(operands.values())).device
    sizes: dict[str, tuple[int, str]] = {}
    key_heads: dict[str, int] = {}
    for x in declaration.operands:
        tensor = operands[x.name]
        _check_placement(title, f"operand {x.name!r}", tensor, device)
        _measure(title, x, tensor, sizes, key_heads)
    if not {"B", "T"} <= sizes.keys():
        raise errors.BadShape(f"{title}: no operand is per token, so the length is unknown")
    if "HV" not in sizes:
        widest = max(key_heads, key=lambda n: key_heads[n])
        sizes["HV"] = (key_heads[widest], widest)
    B, T, HV = (sizes[s][0] for s in ("B", "T", "HV"))
    H = _key_heads(title, key_heads, HV, sizes["HV"][1])
    # no operand says so only where no state has the axis
    K, V = (sizes.get(s, (1, ""))[0] for s in ("K", "V"))
    micro = sizes.get("n", (1, ""))[0]
    if cu_seqlens is not None:
        _check_cu_seqlens_form(title, cu_seqlens, B)
    values = [x for x in declaration.operands if x.kind is Kind.VALUE and x.per is Per.TOKEN]
    lead = operands[(values or list(declaration.operands))[0].name]
    call = Call(
        declaration,
        operands,
        params,
        initial,
        cu_seqlens,
        B,
        T,
        H,
        HV,
        K,
        V,
        B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        micro,
        lead.dtype,
        device,
    )
    for state, start in zip(declaration.states, initial, strict=True):
        if start is not None:
            what = f"initial_state {state.name!r}"
            _check_placement(title, what, start, device)
            expected = call.state_shape(state)
            if tuple(start.shape) != expected:
                letters = "[N,HV,K,V]" if state.kind is Kind.STATE else "[N,HV,K]"
                raise errors.BadShape(
                    f"{title}: {what}: got {_shape(start)}, expected {letters} = {list(expected)}"
                )
    return call


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_placement(title: str, what: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in FLOATS:
        raise errors.BadDtype(
            f"{title}: {what}: got {tensor.dtype}, expected one of "
            + ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        )
    if tensor.device != device:
        raise errors.BadDevice(
            f"{title}: {what}: got device {tensor.device}, expected {device}, "
            "that of the first operand"
        )


def _measure(
    title: str,
    x: Operand,
    tensor: Tensor,
    sizes: dict[str, tuple[int, str]],
    key_heads: dict[str, int],
) -> None:
    """Compare one operand's shape with the sizes known so far, and add those it is first to show."""
    letters = pattern(x)[1:-1].split(",")
    if tensor.ndim != len(letters):
        raise errors.BadShape(
            f"{title}: operand {x.name!r}: got {_shape(tensor)} ({tensor.ndim} axes), "
            f"expected {pattern(x)} ({len(letters)} axes)"
        )
    for letter, size in zip(letters, tensor.shape, strict=True):
        if letter == "H|HV":
            key_heads[x.name] = size
            continue
        known = sizes.setdefault(letter, (size, x.name))
        if known[0] != size:
            raise errors.BadShape(
                f"{title}: operand {x.name!r}: got {_shape(tensor)}, expected {pattern(x)} "
                f"with {letter} = {known[0]}, as in operand {known[1]!r}"
            )
    if "n" in letters and tensor.shape[2] == 0:
        raise errors.BadShape(
            f"{title}: operand {x.name!r}: got {_shape(tensor)}, expected {pattern(x)} "
            "with at least one micro-step"
        )


def _key_heads(title: str, key_heads: dict[str, int], HV: int, witness: str) -> int:
    """H: the head count of the Keys that do not belong to the value heads."""
    grouped = {n: h for n, h in key_heads.items() if h != HV}
    if not grouped:
        return HV
    first, H = next(iter(grouped.items()))
    for name, h in grouped.items():
        if h != H:
            raise errors.HeadMismatch(
                f"{title}: operand {name!r}: got {h} heads, expected H = {H} as in operand "
                f"{first!r}, or HV = {HV} as in operand {witness!r}"
            )
    if H == 0 or HV % H != 0:
        raise errors.HeadMismatch(
            f"{title}: operand {first!r}: got H = {H} heads, expected a divisor of HV = {HV}, "
            f"the heads of operand {witness!r} (value head j uses key head j // (HV/H))"
        )
    return H


def _check_cu_seqlens_form(title: str, cu_seqlens: Tensor, B: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise errors.BadCuSeqlens(
            f"{title}: cu_seqlens: got {type(cu_seqlens).__name__}, expected an int32 or int64 "
            "tensor [N+1]"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.BadCuSeqlens(
            f"{title}: cu_seqlens: got {cu_seqlens.dtype}, expected int32 or int64"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise errors.BadCuSeqlens(
            f"{title}: cu_seqlens: got {_shape(cu_seqlens)}, expected [N+1] with N >= 1 sequences"
        )
    if B != 1:
        raise errors.BadBatch(
            f"{title}: cu_seqlens packs sequences along T: got B = {B}, expected B = 1 "
            "(reshape the operands to [1, B*T, ...])"
        )


def check_boundaries(title: str, cu_seqlens: Tensor, T: int) -> None:
    """That `cu_seqlens` rises from 0 to T; waits for its device, so only for CPU tensors or checks.

    Raises:
        BadCuSeqlens: names the first entry at fault.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise errors.BadCuSeqlens(f"{title}: cu_seqlens[0]: got {bounds[0]}, expected 0")
    for n in range(1, len(bounds)):
        if bounds[n] < bounds[n - 1]:
            raise errors.BadCuSeqlens(
                f"{title}: cu_seqlens[{n}]: got {bounds[n]} after {bounds[n - 1]}, "
                "expected boundaries that do not decrease"
            )
    if bounds[-1] != T:
        raise errors.BadCuSeqlens(
            f"{title}: cu_seqlens[{len(bounds) - 1}]: got {bounds[-1]}, expected T = {T}, "
            "the length of the packed operands"
        )


def on_one_device(call: Call) -> Call:
    """The call with `cu_seqlens` where the operands are (it may come from the host, checked there)."""
    if call.cu_seqlens is None or call.cu_seqlens.device == call.device:
        return call
    return replace(call, cu_seqlens=call.cu_seqlens.to(call.device, non_blocking=True))
