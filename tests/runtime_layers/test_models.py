"""Models of a config: saved and loaded, trained by a loss in runs of tokens, sampled from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import chunkwise as cw
import pytest
import torch
import torch.nn.functional as F
from chunkwise import Key, State, Value, outer
from chunkwise.nn import (
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    OperandRole,
    RecurrentConfig,
    linear_cross_entropy,
    linear_token_losses,
    mamba2,
    parameter_groups,
    perplexity,
    sample,
    token_losses,
)
from chunkwise.runtime.nn import losses
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

DELTA = RecurrentConfig("delta_rule", heads=2, key_dim=8, value_dim=8)
HYBRID = ModelConfig(
    vocabulary=24,
    hidden=16,
    mixers=(DELTA, AttentionConfig(2, window=4), mamba2(16, 8, 8), AttentionConfig(2)),
    width=32,
)


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(24, shape, generator=torch.Generator().manual_seed(seed))


def model(config: ModelConfig = HYBRID) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_config(config)


@pytest.fixture(autouse=True)
def _eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are asked here, not kernels, but in the long test."""
    if request.node.get_closest_marker("long") is None:
        monkeypatch.setenv("CHUNKWISE_ENGINE", "eager")


@cw.recurrence
def mine(S: State, q: Key, k: Key, v: Value) -> tuple[State, Value]:
    S = S + outer(k, v)
    return S, q @ S


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_with_its_shape(tmp_path: Path, tied: bool) -> None:
    config = replace(HYBRID, tied=tied)
    first = model(config)
    first.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = LanguageModel.from_pretrained(tmp_path / "m")
    assert again.config == config
    tokens = text(2, 12)
    torch.testing.assert_close(again(tokens), first(tokens), rtol=0, atol=0)
    assert (again.head.weight is again.embed.weight) is tied


def test_a_rule_of_the_users_own_and_every_option(tmp_path: Path) -> None:
    mixer = RecurrentConfig(
        "mine",
        heads=1,
        key_dim=4,
        value_dim=6,
        value_heads=2,
        conv_size=0,
        normalise=("k",),
        roles=(("q", OperandRole.LINEAR),),
        gated=True,
    )
    config = ModelConfig(24, 16, (mixer,))
    first = LanguageModel.from_config(config, rules={"mine": mine})
    first.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path, rules={"mine": mine})
    assert again.config == config
    assert again.blocks[0].mixer.roles["q"] is OperandRole.LINEAR
    with pytest.raises(cw.errors.UnknownRecurrence, match="mine"):
        LanguageModel.from_pretrained(tmp_path)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    replace(HYBRID, hidden=32).save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: .*mismatch for embed"):
        LanguageModel.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"heads": 2', '"heads": -2'))
    with pytest.raises(ValueError, match=r"mixers\[0\]\.heads is -2, expected a number from 1"):
        LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has no config"):
        LanguageModel(4, 4, []).save_pretrained(tmp_path)


def test_where_weights_start() -> None:
    """Normal with variance 2 / (5 d); over 2 L for what adds to the residual stream."""
    config = ModelConfig(500, 64, (replace(DELTA, key_dim=32, value_dim=32),) * 2)
    made = model(config)
    std = math.sqrt(2 / (5 * 64))
    block = made.blocks[0]
    for weight in (made.embed.weight, made.head.weight, block.mixer.project.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for weight in (block.mixer.output.weight, block.mlp.down.weight):
        assert weight.std().item() == pytest.approx(std / 2, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_of_linear_layers_decay(tied: bool) -> None:
    made = model(replace(HYBRID, tied=tied))
    decayed, rest = parameter_groups(made, 0.2)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    names = {id(p): n for n, p in made.named_parameters()}
    grouped = [names.pop(id(p)) for group in (decayed, rest) for p in group["params"]]
    assert not names
    for name in grouped[: len(decayed["params"])]:
        assert name.split(".")[-2] in ["project", "control", "gate", "output", "up", "down", "head"]
    assert ("head.weight" in grouped[: len(decayed["params"])]) is not tied
    assert any("convolve" in n for n in grouped[len(decayed["params"]) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_in_runs_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOGITS", 24 * 5)  # runs of 5 tokens, of 21
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 8, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(24, 8, generator=random).to(dtype).requires_grad_()
    targets = text(3, 7).index_fill(1, torch.tensor([2]), -100)
    mean = linear_cross_entropy(hidden, weight, targets)
    (3 * mean).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-6
    for mine_, torchs in zip(found, (hidden.grad, weight.grad), strict=True):
        assert mine_.dtype == dtype
        assert (mine_ - torchs).norm() <= tolerance * torchs.norm()
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(linear_token_losses(hidden, weight, targets), each)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        linear_cross_entropy(hidden[:1, :5], weight, targets[:1, :5])
    assert sum(x.count for x in seen.key_averages() if x.key == "aten::mm") == 1  # no gradients


def test_the_loss_of_a_model() -> None:
    made, tokens = model(), text(2, 13)
    loss = made(tokens[:, :-1], targets=tokens[:, 1:])
    logits = made(tokens[:, :-1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]))
    each = token_losses(made, tokens)
    torch.testing.assert_close(each.mean(), loss.detach())
    assert perplexity(each) == pytest.approx(math.exp(loss.item()), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = made(tokens[:, :-1], targets=tokens[:, 1:])
    narrow.backward()
    assert narrow.dtype == made.head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(narrow, loss, rtol=2e-2, atol=0)


def test_blocks_computed_again_have_the_same_gradients() -> None:
    tokens, bounds = text(1, 12), torch.tensor([0, 5, 12])
    gradients = []
    for again in (False, True):
        made = model()
        made.checkpointing = again
        made(tokens, bounds, targets=tokens).backward()
        gradients.append([p.grad for p in made.parameters()])
    torch.testing.assert_close(*gradients)


def test_greedy_texts_are_those_of_whole_calls() -> None:
    """Prompts of three lengths, against a call on the whole text for every token."""
    made = model().double()
    prompts = [text(n, seed=n) for n in (1, 9, 4)]
    made_texts = made.generate(prompts, 6, temperature=0.0)
    for prompt, found in zip(prompts, made_texts, strict=True):
        whole = prompt
        for _ in range(6):
            whole = torch.cat([whole, made(whole[None])[0, -1:].argmax(-1)])
        assert found.tolist() == whole[len(prompt) :].tolist()
    stop = int(made_texts[1][2])
    stopped = made.generate(prompts, 6, temperature=0.0, stop=stop)[1].tolist()
    assert stopped == made_texts[1].tolist()[: stopped.index(stop) + 1]
    with pytest.raises(ValueError, match="prompts of \\[0\\] tokens"):
        made.generate([text(0)], 3)


def test_what_is_sampled() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)

    def shares(**options: float) -> list[float]:
        drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)
    assert shares(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.03)
    assert shares(top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.03)
    assert shares(top_p=0.1) == [1, 0, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.03)
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="got"):
            sample(logits, **wrong)


@pytest.mark.long
@pytest.mark.parametrize("name", cw.library.names())
def test_every_rule_trains_from_its_start(name: str) -> None:
    """50 steps of AdamW at a usual rate, by kernels, on texts of 512 tokens; all stays finite."""
    micro = getattr(cw.library, name).declaration.default_micro
    mixer = RecurrentConfig(name, heads=2, key_dim=16, value_dim=16, micro_steps=micro)
    made = model(ModelConfig(24, 32, (mixer, mixer)))
    optimiser = torch.optim.AdamW(parameter_groups(made), lr=3e-3)
    first = last = 0.0
    for step in range(50):
        tokens = (text(4, 1, seed=step) + torch.arange(513)) % 24
        loss = made(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        assert norm.isfinite(), step
        optimiser.step()
        optimiser.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 * first
