"""How language models are judged: loss by position, perplexity, recall, vectors of perplexities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wide import wide
from .model import LanguageModel


def token_losses(model: nn.Module, tokens: Tensor, batch: int = 8) -> Tensor:
    """The loss of every token but the first, without gradients.

    Args:
        model: gives logits `[B, T, vocabulary]` of tokens `[B, T]`; those of a `LanguageModel`
            never exist all at once.
        tokens: int64 `[N, T]`.
        batch: texts in one call.

    Returns:
        Minus the natural log of each token's probability, `[N, T - 1]`, float32 on the CPU.
    """
    losses = []
    with torch.no_grad():
        for part in tokens.split(batch):
            if isinstance(model, LanguageModel):
                found = model.token_losses(part[:, :-1], part[:, 1:])
            else:
                logits = wide(model(part)[:, :-1]).transpose(1, 2)
                found = F.cross_entropy(logits, part[:, 1:], reduction="none")
            losses.append(found.float().cpu())
    return torch.cat(losses)


def perplexity(losses: Tensor) -> float:
    """The perplexity of a text: e to the mean loss.

    Args:
        losses: of its tokens, `[...]`.

    Returns:
        A number of at least 1; infinite where it overflows.
    """
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf


def loss_by_position(losses: Tensor, bins: int | None = None) -> Tensor:
    """The mean loss at every position: how much a longer context helps.

    Args:
        losses: `[N, T]`, of `token_losses`.
        bins: number of runs of neighbouring positions to average; None for every position.

    Returns:
        `[T]`, or `[bins]`.

    Raises:
        ValueError: there are fewer positions than bins, or no bins.
    """
    mean = losses.double().mean(0)
    if bins is None:
        return mean
    if not 1 <= bins <= len(mean):
        raise ValueError(f"bins must be from 1 to {len(mean)}: got {bins}")
    return torch.stack([part.mean() for part in mean.tensor_split(bins)])


def recalled(tokens: Tensor) -> Tensor:
    """Which tokens end a bigram that occurred before in the same text (Arora et al. 2024).

    Args:
        tokens: int64 `[N, T]`.

    Returns:
        bool `[N, T - 1]`, aligned with `token_losses`.
    """
    found = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.bool, device="cpu")
    for row, text in enumerate(tokens.tolist()):
        seen: set[tuple[int, int]] = set()
        for at, bigram in enumerate(itertools.pairwise(text)):
            found[row, at] = bigram in seen
            seen.add(bigram)
    return found


@dataclass(frozen=True, slots=True)
class RecallSplit:
    """Perplexities of tokens that the context shows how to continue, and of the others.

    Attributes:
        recalled: of tokens whose bigram occurred before; NaN where there are none.
        others: of all other tokens; NaN where there are none.
        share: the part of tokens that are recalled.
    """

    recalled: float
    others: float
    share: float


def recall_split(losses: Tensor, tokens: Tensor) -> RecallSplit:
    """The perplexity of recalled tokens against that of the others (Arora et al. 2024).

    Args:
        losses: `[N, T - 1]`, of `token_losses`.
        tokens: int64 `[N, T]`.

    Returns:
        Both perplexities, and the share of recalled tokens.
    """
    which = recalled(tokens)
    parts = (losses[which], losses[~which])
    first, second = (perplexity(x) if x.numel() else math.nan for x in parts)
    return RecallSplit(first, second, float(which.double().mean()))


def relative_perplexities(
    losses: Tensor, tokens: Tensor, n: int = 1
) -> dict[tuple[int, ...], float]:
    """A text as a vector: the perplexity of every n-gram in it, relative to the whole text's.

    Args:
        losses: `[N, T - 1]`, of `token_losses`.
        tokens: int64 `[N, T]`.
        n: length of the n-grams.

    Returns:
        By n-gram, in order of first occurrence: e to the mean loss of its tokens over all its
        occurrences, less the text's mean loss. Numbers above 1 surprise more than the text does.

    Raises:
        ValueError: n is not from 1 to T - 1.
    """
    if not 1 <= n <= losses.shape[1]:
        raise ValueError(f"n must be from 1 to {losses.shape[1]}: got {n}")
    average = float(losses.double().mean())
    means = losses.double().unfold(1, n, 1).mean(-1)
    sums: dict[tuple[int, ...], list[float]] = {}
    for text, row in zip(tokens[:, 1:].tolist(), means.tolist(), strict=True):
        for at, mean in enumerate(row):
            sums.setdefault(tuple(text[at : at + n]), []).append(mean)
    return {gram: math.exp(sum(x) / len(x) - average) for gram, x in sums.items()}


def perplexity_distance(
    a: Mapping[tuple[int, ...], float], b: Mapping[tuple[int, ...], float]
) -> float:
    """How differently two models, or one model in two texts, are surprised by the same n-grams.

    Args:
        a: relative perplexities by n-gram.
        b: others.

    Returns:
        The root mean square difference of their logarithms over n-grams in both; NaN where there
        are none.
    """
    shared: Iterable[tuple[int, ...]] = a.keys() & b.keys()
    squares = [math.log(a[g] / b[g]) ** 2 for g in shared]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan
