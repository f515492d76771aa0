"""Sampling of texts: a prefill of packed prompts, then a token of every text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..wide import wide

if TYPE_CHECKING:
    from .model import LanguageModel


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token by its probability.

    Args:
        logits: `[..., vocabulary]`.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: choose among the k likeliest tokens; None among all.
        top_p: choose among the fewest tokens whose probabilities add up to p (Holtzman et al.
            2020); None among all.
        generator: torch's, of the device of the logits; None for the default one.

    Returns:
        int64 `[...]`.

    Raises:
        ValueError: temperature < 0, top_k < 1, or top_p not in (0, 1].
    """
    if temperature < 0.0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature >= 0 and top_k >= 1 are wanted: got {temperature}, {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1]: got {top_p}")
    if temperature == 0.0:
        return logits.argmax(-1)
    ordered, token = (wide(logits) / temperature).sort(-1, descending=True)
    if top_k is not None:
        ordered, token = ordered[..., :top_k], token[..., :top_k]
    p = ordered.softmax(-1)
    if top_p is not None:
        p = p.where(p.cumsum(-1) - p < top_p, 0.0)  # the first is always among them
    chosen = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return token.gather(-1, chosen.reshape(*p.shape[:-1], 1))[..., 0]


def generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: int | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """As `LanguageModel.generate`."""
    lengths = [len(p) for p in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every prompt needs a token: got prompts of {lengths} tokens")
    first = prompts[0]
    ends = torch.tensor(lengths, dtype=torch.int64, device=first.device).cumsum(0)
    hidden, states = model.prefilled(
        torch.cat(list(prompts))[None], torch.cat([torch.zeros_like(ends[:1]), ends])
    )
    logits = model.logits(hidden[0, ends - 1])
    texts: list[Tensor] = []
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=first.device)
    for _ in range(tokens):
        token = sample(logits, temperature, top_k, top_p, generator)
        texts.append(token)
        if stop is not None:
            stopped |= token == stop
            if bool(stopped.all()):
                break
        if len(texts) < tokens:
            logits, states = model.step(token, states)
    made = torch.stack(texts, 1) if texts else ends.new_zeros(len(prompts), 0)
    return [_until(text, stop) for text in made]


def _until(text: Tensor, stop: int | None) -> Tensor:
    """A text up to and with the first `stop`."""
    found = [] if stop is None else (text == stop).nonzero()[:1, 0].tolist()
    return text[: found[0] + 1] if found else text
