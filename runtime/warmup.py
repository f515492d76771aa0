"""Compiles what requests will need before they come, by making such calls on zeros."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..dsl import errors
from ..dsl.ir import Kind, Per
from .pool import MOST_TOKENS

if TYPE_CHECKING:
    from .recurrence import Recurrence

Sizes = Mapping[str, int | Sequence[int]]
LETTERS = ("B", "T", "H", "HV", "K", "V", "n")
_CHUNK = 128  # rows of the longest usual chunk: prompts with a rest have kernels of their own


def warm_up(
    op: Recurrence,
    dims: Sizes,
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    state_dtypes: Sequence[torch.dtype],
    *,
    gradients: bool,
) -> dict[str, float]:
    """Seconds of each kind of call, in order; see `Recurrence.warmup`."""
    spent: dict[str, float] = {}
    for dtype, sizes in itertools.product(dtypes, _every(op, dims)):
        for name, call in _calls(op, sizes, dtype, device, state_dtypes, gradients=gradients):
            begin = time.perf_counter()
            call()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin
    return spent


def _every(op: Recurrence, dims: Sizes) -> Iterator[dict[str, int]]:
    for letter, size in dims.items():
        if letter not in LETTERS:
            raise errors.UnknownOperand(letter, LETTERS, op="warmup's dims")
        for n in (size,) if isinstance(size, int) else size:
            if not isinstance(n, int) or n < 1:
                raise errors.BadOption(f"dims[{letter!r}]", n, "a size of at least 1")
    declared = op.declaration
    axes = {a for x in declared.operands for a in x.axes}
    axes |= {a for s in declared.states for a in s.axes}
    missing = sorted(({"K", "V"} & axes | {"HV"}) - dims.keys())
    if missing:
        raise errors.MissingOperand(missing[0], "int", "or rather a size of dims", op="warmup")
    given = {n: (s,) if isinstance(s, int) else tuple(s) for n, s in dims.items()}
    usual = {"B": (1,), "T": (1,), "K": (1,), "V": (1,), "n": (declared.default_micro,)}
    given = {**usual, "H": given["HV"], **given}
    for sizes in itertools.product(*given.values()):
        found = dict(zip(given, sizes, strict=True))
        if found["HV"] % found["H"] == 0:
            yield found


def _calls(
    op: Recurrence,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
    state_dtypes: Sequence[torch.dtype],
    *,
    gradients: bool,
) -> Iterator[tuple[str, Callable[[], object]]]:
    declared = op.declaration
    params: dict[str, Any] = {p.name: 1.0 for p in declared.params if p.default is None}
    whole = -(-sizes["T"] // _CHUNK) * _CHUNK
    tokens = {x.name for x in declared.operands if x.per is Per.TOKEN}

    def operands(T: int, *, recorded: bool = False) -> dict[str, Any]:
        made: dict[str, Any] = dict(params)
        for x in declared.operands:
            narrow = x.kind is Kind.SCALAR or x.per is Per.HEAD  # in float32, as models have them
            size = [{**sizes, "T": T}[a] for a in x.axes]
            own = torch.float32 if narrow and dtype is not torch.float64 else dtype
            made[x.name] = torch.zeros(size, dtype=own, device=device, requires_grad=recorded)
        return made

    def states(slots: int, own: torch.dtype) -> Any:
        size = {**sizes, "N": slots}
        shapes = [[size[a] for a in s.axes] for s in declared.states]
        made = tuple(torch.zeros(s, dtype=own, device=device) for s in shapes)
        return made[0] if len(made) == 1 else made

    def call(T: int, initial: Any) -> None:
        with torch.no_grad():
            op(**operands(T), initial_state=initial, output_final_state=True)

    def backward(T: int) -> None:
        o, _ = op(**operands(T, recorded=True))
        o.sum().backward()

    def step(T: int, **given: Any) -> None:
        x = operands(T)
        if T == 1:
            x |= {n: x[n].squeeze(1) for n in tokens}
        with torch.no_grad():
            op.step(**x, **given)

    B, wide = sizes["B"], torch.float64 if dtype is torch.float64 else torch.float32
    starts = None, states(B, wide)
    for T in dict.fromkeys((sizes["T"], whole, whole - 1)) if sizes["T"] > 1 else ():
        for initial in starts:
            yield "call", partial(call, T, initial)
        if gradients:
            yield "gradients", partial(backward, T)
    for initial in starts:
        yield "step", partial(step, 1, state=initial)
    for own, integers in itertools.product(state_dtypes, (torch.int32, torch.int64)):
        slots = torch.arange(B * MOST_TOKENS, dtype=integers, device=device).view(B, -1)
        pool = states(B * MOST_TOKENS, own)
        alone, accepted = slots[:, 0].contiguous(), torch.ones_like(slots[:, 0])
        yield "pool", partial(step, 1, state=pool, state_indices=alone)
        yield "pool", partial(step, 2, state=pool, state_indices=slots, num_accepted=accepted)
