"""A recurrence over whole sequences, one token at a time in plain torch.

Packages carry this file as it is; `reference.py` has the step that the loop calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def run(
    step: Callable[..., Sequence[Tensor]],
    axes: Mapping[str, str],
    states: Mapping[str, str],
    output: str,
    operands: Mapping[str, Tensor],
    params: Sequence[float],
    initial_state: Any,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Any]:
    """The output and the final state (a tuple of several), in `dtype`.

    `step` takes states, operands of a token and floats, and returns states and output. `axes`,
    `states`, `output`: the axes of operands, states and output in letters, with blanks between.
    """
    sizes = dict.fromkeys(("K", "V", "H", "HV"), 1)
    for name, letters in axes.items():
        for letter, size in zip(letters.split(), operands[name].shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 0))
    sizes["HV"] = max(sizes["H"], sizes["HV"])
    values = {}
    for name, letters in axes.items():
        x, axis = operands[name].to(dtype), letters.split()
        if "H" in axis:
            heads = axis.index("H")
            x = x.repeat_interleave(sizes["HV"] // x.shape[heads], dim=heads)
        values[name] = x
    like = next(iter(values.values()))
    heads_and_channels = [sizes[a] for a in output.split()[2:]]

    def scan(first: int, last: int, now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = []
        for t in range(first, last):
            token: list[Any] = []
            for name, letters in axes.items():
                at = values[name][:, t] if letters.startswith("B T") else values[name]
                token.append(at.unbind(1) if letters[4:5].isdigit() else at)
            *now, o = step(*now, *token, *params)
            outputs.append(o.expand(*o.shape[: -len(heads_and_channels)], *heads_and_channels))
        return outputs, now

    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sizes["N"] = sizes["B"] if bounds is None else len(bounds) - 1
    given = (initial_state,) if len(states) == 1 else initial_state or (None,) * len(states)
    ends = []
    for letters, start in zip(states.values(), given, strict=True):
        shape = [sizes[a] for a in letters.split()]
        ends.append(like.new_zeros(shape) if start is None else start.to(dtype))
    if bounds is None:
        outputs, ends = scan(0, sizes["T"], ends)
    else:
        outputs, parts = [], []
        for n, (first, last) in enumerate(pairwise(bounds)):
            new, part = scan(first, last, [x[n : n + 1] for x in ends])
            outputs += new
            parts.append(part)
        ends = [torch.cat(x) for x in zip(*parts, strict=True)]
    empty = like.new_zeros([sizes["B"], 0, *heads_and_channels])
    o = torch.stack(outputs, 1) if outputs else empty
    return o, tuple(ends) if len(states) > 1 else ends[0]
