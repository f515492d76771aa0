"""One bound and checked call: every mistake a caller can make is named before an engine runs.

Only shapes, dtypes and devices are read here: nothing waits for what a device computes.
"""

from __future__ import annotations

import logging
import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..dsl import errors
from ..dsl.ir import Kind
from ..dsl.normal_form import NormalForm, StateDecl
from ..dsl.step import output_names
from ..dsl.traced import Traced
from .shapes import Form
from .sizes import Sizes, measure, measured, shape_of

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration
    from ..dsl.step import Step

_LOG = logging.getLogger("chunkwise")
_SAID: list[str] = []  # whose graph was the first with symbols
PLAIN = (Tensor, torch.nn.Parameter)  # other kinds of tensor have meanings of their own
Static = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """The states of many sequences, which steps read and write where they lie.

    Attributes:
        states: `[slots,HV,K,V]` or `[slots,HV,K]` for each state.
        indices: the slot of each sequence, `[B]`, or one for each of its tokens, `[B,W]`.
        accepted: `[B]`, after how many of the tokens before a sequence goes on; None: after one.
    """

    states: tuple[Tensor, ...]
    indices: Tensor
    accepted: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of an op."""
        return (*self.states, self.indices, self.accepted)

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return self.states[0].shape[0]

    @property
    def width(self) -> int:
        """Slots of a sequence."""
        return 1 if self.indices.ndim == 1 else self.indices.shape[1]


@dataclass(frozen=True, slots=True)
class Call(Sizes):
    """A call of a recurrence whose shapes, dtypes and devices agree.

    `operands` are as the user passed them: Key `[B,T,H,K]` or `[B,T,HV,K]`, Value `[B,T,HV,V]`,
    Scalar `[B,T,HV]`, per head `[HV]`, `[HV,K]`, `[HV,V]`; those of micro-steps `[B,T,n,...]`.
    `initial` has one entry per state, `[N,HV,K,V]` or `[N,HV,K]`.
    """

    declaration: Declaration
    operands: dict[str, Tensor]
    params: dict[str, float]
    initial: tuple[Tensor | None, ...]
    cu_seqlens: Tensor | None
    static: Static = ()
    pool: Pool | None = None

    def of(self, values: Sequence[Any]) -> Call:
        """The call of these values, which lie as this one's: operands, states, bounds, floats."""
        states = len(self.operands)
        bounds = states + len(self.initial)
        cu_seqlens: Tensor | None = values[bounds]
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
        return replace(
            self,
            operands=dict(zip(self.operands, values, strict=False)),
            initial=tuple(values[states:bounds]),
            cu_seqlens=cu_seqlens,
            params=dict(zip(self.params, values[bounds + 1 :], strict=False)),
        )

    @property
    def step(self) -> Step:
        """The traced step, retraced for this number of micro-steps."""
        return self.declaration.step(self.micro, dict(self.static))

    @property
    def form(self) -> NormalForm:
        """The normal form; raises NotAffine for a step that only the reference engine can run."""
        return _form(self.declaration, self.micro, self.static)

    @property
    def state_dtype(self) -> torch.dtype:
        """What states are computed and returned in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def state_shape(self, state: StateDecl) -> tuple[int, ...]:
        """`[N,HV,K,V]`, or `[N,HV,K]` for a KeyState."""
        return (self.N, self.HV, *self.channels(state.kind))

    def channels(self, kind: Kind) -> tuple[int, ...]:
        """The sizes of the channel axes of a kind."""
        return tuple({"K": self.K, "V": self.V}[a] for a in kind.axes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`[B,T,HV,V]` for an output that is a Value; of several the channels add up."""
        shapes = self.output_shapes
        if len(shapes) == 1:
            return next(iter(shapes.values()))
        return (self.B, self.T, self.HV, sum(math.prod(shape[3:]) for shape in shapes.values()))

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output by name."""
        outputs = self.step.outputs
        shapes = ((self.B, self.T, self.HV, *self.channels(n.kind)) for n in outputs)
        return dict(zip(output_names(len(outputs)), shapes, strict=True))


@dataclass(frozen=True, slots=True)
class Places:
    """The positions of a call's values: operands, first states and floats by name.

    `states`: of a pool's, where there is one. `cotangents`: the position of the output's cotangent,
    before those of the final states. `time`: whether values of tokens have a time axis. `slots`: of
    a pool's indices, before the numbers of accepted tokens.
    """

    operands: dict[str, int]
    states: dict[str, int]
    params: dict[str, int]
    cu_seqlens: int | None = None
    cotangents: int = 0
    time: bool = True
    slots: int | None = None


def values_of(call: Call, cotangents: Sequence[Tensor | None] = ()) -> list[Any]:
    """The values of a call in the order of its ops: a backward's cotangents come first."""
    states = (*call.initial, call.cu_seqlens) if call.pool is None else call.pool.tensors
    tensors = (*cotangents, *call.operands.values(), *states)
    return [*tensors, *call.params.values()]


def places_of(
    call: Call, cotangents: int = 0, *, given: Sequence[str] | None = None, time: bool = True
) -> Places:
    """Where the values of a call stand in that order, behind so many cotangents.

    `given`: names of operands and numbers as they come to a step, which has no boundaries.
    """
    names = [*(call.operands if given is None else given), *(s.name for s in call.step.states)]
    at = {name: cotangents + n for n, name in enumerate(names)}
    first = cotangents + len(names)
    others = 2 if call.pool is not None else 1 if given is None else 0  # than these and floats
    return Places(
        operands={n: at[n] for n in call.operands},
        states={s.name: at[s.name] for s in call.step.states},
        params={n: first + others + i for i, n in enumerate(call.params)},
        cu_seqlens=first if others == 1 else None,
        time=time,
        slots=None if call.pool is None else first,
    )


@lru_cache(maxsize=4096)
def _form(declaration: Declaration, micro: int, static: Static) -> NormalForm:
    return declaration.normal_form(micro, dict(static))


def arrange(
    declaration: Declaration, args: Sequence[object], named: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, float], Static]:
    """Operands, run-time floats and static numbers by name, each present once.

    Raises:
        MissingOperand, UnknownOperand: as their names say.
        BadDtype: an operand is not a tensor, or a parameter is not a number.
    """
    title = declaration.name
    if len(args) > len(declaration.operands):
        if any(isinstance(x, Traced) for x in args):
            raise errors.NotATensor("number 1", "Traced", "a tensor")
        surplus = f"number {len(declaration.operands) + 1}"
        raise errors.UnknownOperand(surplus, _declared(declaration), op=title)
    given = {x.name: value for x, value in zip(declaration.operands, args, strict=False)}
    for name in named:
        if name in given:
            raise errors.UnknownOperand(f"{name} (again)", _declared(declaration), op=title)
    given.update(named)
    operands: dict[str, Tensor] = {}
    for x in declaration.operands:
        value = given.pop(x.name, None)
        if value is None:
            raise errors.MissingOperand(x.name, x.spelled, shape_of(x), op=title)
        if not isinstance(value, Tensor):
            raise errors.NotATensor(x.name, type(value).__name__, f"a tensor {shape_of(x)}")
        plain = type(value) in PLAIN and not value.is_nested
        operands[x.name] = value if plain else whole(x.name, value)
    params: dict[str, float] = {}
    for p in declaration.params:
        number = given.pop(p.name, None)
        if number is None:
            number = p.default
        if number is None:
            raise errors.MissingOperand(p.name, "float", "or rather a Python number", op=title)
        params[p.name] = _float(p.name, number)
    static: list[tuple[str, int]] = []
    for name, default in declaration.statics.items():
        constant = given.pop(name, default)
        if isinstance(constant, (np.integer, np.bool_)):
            constant = constant.item()
        if not isinstance(constant, int):
            raise errors.BadDtype(
                name,
                type(constant).__name__,
                "a Python int or bool",
                help="it is fixed when the step is traced; each value is a recurrence of its own",
            )
        static.append((name, constant))
    for name in given:
        raise errors.UnknownOperand(name, _declared(declaration), op=title)
    return operands, params, tuple(static)


def whole(name: str, x: Tensor) -> Tensor:
    """`x`, refused where no op is reached with it: nested, or a shard of a tensor on many devices.

    What else is not one dense block of memory is refused by its layout (`measure`).
    """
    if x.is_nested:
        raise errors.BadLayout(
            name,
            "a nested tensor",
            help="pack the sequences: values() as [1, T, ...], and offsets() as cu_seqlens",
        )
    if type(x) not in PLAIN and any_sharded((x,), {}):
        raise errors.BadLayout(
            name,
            "a DTensor",
            help="a call takes DTensors as operands, all of them, without a group; else pass "
            "x.to_local(): sequences of a batch and value heads are independent of one another",
        )
    return x


def any_sharded(args: Iterable[object], named: Mapping[str, object]) -> bool:
    """Whether an operand is a shard of a tensor on many devices."""
    module = sys.modules.get("torch.distributed.tensor")  # there is none before torch has loaded it
    if module is None:
        return False
    return any(isinstance(x, module.DTensor) for x in (*args, *named.values()))


def _float(name: str, number: object) -> float:
    """A run-time float; numpy's numbers, and its arrays without axes, are numbers too."""
    if isinstance(number, np.ndarray) and number.ndim == 0:
        number = number.item()
    if isinstance(number, bool) or not isinstance(number, (int, float, numbers.Real)):
        raise errors.BadDtype(
            name,
            type(number).__name__,
            "a Python number",
            help="a keyword has no gradient; declare a HeadScalar for a number that is learnt",
        )
    try:
        return float(number)
    except OverflowError:
        raise errors.BadNumber(name, math.inf) from None


def _declared(declaration: Declaration) -> list[str]:
    names = [x.name for x in declaration.operands]
    return [*names, *(p.name for p in declaration.params), *declaration.statics]


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
    if not isinstance(given, (Tensor, list, tuple)):
        raise errors.BadDtype(
            "initial_state", type(given).__name__, "a tensor, None, or a tuple with one per state"
        )
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
        if start is not None:
            whole(f"initial_state ({state.name})", start)
    return states


def boundaries(given: Tensor | None) -> Tensor | None:
    """`cu_seqlens`, which must be a tensor: a list would be copied to the device in every call."""
    if given is not None and not isinstance(given, Tensor):
        raise errors.BadCuSeqlens(f"a {type(given).__name__}", "an int32 or int64 tensor")
    return None if given is None else whole("cu_seqlens", given)


def _say_what_is_dynamic(name: str, sizes: Sizes) -> None:
    """Say, once a process, what a graph with symbols for sizes means for kernels."""
    symbols = [n for n in ("B", "T", "N") if isinstance(getattr(sizes, n), torch.SymInt)]
    if not symbols or _SAID or torch.compiler.is_exporting():
        return
    _SAID.append(name)
    _LOG.warning(
        "%s: a graph for any %s is compiled once. Its kernels are for any too: the first step "
        "compiles them, and calls of other lengths compile nothing, but for one more set where T "
        "is no multiple of a chunk. Recurrences traced after this one are not mentioned.",
        name,
        " and ".join(symbols),
    )


def describe(
    declaration: Declaration,
    operands: dict[str, Tensor],
    params: dict[str, float],
    initial: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    static: Static = (),
    *,
    symbolic: bool = False,
) -> Call:
    """Check shapes, dtypes and devices against one another, and name the sizes.

    `symbolic`: sizes may be torch.compile's symbols, which are compared afresh in every trace.

    Raises:
        BadShape, BadDtype, BadDevice, BadLayout, BadNumber, HeadMismatch, BadBatch, BadCuSeqlens:
            as their names say.
    """
    for name, number in () if symbolic else params.items():
        if not math.isfinite(number):
            raise errors.BadNumber(name, number)
    # torch.compile does not trace through a cache
    sizes = (measure if symbolic or torch.compiler.is_compiling() else measured)(
        declaration,
        tuple(map(Form.of, operands.values())),
        tuple(None if x is None else Form.of(x) for x in initial),
        None if cu_seqlens is None else Form.of(cu_seqlens),
    )
    if symbolic:
        _say_what_is_dynamic(declaration.name, sizes)
    return Call(
        **{name: getattr(sizes, name) for name in Sizes.__slots__},
        declaration=declaration,
        operands=operands,
        params=params,
        initial=initial,
        cu_seqlens=cu_seqlens,
        static=static,
    )
