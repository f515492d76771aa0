"""Draws calls of any recurrence, in the families of inputs that validation uses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from ..codegen.config import Dims
from ..dsl.declaration import Declaration
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import NormalForm
from ..runtime import inputs
from ..runtime.call import Call, describe


class Family(Enum):
    """The kinds of inputs that validation uses."""

    ORDINARY = "usual gates; several chunks, the last one unfinished"
    HARD = "gates from -20 to almost 0, steps of 0 and 1, keys that repeat; grouped heads"
    RAGGED = "packed sequences, one of them empty, one of one token"


def draw(
    declaration: Declaration,
    form: NormalForm,
    family: Family,
    dims: Dims,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    micro: int,
    batch: int = 2,
    heads: int = 2,
) -> Call:
    """A call of `family`: Keys and Values in `dtype`, Scalars and per-head operands in float32.

    `tokens`: the length of a sequence, of all packed ones together; `batch`, `heads`: of ordinary
    inputs (others have one key head and two value heads).

    Raises:
        NotLowered: no gates are known to be legal, or states grow whatever is drawn.
    """
    params = inputs.usual_params(form)
    found = inputs.ranges(form, params)
    hard, packed = family is Family.HARD, family is Family.RAGGED
    B, H, HV = (1, 1, 2) if hard or packed else (batch, heads, heads)
    lengths = (tokens // 2 + 1, 0, 1, tokens - tokens // 2 - 2) if packed else ()
    sizes = {"B": B, "T": tokens, "n": micro, "H": H, "HV": HV, "K": dims.K, "V": dims.V}
    sizes["N"] = len(lengths) or B
    random = torch.Generator().manual_seed(1)
    wide = dtype if dtype is torch.float64 else torch.float32
    drawn = inputs.draw(form, found, sizes, random, inputs.HARD if hard else None)
    for o in form.operands:
        narrow = o.per is Per.TOKEN and o.kind is not Kind.SCALAR
        drawn[o.name] = drawn[o.name].to(device, dtype if narrow else wide)
    initial: tuple[Tensor | None, ...] = (None,) * len(form.states)
    if family is not Family.ORDINARY:
        states = inputs.draw_states(form, found, sizes, random)
        initial = tuple(s.to(device, wide) for s in states)
    cu_seqlens = None
    if packed:
        bounds = [0, *itertools.accumulate(lengths)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cpu").to(device)
    static = tuple(declaration.statics.items())
    call = describe(declaration, drawn, params, initial, cu_seqlens, static)
    operands = inputs.contracted(
        form, found, call.operands, params, sizes, cu_seqlens, repeating=hard
    )
    return replace(call, operands=operands)
