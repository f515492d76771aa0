"""Registers loops of papers' equations, and runs them head by head, for what declares them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import chunkwise as cw
import torch
from chunkwise.dsl.ir import Per
from chunkwise.dsl.normal_form import Operand
from torch import Tensor

from tests.harness import Inputs, Sizes, results

Token = SimpleNamespace  # what one head sees of one token: vectors and numbers, and t
Loop = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]

DENSE = Sizes(B=2, T=37, H=1, HV=2, K=5, V=3, initial=False)
# the eager engine's chunks have 64 tokens
PACKED = replace(DENSE, initial=True).packed(0, 66, 1, 9)
BATCH = 4  # tokens that learn against one state
PAPERS: dict[str, tuple[cw.Recurrence, Loop, dict[str, int]]] = {}


def loop_of(op: cw.Recurrence, **sizes: int) -> Callable[[Loop], Loop]:
    """Registers a paper's loop: of one token, `(token, *states)` to the output and new states."""

    def register(loop: Loop) -> Loop:
        PAPERS[op.declaration.name] = (op, loop, sizes)
        return loop

    return register


def loop_results(name: str, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
    """Outputs, final states and gradients of the loop: sequence by sequence, head by head."""
    op, loop, _ = PAPERS[name]
    per_head = {y.name for y in op.declaration.operands if y.per is Per.HEAD}
    spans = [(b, 0, sizes.T) for b in range(sizes.B)]
    if inputs.cu_seqlens is not None:
        spans = [(0, a, b) for a, b in itertools.pairwise(inputs.cu_seqlens.tolist())]
    outputs, ends = [], []
    for n, (b, start, stop) in enumerate(spans):
        heads = []
        for j in range(sizes.HV):
            x = {
                y.name: _of_head(y, inputs.operands[y.name], b, j) for y in op.declaration.operands
            }
            axes = [[sizes.letters[a] for a in s.kind.axes] for s in op.declaration.states]
            states = tuple(torch.zeros(a, dtype=sizes.dtype) for a in axes)
            if inputs.initial is not None:
                states = tuple(s[n, j] for s in inputs.initial if s is not None)
            heads.append(_run(loop, x, per_head, states, start, stop))
        if stop > start:
            outputs.append(torch.stack([torch.stack(o) for o, _ in heads], 1))
        ends.append([torch.stack(s) for s in zip(*(s for _, s in heads), strict=True)])
    o = torch.stack(outputs) if inputs.cu_seqlens is None else torch.cat(outputs)[None]
    return results(o, tuple(torch.stack(s) for s in zip(*ends, strict=True)), inputs)


def _of_head(operand: Operand, x: Tensor, b: int, j: int) -> Tensor:
    """An operand's tokens [T, ...] of one value head; of a parameter, its one entry."""
    if operand.per is Per.HEAD:
        return x[j]
    heads = x[b].movedim(2 if operand.micro else 1, 0)
    return heads[j * len(heads) // DENSE.HV]


def _run(
    loop: Loop,
    x: dict[str, Tensor],
    per_head: set[str],
    states: tuple[Tensor, ...],
    start: int,
    stop: int,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = []
    for t in range(start, stop):
        now = {n: y if n in per_head else y[t] for n, y in x.items()}
        o, states = loop(Token(t=t - start, **now), *states)
        outputs.append(o)
    return outputs, states
