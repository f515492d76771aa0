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
    outputs: Sequence[str],
    operands: Mapping[str, Tensor],
    params: Sequence[float],
    initial_state: Any,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Any, Any]:
    """The output and the final state (a tuple each of several), in `dtype`.

    `step` takes states, operands of a token and floats, and returns states and outputs. `axes`,
    `states`, `outputs`: the axes of operands, states and outputs in letters, blanks between them.
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
    shapes = [[sizes[a] for a in letters.split()[2:]] for letters in outputs]  # of a token

    def scan(first: int, last: int, now: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        found = []
        for t in range(first, last):
            token: list[Any] = []
            for name, letters in axes.items():
                at = values[name][:, t] if letters.startswith("B T") else values[name]
                token.append(at.unbind(1) if letters[4:5].isdigit() else at)
            made = step(*now, *token, *params)
            now, given = list(made[: len(states)]), made[len(states) :]
            pairs = zip(given, shapes, strict=True)
            found.append([o.expand(sizes["B"], *shape) for o, shape in pairs])
        return found, now

    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sizes["N"] = sizes["B"] if bounds is None else len(bounds) - 1
    given = (initial_state,) if len(states) == 1 else initial_state or (None,) * len(states)
    ends = []
    for letters, start in zip(states.values(), given, strict=True):
        shape = [sizes[a] for a in letters.split()]
        ends.append(like.new_zeros(shape) if start is None else start.to(dtype))
    if bounds is None:
        tokens, ends = scan(0, sizes["T"], ends)
    else:
        tokens, parts = [], []
        for n, (first, last) in enumerate(pairwise(bounds)):
            new, part = scan(first, last, [x[n : n + 1] for x in ends])
            tokens += new
            parts.append(part)
        ends = [torch.cat(x) for x in zip(*parts, strict=True)]
    o = tuple(torch.stack(each, 1) for each in zip(*tokens, strict=True))
    o = o or tuple(like.new_zeros([sizes["B"], 0, *shape]) for shape in shapes)
    return o if len(o) > 1 else o[0], tuple(ends) if len(states) > 1 else ends[0]
