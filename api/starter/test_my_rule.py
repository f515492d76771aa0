"""`my_rule` agrees with the reference, which runs the declared step token by token.

Run it: python -m pytest
"""

from __future__ import annotations

import pytest
import torch
from inputs import operands
from my_rule import my_rule
from torch import Tensor
from torch.testing import assert_close


def results(tokens: int, engine: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, the final state and the gradient of every operand, in float32."""
    given = operands(2, tokens, 2, 16, 32)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
    o, state = my_rule(**leaves, output_final_state=True, engine=engine)
    (o.square().sum() + state.sum()).backward()
    found = {"o": o, "state": state, **{f"d{name}": x.grad for name, x in leaves.items()}}
    return {name: x.detach().float() for name, x in found.items() if x is not None}


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_values_and_gradients(tokens: int) -> None:
    # engine=None: the one that serves calls on this machine
    got = results(tokens, None, torch.float32)
    want = results(tokens, "reference", torch.float64)
    assert got.keys() == want.keys()
    for name, x in got.items():
        scale = want[name].abs().max().clamp(min=1.0)
        assert_close(x / scale, want[name] / scale, atol=1e-4, rtol=0.0, msg=f"{name} differs")


def test_one_token_at_a_time() -> None:
    given = operands(2, 20, 2, 16, 32)
    whole, _ = my_rule(**given)
    state = None
    for t in range(20):
        o, state = my_rule.step(**{name: x[:, t] for name, x in given.items()}, state=state)
        assert_close(o, whole[:, t], atol=1e-4, rtol=1e-4)
