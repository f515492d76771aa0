"""Operands that are tuples: of any length, one included, with any number of heads."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise import Key, Scalar, State, Value, exp, outer
from chunkwise.dsl.ir import Per

HEADS = [(1, 1), (2, 2), (3, 3), (1, 2), (2, 4)]  # with one axis too few, each of another shape


@cw.recurrence
def first_entry(S: State, q: Key, k: tuple[Key, ...], v: Value, g: tuple[Scalar, ...]):
    """Takes no notice of what tuples hold beyond their first entry."""
    S = exp(-(g[0] * g[0])) * S
    S = S + 0.5 * outer(k[0], v - k[0] @ S)
    return S, q @ S


@cw.recurrence
def one_step_more(S: State, q: Key, k: tuple[Key, ...], p: Key, v: tuple[Value, ...]):
    """A micro-step more than tuples are long."""
    for k_i, v_i in zip(k, v, strict=True):
        S = S + 0.5 * outer(k_i, v_i - k_i @ S)
    S = S - 0.5 * outer(p, p @ S)
    return S, q @ S


@pytest.mark.parametrize("lengths", [None, (0, 5, 1, 12)], ids=["", "packed"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_tuples_of_any_length(
    kit: Any, engine: str, n: int, heads: tuple[int, int], lengths: tuple[int, ...] | None
) -> None:
    op = cw.library.gated_delta_product
    H, HV = heads
    sizes = kit.Sizes(B=1, T=9, H=H, HV=HV, K=5, V=4, micro=n, initial=True)
    inputs = kit.make_inputs(op, sizes if lengths is None else sizes.packed(*lengths))
    _agrees(kit, op, engine, inputs)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("op", [first_entry, one_step_more], ids=lambda op: op.__name__)
def test_tuples_of_another_length_than_micro_steps(
    kit: Any, engine: str, op: cw.Recurrence, n: int
) -> None:
    inputs = kit.make_inputs(op, kit.Sizes(T=9, H=2, HV=4, K=5, V=4, micro=n, initial=True))
    _agrees(kit, op, engine, inputs)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("keep_time", [False, True], ids=["no T axis", "T = 1"])
def test_step_by_step(
    kit: Any, engine: str, n: int, heads: tuple[int, int], keep_time: bool
) -> None:
    op = cw.library.gated_delta_product
    H, HV = heads
    inputs = kit.make_inputs(op, kit.Sizes(T=4, H=H, HV=HV, K=5, V=4, micro=n, initial=True))
    want = kit.oracle_results(op, inputs)
    per_token = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    state, outputs = inputs.options["initial_state"].detach(), []
    with torch.no_grad():
        for t in range(4):
            at: Any = slice(t, t + 1) if keep_time else t
            token = {m: x[:, at] if m in per_token else x for m, x in inputs.operands.items()}
            o, state = op.step(**token, state=state, engine=engine)
            outputs.append(o[:, 0] if keep_time else o)
    got = {"o": torch.stack(outputs, 1), "final 0": state}
    kit.assert_agree(got, {name: want[name] for name in got}, kit.tolerance)


def test_one_householder_by_its_other_name(
    kit: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another library's users spell it: `[B,T*n,H,K]`, here with n = 1, is the delta rule."""
    inputs = kit.make_inputs(cw.library.gated_delta_rule, kit.Sizes(T=9, H=3, HV=3, K=5, V=4))
    x = {n: x.detach() for n, x in inputs.operands.items()}
    monkeypatch.setenv("CHUNKWISE_ENGINE", engine)
    o, _ = cw.fla.chunk_gated_delta_product(*x.values(), num_householder=1, scale=1.0)
    want, _ = cw.library.gated_delta_rule(**x, engine="reference")
    kit.assert_agree({"o": o}, {"o": want}, kit.tolerance)


def _agrees(kit: Any, op: cw.Recurrence, engine: str, inputs: Any) -> None:
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )
