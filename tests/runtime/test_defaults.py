"""What a user sets as torch's default dtype or device changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import chunkwise as cw
import pytest
import torch

DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]
RULES = ("gated_delta_rule", "linear_attention_normalised", "gated_delta_product")


@contextlib.contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    """Within it, a default dtype, or a default device."""
    if isinstance(what, str):
        with torch.device(what):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_calls(kit: Any, engine: str, rule: str, what: torch.dtype | str) -> None:
    op = getattr(cw.library, rule)
    sizes = kit.Sizes(B=1, T=9, H=1, HV=2, K=5, V=6, initial=True, dtype=torch.float32)
    for at in (sizes, sizes.packed(4, 0, 5)):
        inputs = kit.make_inputs(op, at)
        want = kit.oracle_results(op, inputs)
        options = {**inputs.options, "engine": engine, "output_final_state": True}
        with default(what):
            o, states = op(**inputs.operands, **options)
            weights = [torch.ones_like(x) for x in (o, *_several(states))]
            leaves = list(inputs.leaves.values())
            grads = torch.autograd.grad((o, *_several(states)), leaves, weights)
        plain, plain_states = op(**inputs.operands, **options)
        alike = torch.autograd.grad((plain, *_several(plain_states)), leaves, weights)
        kit.assert_agree({"o": o.detach().cpu()}, {"o": want["o"]}, max(1e-5, kit.tolerance))
        got = [o, *_several(states), *grads]
        for x, y in zip(got, [plain, *_several(plain_states), *alike], strict=True):
            assert (x.dtype, x.device) == (y.dtype, y.device)
            assert torch.equal(x, y)


@torch.no_grad()
@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_steps(kit: Any, engine: str, rule: str, what: torch.dtype | str) -> None:
    """With a state and without one; sizes that no other test has warmed a layout for."""
    op = getattr(cw.library, rule)
    chosen = engine if engine != "eager" else None
    extra = DEFAULTS.index(what)
    sizes = kit.Sizes(T=1, HV=4, K=6 + extra, V=7, initial=True, dtype=torch.float32)
    inputs = kit.make_inputs(op, sizes)
    operands = {n: x.detach() for n, x in inputs.operands.items()}
    for state in (None, inputs.options["initial_state"]):
        want = op(**operands, initial_state=state, engine="reference", output_final_state=True)
        with default(what):
            got = op.step(**operands, state=state, engine=chosen)
        for x, y in zip((got[0], *_several(got[1])), (want[0], *_several(want[1])), strict=True):
            assert (x.dtype, x.device) == (y.dtype, y.device)
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def _several(states: Any) -> tuple[torch.Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)
