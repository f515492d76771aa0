"""Decays of a vector gate, split within blocks of a chunk, are right whatever the gate."""

from __future__ import annotations

from dataclasses import replace

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Config
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan
from torch import Tensor

from tests.harness import Inputs, Sizes, engine_results, make_inputs, oracle_results
from tests.interpreted import TILES, Poisoned, served_under, small
from tests.tolerances import BY_DTYPE, assert_agree

pytestmark = pytest.mark.interpreter
SIZES = Sizes(B=1, T=75, H=1, HV=1, K=17, V=16, initial=True, dtype=torch.float32)

KINDS = ("mild", "strong", "floor of -5", "beyond the range", "resets")


def _gates(kind: str, z: Tensor) -> Tensor:
    return {
        "mild": torch.nn.functional.logsigmoid(z) / 2,
        "strong": -5 * torch.sigmoid(z),
        "floor of -5": torch.full_like(z, -5.0),
        "beyond the range": -30 * torch.sigmoid(3 * z),
        "resets": torch.where(z > 1.3, -1e6, -0.01 * z.abs()),
    }[kind]


def _inputs(op: cw.Recurrence, gate: str, kind: str, sizes: Sizes) -> Inputs:
    inputs = make_inputs(op, sizes)
    x = inputs.operands[gate]
    g = _gates(kind, torch.randn(x.shape, generator=torch.Generator().manual_seed(5)))
    x.data = (g.exp() if gate == "f" else g).to(x.dtype)
    return inputs


def _serve(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    def config(form: NormalForm) -> Config:
        return replace(small(form), chunk=chunk, default=replace(TILES, block=block))

    monkeypatch.setattr(launch_plan, "torch", Poisoned())
    monkeypatch.setattr(triton_engine, "_compiled_for", served_under(config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "gate"), [("kda", "g"), ("gla", "g"), ("rwkv6", "w"), ("hgrn2", "f")]
)
def test_blocks_are_the_token_loop(
    name: str, gate: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rwkv6 reads before the decay; hgrn2's gate is a factor, which may be 0."""
    _check(name, gate, kind, 64, 16, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "block"), [(64, 32), (32, 32)])
def test_blocks_of_another_length(
    kind: str, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a block is does not depend on the rule; kda has all that rules have."""
    _check("kda", "g", kind, chunk, block, monkeypatch)


def _check(
    name: str, gate: str, kind: str, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(monkeypatch, chunk, block)
    op = getattr(cw.library, name)
    inputs = _inputs(op, gate, kind, SIZES)
    got, want = engine_results(op, inputs, "triton"), oracle_results(op, inputs)
    # at -5 everywhere dw of rwkv6 nearly vanishes, as a difference of sums: halves alone err 1e-4
    hard = name == "rwkv6" and kind == "floor of -5"
    limit = replace(BY_DTYPE[torch.float32], gates=2e-4) if hard else BY_DTYPE[torch.float32]
    assert_agree(got, want, limit)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "strong"), (torch.float16, "strong"), (torch.float16, "resets")],
)
def test_blocks_in_packed_sequences(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With factors of 16 bits, sums over time are products of three parts."""
    _serve(monkeypatch, 64, 16)
    sizes = replace(SIZES, H=1, HV=2, dtype=dtype, gate_dtype=torch.float32).packed(33, 0, 65, 2)
    inputs = _inputs(cw.library.kda, "g", kind, sizes)
    got = engine_results(cw.library.kda, inputs, "triton")
    assert_agree(got, oracle_results(cw.library.kda, inputs), BY_DTYPE[dtype])


@pytest.mark.parametrize("at", [3, 17, 40])
def test_later_tokens_round_nothing_before_them(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where later gates leave the range of a block and earlier ones do not."""
    _serve(monkeypatch, 64, 16)
    inputs = _inputs(cw.library.kda, "g", "mild", SIZES)
    operands = {n: x.detach() for n, x in inputs.operands.items()}
    before, _ = cw.library.kda(**operands, engine="triton")
    operands["g"] = operands["g"].clone()
    operands["g"][:, at:] -= 60
    after, _ = cw.library.kda(**operands, engine="triton")
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])
