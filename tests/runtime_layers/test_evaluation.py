"""Measures of language models, against values that are known."""

from __future__ import annotations

import math

import pytest
import torch
from chunkwise.nn import (
    loss_by_position,
    perplexity,
    perplexity_distance,
    recall_split,
    relative_perplexities,
    token_losses,
)
from chunkwise.runtime.nn.evaluation import recalled
from torch import Tensor, nn

VOCABULARY = 8
TEXT = torch.tensor([[0, 1, 2, 0, 1, 3, 0, 1]])
AGAIN = torch.tensor([[False, False, False, True, False, False, True]])


class Bigrams(nn.Module):
    """A model that knows one table of logits by the last token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_a_model_that_knows_nothing() -> None:
    tokens = torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))
    losses = token_losses(Bigrams(torch.zeros(VOCABULARY, VOCABULARY)), tokens, batch=2)
    assert losses.shape == (5, 8)
    assert perplexity(losses) == pytest.approx(VOCABULARY)
    vector = relative_perplexities(losses, tokens, 2)
    assert list(vector.values()) == pytest.approx([1.0] * len(vector))


def test_losses_are_those_of_the_token_that_follows() -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    losses = token_losses(Bigrams(table), TEXT)
    expected = [
        -float(table[a].log_softmax(0)[b])
        for a, b in zip(TEXT[0, :-1].tolist(), TEXT[0, 1:].tolist(), strict=True)
    ]
    assert losses[0].tolist() == pytest.approx(expected)


def test_recalled_tokens_end_a_bigram_seen_before() -> None:
    assert recalled(TEXT).tolist() == AGAIN.tolist()
    losses = torch.where(AGAIN, 0.0, math.log(4.0))
    split = recall_split(losses, TEXT)
    assert (split.recalled, split.others, split.share) == pytest.approx((1.0, 4.0, 2 / 7))
    assert math.isnan(recall_split(losses[:, :2], TEXT[:, :3]).recalled)


def test_loss_by_position() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]])
    assert loss_by_position(losses).tolist() == [2.0, 3.0, 4.0, 5.0]
    assert loss_by_position(losses, bins=2).tolist() == [2.5, 4.5]
    with pytest.raises(ValueError, match="bins must be from 1 to 4: got 5"):
        loss_by_position(losses, bins=5)


def test_a_text_as_a_vector_of_relative_perplexities() -> None:
    losses = torch.tensor([[0.0, 2.0, 0.0, 2.0, 1.0, 1.0, 1.0]])  # a mean of 1
    vector = relative_perplexities(losses, TEXT)
    assert list(vector) == [(1,), (2,), (0,), (3,)]
    assert vector[(2,)] == pytest.approx(math.e)
    assert vector[(1,)] == pytest.approx(1.0)  # 0, 2 and 1 on average
    assert vector[(0,)] == pytest.approx(math.exp(-0.5))
    pairs = relative_perplexities(losses, TEXT, 2)
    assert pairs[(0, 1)] == pytest.approx(math.exp((1.0 + 1.0) / 2 - 1))
    assert perplexity_distance(vector, vector) == 0.0
    louder = {g: x * math.e for g, x in vector.items()}
    assert perplexity_distance(vector, louder) == pytest.approx(1.0)
    assert math.isnan(perplexity_distance(vector, {}))
    with pytest.raises(ValueError, match="n must be from 1 to 7: got 8"):
        relative_perplexities(losses, TEXT, 8)
