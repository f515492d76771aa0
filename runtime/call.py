"""One bound and checked call: every mistake a caller can make is named before an engine runs.

Only `check_boundaries` reads what a tensor holds; all else is shapes, and waits for no device.
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
    from ..dsl.declaration import Declaration
    from ..dsl.step import Step

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Static = tuple[tuple[str, int], ...]
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
    static: Static = ()

    @property
    def step(self) -> Step:
        """The traced step, retraced for this number of micro-steps."""
        return self.declaration.step(self.micro, dict(self.static))

    @property
    def form(self) -> NormalForm:
        """The normal form; raises NotAffine for a step that only the reference engine can run."""
        return self.declaration.normal_form(self.micro, dict(self.static))

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
) -> tuple[dict[str, Tensor], dict[str, float], Static]:
    """Operands, run-time floats and static numbers by name, each present once.

    Raises:
        MissingOperand, UnknownOperand: as their names say.
        BadDtype: an operand is not a tensor, or a parameter is not a number.
    """
    declared = [x.name for x in declaration.operands]
    declared += [*(p.name for p in declaration.params), *declaration.statics]
    title = declaration.name
    if len(args) > len(declaration.operands):
        surplus = f"number {len(declaration.operands) + 1}"
        raise errors.UnknownOperand(surplus, declared, op=title)
    given = {x.name: value for x, value in zip(declaration.operands, args, strict=False)}
    for name in named:
        if name in given:
            raise errors.UnknownOperand(f"{name} (again)", declared, op=title)
    given.update(named)
    operands: dict[str, Tensor] = {}
    for x in declaration.operands:
        value = given.pop(x.name, None)
        if value is None:
            raise errors.MissingOperand(x.name, kind_name(x), pattern(x), op=title)
        if not isinstance(value, Tensor):
            raise errors.BadDtype(x.name, type(value).__name__, f"a tensor {pattern(x)}")
        operands[x.name] = value
    params: dict[str, float] = {}
    for p in declaration.params:
        number = given.pop(p.name, None)
        if number is None:
            number = p.default
        if number is None:
            raise errors.MissingOperand(p.name, "float", "or rather a Python number", op=title)
        if isinstance(number, Tensor) or not isinstance(number, (int, float)):
            raise errors.BadDtype(
                p.name,
                type(number).__name__,
                "a Python number",
                help="a keyword has no gradient; declare a HeadScalar for a number that is learnt",
            )
        params[p.name] = float(number)
    static: list[tuple[str, int]] = []
    for name, default in sorted(declaration.statics.items()):
        constant = given.pop(name, default)
        if not isinstance(constant, int):
            raise errors.BadDtype(
                name,
                type(constant).__name__,
                "a Python int or bool",
                help="it is fixed when the step is traced; each value is a recurrence of its own",
            )
        static.append((name, constant))
    for name in given:
        raise errors.UnknownOperand(name, declared, op=title)
    return operands, params, tuple(static)


def kind_name(x: Operand) -> str:
    """The operand's kind as the user wrote it."""
    bare = x.kind.name.title()
    if x.micro:
        return f"tuple[{bare}, ...]"
    return f"Head{bare}" if x.per is Per.HEAD else bare


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
    operands, params, static = arrange(declaration, args, named)
    initial = initial_states(declaration, initial_state)
    return describe(declaration, operands, params, initial, boundaries(cu_seqlens), static)


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
        raise errors.BadBatch(
            "initial_state", len(states), f"{count} tensors, one per state: {names}"
        )
    for state, start in zip(declaration.states, states, strict=True):
        if start is not None and not isinstance(start, Tensor):
            raise errors.BadDtype(
                f"initial_state ({state.name})", type(start).__name__, "a tensor or None"
            )
    return states


def boundaries(given: Tensor | None) -> Tensor | None:
    """`cu_seqlens`, which must be a tensor: a list would be copied to the device in every call."""
    if given is not None and not isinstance(given, Tensor):
        raise errors.BadCuSeqlens(f"a {type(given).__name__}", "an int32 or int64 tensor")
    return given


def describe(
    declaration: Declaration,
    operands: dict[str, Tensor],
    params: dict[str, float],
    initial: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    static: Static = (),
) -> Call:
    """Check shapes, dtypes and devices against one another, and name the sizes.

    Raises:
        BadShape, BadDtype, BadDevice, HeadMismatch, BadBatch, BadCuSeqlens: as their names say.
    """
    device = next(iter(operands.values())).device
    sizes: dict[str, tuple[int, str]] = {}
    key_heads: dict[str, int] = {}
    for x in declaration.operands:
        tensor = operands[x.name]
        _check_placement(x.name, tensor, device)
        _measure(x, tensor, sizes, key_heads)
    if "T" not in sizes:
        raise errors.MissingOperand(
            "per token", "Key, Value or Scalar", "[B,T,...]", op=declaration.name
        )
    if "HV" not in sizes:
        widest = max(key_heads, key=lambda n: key_heads[n])
        sizes["HV"] = (key_heads[widest], widest)
    B, T, HV = (sizes[s][0] for s in ("B", "T", "HV"))
    H = _key_heads(key_heads, HV, sizes["HV"][1])
    # no operand says so only where no state has the axis
    K, V = (sizes.get(s, (1, ""))[0] for s in ("K", "V"))
    if cu_seqlens is not None:
        _check_cu_seqlens_form(cu_seqlens, B, sizes["B"][1])
    values = [x for x in declaration.operands if x.kind is Kind.VALUE and x.per is Per.TOKEN]
    lead = operands[(values or list(declaration.operands))[0].name]
    call = Call(
        declaration=declaration,
        operands=operands,
        params=params,
        initial=initial,
        cu_seqlens=cu_seqlens,
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        micro=int(sizes.get("n", (1, ""))[0]),
        dtype=lead.dtype,
        device=device,
        static=static,
    )
    for state, start in zip(declaration.states, initial, strict=True):
        if start is not None:
            _check_placement(f"initial_state ({state.name})", start, device)
            expected = call.state_shape(state)
            if tuple(start.shape) != expected:
                letters = "[N,HV,K,V]" if state.kind is Kind.STATE else "[N,HV,K]"
                raise errors.BadShape(
                    f"initial_state ({state.name})", start.shape, f"{letters} = {list(expected)}"
                )
    return call


def _check_placement(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in FLOATS:
        raise errors.BadDtype(
            name, str(tensor.dtype), "one of " + ", ".join(str(d)[len("torch.") :] for d in FLOATS)
        )
    if tensor.device != device:
        raise errors.BadDevice(name, str(tensor.device), str(device))


def _measure(
    x: Operand, tensor: Tensor, sizes: dict[str, tuple[int, str]], key_heads: dict[str, int]
) -> None:
    """Compare one operand's shape with the sizes known so far; add those it is first to show."""
    letters = pattern(x)[1:-1].split(",")
    if tensor.ndim != len(letters):
        raise errors.BadShape(
            x.name, tensor.shape, f"{pattern(x)}, {len(letters)} axes", kind=kind_name(x)
        )
    for letter, size in zip(letters, tensor.shape, strict=True):
        if letter == "H|HV":
            key_heads[x.name] = size
            continue
        known = sizes.setdefault(letter, (size, x.name))
        if known[0] != size:
            raise errors.BadShape(
                x.name,
                tensor.shape,
                f"{pattern(x)} with {letter} = {known[0]}, as in operand {known[1]!r}",
                kind=kind_name(x),
            )
    if x.micro and tensor.shape[2] == 0:
        raise errors.BadShape(
            x.name, tensor.shape, f"{pattern(x)} with at least one micro-step", kind=kind_name(x)
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


def _check_cu_seqlens_form(cu_seqlens: Tensor, B: int, witness: str) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.BadCuSeqlens(f"of dtype {cu_seqlens.dtype}", "int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
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


def check_boundaries(cu_seqlens: Tensor, T: int) -> None:
    """That `cu_seqlens` rises from 0 to T; waits for its device, so only for CPU tensors or checks.

    Raises:
        BadCuSeqlens: names the first entry at fault.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise errors.BadCuSeqlens(f"{bounds[0]} at [0]", "0")
    for n in range(1, len(bounds)):
        if bounds[n] < bounds[n - 1]:
            raise errors.BadCuSeqlens(
                f"{bounds[n]} at [{n}] after {bounds[n - 1]}", "offsets that do not decrease"
            )
    if bounds[-1] != T:
        raise errors.BadCuSeqlens(
            f"{bounds[-1]} at [{len(bounds) - 1}]", f"T = {T}, the length of the packed operands"
        )


def on_one_device(call: Call) -> Call:
    """The call with `cu_seqlens` moved to where the operands are (it may come from the host)."""
    if call.cu_seqlens is None or call.cu_seqlens.device == call.device:
        return call
    return replace(call, cu_seqlens=call.cu_seqlens.to(call.device, non_blocking=True))
