"""Layers of every declaration give the same results in parallel, packed, and token by token."""

import itertools
from typing import Any

import pytest
import torch
from chunkwise.dsl import Key, State, Value, errors, exp, library, outer
from chunkwise.dsl.declaration import Declaration
from chunkwise.runtime.nn.attention import GlobalAttention, SlidingWindowAttention
from chunkwise.runtime.nn.layers import RecurrentLayer
from chunkwise.runtime.nn.model import LanguageModel
from chunkwise.runtime.nn.parts import RMSNorm, ShortConvolution
from chunkwise.runtime.nn.roles import OperandRole
from chunkwise.runtime.recurrence import Recurrence
from chunkwise.runtime.wide import l2norm
from torch import Tensor, nn

HIDDEN, TOKENS = 16, 9
CU_SEQLENS = torch.tensor([0, 1, 1, 6, 9])  # one token, none, more and fewer than the convolution
DECLARATIONS = {d.name: d for d in library.all_declarations()}


def layer(
    declaration: Declaration, engine: str | None = "reference", **options: object
) -> nn.Module:
    torch.manual_seed(0)
    options = {"value_heads": 4, "micro_steps": declaration.default_micro, **options}
    made = RecurrentLayer(Recurrence(declaration), HIDDEN, 2, 4, 6, engine=engine, **options)
    return made.double()


def attention(window: int | None) -> nn.Module:
    torch.manual_seed(0)
    made = (
        GlobalAttention(HIDDEN, 2) if window is None else SlidingWindowAttention(HIDDEN, 2, window)
    )
    return made.double()


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64)


def slots(S: State, s: Key, g: Key, k: Value, q: Value) -> tuple[State, Key]:
    S = exp(g) * S + outer(s, k)
    return S, S @ q


# one of each kind of decay, of state and of operand; two micro-steps; a transposed state
MIXERS = {
    **{
        name: lambda name=name: layer(DECLARATIONS[name], normalise=("k",), gated=True)
        for name in ("delta_rule", "kda", "retention", "gated_delta_product", "oja", "rwkv6")
    },
    "mlstm": lambda: layer(DECLARATIONS["mlstm"]),
    "an output that is a Key": lambda: layer(Declaration(slots), gated=True),
    "no convolution": lambda: layer(DECLARATIONS["gated_delta_rule"], conv_size=0),
    "global attention": lambda: attention(None),
    # narrower than a block of padding, a divisor of T, wider than T
    "window 2": lambda: attention(2),
    "window 3": lambda: attention(3),
    "window 20": lambda: attention(20),
}


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
def test_step_continues_prefill_as_forward_does(name: str) -> None:
    mixer, x = MIXERS[name](), tokens()
    whole = mixer(x)
    y, state = mixer.prefill(x[:, :5])
    close(y, whole[:, :5])
    for t in range(5, TOKENS):
        y, state = mixer.step(x[:, t], state)
        close(y, whole[:, t])


@pytest.mark.parametrize("name", MIXERS)
def test_step_from_the_initial_state(name: str) -> None:
    mixer, x = MIXERS[name](), tokens(4)
    state, seen = mixer.initial_state(2), []
    for t in range(4):
        y, state = mixer.step(x[:, t], state)
        seen.append(y)
    close(torch.stack(seen, 1), mixer(x))


@pytest.mark.parametrize("name", MIXERS)
def test_packed_is_the_loop_over_sequences(name: str) -> None:
    mixer, x = MIXERS[name](), tokens(batch=1)
    bounds = CU_SEQLENS.tolist()
    apart = [mixer(x[:, a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    close(mixer(x, CU_SEQLENS), torch.cat(apart, 1))


@pytest.mark.parametrize("name", MIXERS)
def test_packed_prompts_of_any_lengths_are_continued(name: str) -> None:
    mixer, x = MIXERS[name](), tokens()
    lengths = [1, 7, 4]
    rows = [x[:1], x[1:], -x[:1]]
    packed = torch.cat([row[:, :n] for row, n in zip(rows, lengths, strict=True)], 1)
    y, state = mixer.prefill(packed, torch.tensor([0, 1, 8, 12]))
    close(y, mixer(packed, torch.tensor([0, 1, 8, 12])))
    for t in range(2):
        following = torch.cat([row[:, n + t] for row, n in zip(rows, lengths, strict=True)])
        y, state = mixer.step(following, state)
        for row, n, found in zip(rows, lengths, y, strict=True):
            close(found, mixer(row)[0, n + t])


@pytest.mark.parametrize("name", MIXERS)
def test_the_future_changes_nothing(name: str) -> None:
    mixer, x = MIXERS[name](), tokens()
    changed = torch.cat([x[:, :6], -x[:, 6:]], 1)
    close(mixer(x)[:, :6], mixer(changed)[:, :6])
    assert not torch.allclose(mixer(x)[:, 6:], mixer(changed)[:, 6:])


@pytest.mark.parametrize("name", DECLARATIONS)
def test_every_declaration_makes_a_layer_that_learns(name: str) -> None:
    """Roles follow from the declaration alone; every parameter gets a gradient."""
    mixer = layer(DECLARATIONS[name])
    mixer(tokens()).square().sum().backward()
    for parameter_name, p in mixer.named_parameters():
        assert p.grad is not None, parameter_name
        assert torch.isfinite(p.grad).all(), parameter_name


def test_roles_come_from_what_the_declaration_does() -> None:
    def roles(name: str) -> dict[str, OperandRole]:
        return layer(DECLARATIONS[name]).roles

    assert roles("delta_rule")["beta"] is OperandRole.UNIT
    assert roles("kda")["g"] is OperandRole.LOG_DECAY
    assert roles("hgrn2")["f"] is OperandRole.UNIT  # a factor, not its logarithm
    assert roles("rwkv7")["w"] is OperandRole.RAW  # the declaration applies its own sigmoid
    assert (
        layer(DECLARATIONS["rwkv7"], roles={"a": OperandRole.UNIT}).roles["a"] is OperandRole.UNIT
    )


def test_retention_starts_at_its_own_decays() -> None:
    mixer = layer(DECLARATIONS["retention"])
    expected = torch.log1p(-(2.0 ** (-5 - torch.arange(4.0))))
    g = mixer.found.range_of("g").of(mixer.per_head["g"])
    close(g, expected.double(), rtol=1e-6)  # drawn in float32


@pytest.mark.parametrize("option", [{"normalise": ("p",)}, {"roles": {"p": OperandRole.UNIT}}])
def test_a_name_that_is_no_operand(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="delta_rule has no operand 'p'; it has q, k, v, beta"):
        layer(DECLARATIONS["delta_rule"], **option)


def test_attention_says_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="multiple of 2 \\* heads: got 16 and 3"):
        GlobalAttention(16, 3)
    with pytest.raises(ValueError, match="window must be at least 1: got 0"):
        SlidingWindowAttention(16, 2, 0)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_to_no_tokens(window: int | None) -> None:
    x = tokens(0).requires_grad_()
    mixer = attention(window)
    assert mixer(x).shape == mixer.prefill(x)[0].shape == x.shape
    mixer(x).sum().backward()
    assert x.grad is not None


def test_window_is_a_band_of_the_global_softmax() -> None:
    """The expected result uses a dense mask, which shares no code with the blocks."""
    mixer, x, window = attention(3), tokens(), 3
    q, k, v = mixer._qkv(x, torch.arange(TOKENS))
    t = torch.arange(TOKENS)
    band = (t[:, None] >= t) & (t > t[:, None] - window)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~band, float("-inf"))
    close(mixer(x), mixer._join(scores.softmax(-1) @ v))


def test_convolution_is_torchs() -> None:
    conv, x = ShortConvolution(HIDDEN).double(), tokens()
    weight = conv.weight.flip(0).T[:, None]
    padded = nn.functional.pad(x.transpose(1, 2), (3, 0))
    close(conv(x), nn.functional.conv1d(padded, weight, groups=HIDDEN).transpose(1, 2))


def test_spans_of_a_convolution_that_was_made_without_memory() -> None:
    def made() -> ShortConvolution:
        return ShortConvolution(7, 4, [(4, True), (3, False)])

    with torch.device("meta"):
        without = made()
    assert torch.equal(without.to_empty(device="cpu").spans, made().spans)


def test_norms() -> None:
    x, one = tokens(), torch.ones(2, TOKENS, dtype=torch.float64)
    # eps is part of both definitions, and more than the rounding
    close(RMSNorm(HIDDEN)(x).square().mean(-1), one, rtol=1e-5)
    close(l2norm(x).square().sum(-1), one, rtol=1e-5)


def test_a_hybrid_is_a_list() -> None:
    mixers = [
        layer(DECLARATIONS["delta_rule"], normalise=("q", "k")),
        attention(4),
        layer(DECLARATIONS["simple_gla"]),
        attention(None),
    ]
    model = LanguageModel(20, HIDDEN, mixers).double()
    text = torch.randint(20, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    whole = model(text)
    logits, states = model.prefill(text[:, :4])
    close(logits, whole[:, :4])
    for t in range(4, TOKENS):
        logits, states = model.step(text[:, t], states)
        close(logits, whole[:, t])
    packed = model(text[:1], CU_SEQLENS)
    close(packed[:, 6:], model(text[:1, 6:]))
    assert model.initial_state(2)[1].position.tolist() == [0, 0]


def test_boundaries_of_a_layer_are_a_tensor() -> None:
    rule = Recurrence(library.delta_rule)
    layer: Any = RecurrentLayer(rule, 16, key_dim=8, value_dim=8, heads=2)
    with pytest.raises(errors.BadCuSeqlens, match="a list"):
        layer(torch.randn(1, 8, 16), cu_seqlens=[0, 3, 8])
