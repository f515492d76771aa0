"""What a layer does to each operand follows from what the declaration does with every operand."""

from __future__ import annotations

import chunkwise as cw
import pytest
import torch
from chunkwise import (
    HeadScalar,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    exp,
    l2norm,
    outer,
    relu,
    sigmoid,
    silu,
    within,
)
from chunkwise.nn import LanguageModel, OperandRole, RecurrentLayer, default_roles
from chunkwise.runtime.nn.roles import Pair, roles_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.classes import costly

HIDDEN = 32


@cw.recurrence
def own_activations(S: State, q: Key, k: Key, v: Value, b: Scalar) -> tuple[State, Value]:
    """A user's rule that activates everything itself, with step sizes in (0, 2)."""
    q, k = silu(q), l2norm(silu(k))
    S = S + 2 * sigmoid(b) * outer(k, v - k @ S)
    return S, q @ S


@cw.recurrence
def other_names(S: State, x: Key, y: Key, z: Value, q: Scalar, k: Scalar) -> tuple[State, Value]:
    """A gated delta rule whose operands have misleading names."""
    S = exp(q) * S
    S = S + k * outer(y, z - y @ S)
    return S, x @ S


@cw.recurrence
def gated_features(
    S: State, q: Key, k: Key, v: Value, r: Key, w: Value, y: Value, s: Scalar
) -> tuple[State, Value]:
    S = S + outer(k * r, sigmoid(w) * v)
    return S, y * (q @ S) + s * v


@cw.recurrence
def rates(S: State, q: Key, k: Key, v: Value, dt: Scalar, a: HeadScalar) -> tuple[State, Value]:
    S = exp(-exp(a) * dt) * S + outer(k, dt * v)
    return S, q @ S


@cw.recurrence
def promised(S: State, q: Key, k: Key, v: Value, g: Scalar, beta: Scalar) -> tuple[State, Value]:
    S = exp(within(g, -5, 0)) * S
    S = S + within(beta, 0, 2) * outer(k, v - k @ S)
    return S, q @ S


@cw.recurrence
def feature_maps(
    S: State, z: KeyState, q: Key, k: Key, v: Value
) -> tuple[tuple[State, KeyState], Value]:
    q, k = relu(q), exp(k)
    S, z = S + outer(k, v), z + k
    return (S, z), (q @ S) / (q @ z + 1.0)


def names(op: cw.Recurrence) -> dict[str, str]:
    return {n: r.name for n, r in default_roles(op.declaration.normal_form()).items()}


def made(op: cw.Recurrence, tokens: int = 400, **options: object) -> dict[str, Tensor]:
    """The operands that a layer passes to the op, of hidden vectors with large entries."""
    torch.manual_seed(0)
    layer = RecurrentLayer(op, HIDDEN, 2, 8, 8, engine="reference", **options)
    hidden = 5 * torch.randn(1, tokens, HIDDEN)
    operands = layer._operands(layer.project(hidden), hidden)
    return {x.name: y.detach() for x, y in zip(layer.operands, operands, strict=True)}


def test_what_a_rule_activates_itself_is_left_raw() -> None:
    assert names(own_activations) == {"q": "LINEAR", "k": "LINEAR", "v": "FEATURE", "b": "RAW"}
    assert roles_of(own_activations.declaration.normal_form()).unit == ()
    operands = made(own_activations)
    beta = 2 * torch.sigmoid(operands["b"])
    # sigmoid of a sigmoid would lie between 1 and 1.47
    assert beta.min() < 0.1
    assert beta.max() > 1.9
    assert operands["q"].min() < -1  # silu has no values below -0.28


def test_names_decide_nothing() -> None:
    wanted = {"x": "FEATURE", "y": "FEATURE", "z": "FEATURE", "q": "LOG_DECAY", "k": "UNIT"}
    assert names(other_names) == wanted
    assert roles_of(other_names.declaration.normal_form()).unit == ("y",)


def test_what_only_multiplies_features_is_a_gate() -> None:
    assert names(gated_features) == {
        "q": "FEATURE",
        "k": "FEATURE",
        "v": "FEATURE",
        "r": "UNIT",
        "w": "RAW",
        "y": "UNIT",
        "s": "UNIT",
    }


def test_a_rate_of_decay_is_positive() -> None:
    assert names(rates) == {
        "q": "FEATURE",
        "k": "FEATURE",
        "v": "FEATURE",
        "dt": "RATE",
        "a": "RAW",
    }
    assert made(rates)["dt"].min() >= 0


def test_promises_are_kept() -> None:
    assert names(promised)["beta"] == "BOUNDED"
    operands = made(promised)
    assert operands["g"].min() >= -5
    assert operands["g"].max() <= 0
    assert 0 <= operands["beta"].min() < 0.1
    assert 1.9 < operands["beta"].max() <= 2


def test_keys_of_a_denominator() -> None:
    assert names(feature_maps)["k"] == names(feature_maps)["q"] == "LINEAR"
    assert names(cw.library.linear_attention_normalised)["k"] == "POSITIVE"
    assert names(cw.library.mlstm)["k"] == "FEATURE"  # its denominator is at least 1
    assert names(cw.library.mlstm)["i"] == "LOG_UNIT"


@pytest.mark.parametrize(
    ("name", "own", "pair"),
    [
        ("comba", "p", Pair("k", 1.0)),
        ("momentum_delta", "p", Pair("k", 1.0)),
        ("dplr", "b", Pair("a", -1.0)),  # there the correction is added
    ],
)
def test_a_correction_reads_along_what_it_writes(name: str, own: str, pair: Pair) -> None:
    op = getattr(cw.library, name)
    assert roles_of(op.declaration.normal_form()).pairs == {own: pair}
    operands = made(op)
    along = (operands[own] * operands[pair.of]).sum(-1) * pair.sign
    assert along.min() >= 0
    assert along.max() <= 1 + 1e-5


def test_decays_start_slow() -> None:
    """Whatever the declaration does to its gates: from -0.001 to -0.5 where projections are 0."""
    started = {}
    for name in ("rwkv7", "hgrn2", "mamba2", "lightning_attention"):
        layer = RecurrentLayer(getattr(cw.library, name), HIDDEN, 2, 8, 8)
        p = {n: x.detach() for n, x in [*layer.biases.items(), *layer.per_head.items()]}
        started[name] = p
    decays = {
        "rwkv7": -0.6065306597126334 * started["rwkv7"]["w"].sigmoid(),
        "hgrn2": torch.nn.functional.logsigmoid(started["hgrn2"]["f"]),
        "mamba2": -softplus_of(started["mamba2"]["dt_bias"]),
        "lightning_attention": -softplus_of(started["lightning_attention"]["slope"]),
    }
    for name, g in decays.items():
        assert -0.51 < g.min() <= g.max() < -0.0009, name
    assert started["mamba2"]["D"].tolist() == [1.0, 1.0]


def softplus_of(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


def test_explain_shows_what_each_operand_gets() -> None:
    text = RecurrentLayer(cw.library.comba, HIDDEN, 2, 8, 8).explain()
    assert text.splitlines() == [
        "comba in a layer: hidden 32, H 2, HV 2, K 8, V 8",
        "q     Key     FEATURE    silu(conv(W x))",
        "k     Key     FEATURE    l2norm(silu(conv(W x)))",
        "v     Value   FEATURE    silu(conv(W x))",
        "p     Key     PAIRED     k · sigmoid(W x)",
        "g     Scalar  LOG_DECAY  -e^b' softplus(W x + b)",
        "beta  Scalar  UNIT       sigmoid(W x)",
        "output  W rms norm of o",
    ]


def test_a_pair_needs_a_correction() -> None:
    with pytest.raises(ValueError, match="no correction reads with 'q'"):
        RecurrentLayer(cw.library.comba, HIDDEN, 2, 8, 8, roles={"q": OperandRole.PAIRED})


@pytest.mark.parametrize("name", costly(cw.library.names()))
def test_every_rule_trains_without_overflow(name: str) -> None:
    """50 steps at a large rate; then, and at the start, a text of 1024 tokens stays finite."""
    torch.manual_seed(0)
    op = getattr(cw.library, name)
    micro = op.declaration.default_micro
    layer = RecurrentLayer(op, HIDDEN, 2, 8, 8, micro_steps=micro, engine="reference")
    model = LanguageModel(16, HIDDEN, [layer], width=0)
    long = torch.randint(16, (1, 1024))

    def largest() -> float:
        x = model.blocks[0].mixer_norm(model.embed(long))
        with torch.no_grad():
            operands = layer._operands(layer.convolve(layer.project(x)), x)
            return float(op(*operands, engine="reference", **layer.params)[0].abs().max())

    assert largest() < 1e4
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = (torch.randint(16, (4, 1)) + torch.arange(24)) % 16
    losses = []
    for _ in range(50):
        loss = cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert largest() < 1e4
