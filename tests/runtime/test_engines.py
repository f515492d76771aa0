"""Every engine agrees with the float64 token loop: outputs, final states, every gradient."""

from __future__ import annotations

from typing import Any

import chunkwise as cw
import pytest
import torch

# one per class that an engine may treat apart
RULES = (
    "linear_attention",  # no decay
    "retention",  # a decay per head
    "simple_gla",  # a scalar gate
    "gla",  # a gate per key channel
    "delta_rule",  # one write, symmetric
    "gated_delta_rule",  # the same, decayed
    "kda",  # the same, decayed per key channel
    "comba",  # the correction reads the undecayed state, with another key
    "dplr",  # general rank one
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "initial state": {"initial": True},
    "grouped heads": {"HV": 4, "initial": True},
    "K != V": {"K": 5, "V": 11, "initial": True},
    "one token": {"T": 1, "initial": True},
    "no token": {"T": 0, "initial": True},
    "no token, no state": {"T": 0},
    "longer than a chunk": {"B": 1, "T": 67, "K": 4, "V": 4},
}

PACKINGS: dict[str, tuple[int, ...]] = {
    "ragged": (7, 1, 11),
    "empty sequences": (0, 5, 0, 0, 9, 0),
    "one": (13,),
    "only empty": (0, 0),
}


def _supported(op: cw.Recurrence, engine: str, inputs: Any) -> bool:
    """False where the engine refuses, which must then be by a NotLowered."""
    try:
        op(**inputs.operands, **inputs.options, engine=engine)
    except cw.errors.NotLowered:
        return False
    return True


@pytest.mark.interpreted_elsewhere  # codegen/test_interpreter.py
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_the_oracle(kit: Any, engine: str, rule: str, variant: str) -> None:
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(**VARIANTS[variant]))
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )


@pytest.mark.interpreted_elsewhere  # codegen/test_interpreter.py
@pytest.mark.parametrize("initial", [False, True], ids=["zero state", "initial state"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rule", ["simple_gla", "gated_delta_rule", "kda"])
def test_packed_batches(kit: Any, engine: str, rule: str, packing: str, initial: bool) -> None:
    op = getattr(cw.library, rule)
    sizes = kit.Sizes(HV=4, K=4, V=3, initial=initial).packed(*PACKINGS[packing])
    inputs = kit.make_inputs(op, sizes)
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )


@pytest.mark.parametrize("rule", ["linear_attention_normalised", "delta_product", "rwkv6", "oja"])
def test_the_wider_library(kit: Any, engine: str, rule: str) -> None:
    """Several states, micro-steps, a read before, a transposed form: right, or refused by name."""
    op = getattr(cw.library, rule)
    inputs = kit.make_inputs(op, kit.Sizes(T=9, initial=True))
    if not _supported(op, engine, inputs):
        assert engine != "reference"
        return
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.008), (torch.float16, 0.004)],
    ids=["float32", "bfloat16", "float16"],
)
def test_dtypes(kit: Any, engine: str, dtype: torch.dtype, tolerance: float) -> None:
    """o in v's dtype, states in float32, gradients in the operand's dtype; rounding is all."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(initial=True, dtype=dtype))
    if not _supported(op, engine, inputs):  # Triton's interpreter rounds bfloat16 wrongly
        assert engine == "triton"
        return
    got = kit.engine_results(op, inputs, engine)
    assert got["o"].dtype is dtype
    assert got["final 0"].dtype is torch.float32
    assert {n: got[f"d{n}"].dtype for n in inputs.operands} == dict.fromkeys(inputs.operands, dtype)
    assert got["dinitial 0"].dtype is torch.float32
    if kit.engine.device == "cuda":
        tolerance = max(tolerance, 1e-4)
    kit.assert_agree(got, kit.oracle_results(op, inputs), tolerance)


def test_operands_of_mixed_dtypes(kit: Any, engine: str) -> None:
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes(dtype=torch.float32))
    for name in ("q", "k", "v"):
        low = inputs.operands[name].detach().to(torch.bfloat16)
        inputs.operands[name] = low.requires_grad_()
    if not _supported(op, engine, inputs):
        assert engine == "triton"
        return
    got = kit.engine_results(op, inputs, engine)
    assert got["o"].dtype is torch.bfloat16
    assert got["dg"].dtype is torch.float32
    kit.assert_agree(got, kit.oracle_results(op, inputs), 0.008)


def test_operands_with_strides(kit: Any, engine: str) -> None:
    """Views of one projection, transposed layouts: what models really pass."""
    op = cw.library.gated_delta_rule
    inputs = kit.make_inputs(op, kit.Sizes())
    want = kit.engine_results(op, inputs, engine)
    for name, x in list(inputs.operands.items()):
        strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
        if x.ndim == 4:  # the channels strided as well
            strided = torch.stack((strided, strided), dim=-1)[..., 0]
        assert not strided.is_contiguous()
        inputs.operands[name] = strided.requires_grad_()
    kit.assert_agree(kit.engine_results(op, inputs, engine), want, 1e-3 * kit.tolerance)


def test_a_key_gate_may_belong_to_the_value_heads(kit: Any, engine: str) -> None:
    op = cw.library.kda
    inputs = kit.make_inputs(op, kit.Sizes(HV=4))
    g = inputs.operands["g"].detach()
    inputs.operands["g"] = torch.cat((g, 2 * g), dim=2).requires_grad_()
    kit.assert_agree(
        kit.engine_results(op, inputs, engine), kit.oracle_results(op, inputs), kit.tolerance
    )


def test_the_future_does_not_change_the_past(kit: Any, engine: str) -> None:
    op = cw.library.kda
    inputs = kit.make_inputs(op, kit.Sizes(T=33))
    before, _ = op(**inputs.operands, engine=engine)
    changed = {n: x.detach().clone() for n, x in inputs.operands.items()}
    for x in changed.values():
        x[:, 20:] *= 0.5
    after, _ = op(**changed, engine=engine)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_engine_of_the_environment(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CHUNKWISE_ENGINE chooses where the call does not."""
    op = cw.library.simple_gla
    inputs = kit.make_inputs(op, kit.Sizes(T=4))
    monkeypatch.setenv("CHUNKWISE_ENGINE", "nonsense")
    with pytest.raises(cw.errors.EngineUnavailable, match="nonsense"):
        op(**inputs.operands)
    op(**inputs.operands, engine="eager")
    op(**inputs.operands, engine=cw.EngineName.EAGER)


def test_a_step_without_chunk_form_runs_token_by_token(kit: Any) -> None:
    """What NotAffine recommends is possible: declare it for the reference engine."""

    def squashed(S: cw.State, q: cw.Key, k: cw.Key, v: cw.Value) -> tuple[cw.State, cw.Value]:
        S = S + cw.outer(k, cw.tanh(v - k @ S))
        return S, q @ S

    with pytest.raises(cw.errors.NotAffine):
        cw.recurrence(squashed)
    op = cw.recurrence(engine="reference")(squashed)
    inputs = kit.make_inputs(op, kit.Sizes(T=6, initial=True))
    kit.assert_agree(
        kit.engine_results(op, inputs, "reference"), kit.oracle_results(op, inputs), 1e-12
    )
    assert op(**inputs.operands)[0].shape == (2, 6, 2, 8)
    with pytest.raises(cw.errors.NotAffine):
        op(**inputs.operands, engine="eager")
