"""The normal form means what the step means: same numbers in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from chunkwise.dsl import library, oracle
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.ir import Kind, Per
from torch import Tensor

B, T, H, HV, K, V = 2, 5, 2, 4, 3, 2


def random_operands(d: Declaration, micro: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Small operands in float64: gates of every size, unit-free vectors."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for o in d.operands:
        heads = H if o.kind is Kind.KEY and o.per is Per.TOKEN else HV
        shape = [heads] + {Kind.KEY: [K], Kind.VALUE: [V], Kind.SCALAR: []}[o.kind]
        if o.micro:
            shape = [micro, *shape]
        if o.per is Per.TOKEN:
            shape = [B, T, *shape]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if o.name == "f" and o.kind is Kind.KEY:  # promised to lie within (0, 1)
            x = x.sigmoid()
        made[o.name] = x.requires_grad_()
    return made


def both(d: Declaration, micro: int = 1) -> None:
    """The step and its normal form agree: outputs, final states, gradients."""
    step, form = d.step(micro), d.normal_form(micro)
    operands = random_operands(d, micro)
    shapes = [(B, HV, K, V) if s.kind is Kind.STATE else (B, HV, K) for s in d.states]
    initial = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    leaves = [*operands.values(), *initial]
    results = []
    for what in (step, form):
        o, finals = oracle.run(what, operands, {}, initial)
        torch.manual_seed(1)
        loss = sum((x * torch.randn_like(x)).sum() for x in (o, *finals))
        results.append((o, *finals, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", library.all_declarations(), ids=lambda d: d.name)
def test_library(d: Declaration) -> None:
    for micro in (1, 2, 3) if d.has_micro else (1,):
        both(d, micro)
