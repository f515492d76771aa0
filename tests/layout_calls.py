"""Compares calls whose tensors have different layouts in memory with the float64 token loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chunkwise as cw
import torch
from chunkwise.dsl.ir import Per
from torch import Tensor

from tests.harness import Inputs, Sizes, engine_results, make_inputs, oracle_results, wobbled
from tests.random_calls import Boundaries, Layout, boundaries, laid_out
from tests.tolerances import Tolerance, assert_agree

TURNS = len(Layout)  # after which every tensor has lain in every way
PLAIN = -1  # the turn in which all are contiguous


def layout(place: int, turn: int) -> Layout:
    """The layout of tensor number `place` of a call in turn number `turn`."""
    every = tuple(Layout)
    if turn == PLAIN:
        return Layout.PLAIN
    return every[(place + turn) % len(every)]


def laid_inputs(op: cw.Recurrence, sizes: Sizes, turn: int) -> Inputs:
    """Operands, initial states and boundaries; no two tensors of a kind have the same layout."""
    inputs = make_inputs(op, sizes)
    per_token = [x.per is Per.TOKEN for x in op.declaration.operands]
    operands = {
        name: laid_out(x, layout(n, turn), tokens)
        for n, ((name, x), tokens) in enumerate(
            zip(inputs.operands.items(), per_token, strict=True)
        )
    }
    initial = inputs.initial
    if initial is not None:
        initial = tuple(
            None if x is None else laid_out(x, layout(n, turn), False)
            for n, x in enumerate(initial, len(operands))
        )
    bounds = None
    if sizes.lengths is not None:
        every = tuple(Boundaries)
        bounds = boundaries(sizes.lengths, every[turn % len(every)], sizes.device)
    return replace(inputs, operands=operands, initial=initial, cu_seqlens=bounds)


def check_call(
    op: cw.Recurrence, sizes: Sizes, turn: int, engine: str, limit: Tolerance | torch.dtype
) -> None:
    """Compare output, final states and gradients; the gradients of results vary in layout too."""
    inputs = laid_inputs(op, sizes, turn)

    def laid(w: Tensor) -> Tensor:
        return laid_out(w, layout(w.ndim, turn)).detach()

    want = oracle_results(op, inputs, laid)
    near = oracle_results(op, wobbled(inputs), laid) if sizes.dtype.itemsize == 2 else None
    assert_agree(engine_results(op, inputs, engine, laid), want, limit, near=near)


@torch.no_grad()
def check_steps(
    op: cw.Recurrence, sizes: Sizes, turn: int, engine: str, limit: Tolerance | torch.dtype
) -> None:
    """Compare the outputs and the final states of `op.step`, a token at a time."""
    inputs = laid_inputs(op, sizes, turn)
    per_head = {x.name for x in op.declaration.operands if x.per is Per.HEAD}
    state: Any = inputs.options["initial_state"]
    outputs = []
    for t in range(sizes.T):
        # kernels of steps take no tensor that is negated when it is read, and say so
        x = {n: x.resolve_neg() for n, x in inputs.operands.items()}
        now = {n: x[n] if n in per_head else x[n][:, t] for n in x}
        states = state if isinstance(state, tuple) else (state,)
        states = tuple(None if s is None else s.resolve_neg() for s in states)
        state = states if len(states) > 1 else states[0]
        o, state = op.step(**now, state=state, engine=engine)
        outputs.append(o.cpu())
    finals = state if isinstance(state, tuple) else (state,)
    got = {"o": torch.stack(outputs, 1), **{f"final {n}": x.cpu() for n, x in enumerate(finals)}}
    with torch.enable_grad():
        want, near = oracle_results(op, inputs), oracle_results(op, wobbled(inputs))
    assert_agree(got, {n: want[n] for n in got}, limit, near={n: near[n] for n in got})
