"""A layer of `my_rule`, in a small language model that learns to count in steps of 1 to 3.

Run it: python layer.py
"""

from __future__ import annotations

import torch
from chunkwise.nn import LanguageModel, RecurrentLayer
from my_rule import my_rule
from torch.nn.functional import cross_entropy

VOCABULARY, HIDDEN, HEADS, TOKENS = 16, 64, 2, 32


def layer() -> RecurrentLayer:
    """A layer with K = 16, V = 32: `[B, T, HIDDEN]` to the same; its keys have length 1."""
    return RecurrentLayer(my_rule, HIDDEN, HEADS, 16, 32, normalise=("q", "k"))


def texts(count: int) -> torch.Tensor:
    """Texts that count on from any number, modulo VOCABULARY: `[count, TOKENS]`."""
    first, stride = torch.randint(VOCABULARY, (count, 1)), torch.randint(1, 4, (count, 1))
    return (first + stride * torch.arange(TOKENS)) % VOCABULARY


def train(steps: int = 60) -> tuple[float, float]:
    """The loss before and after `steps` steps."""
    torch.manual_seed(0)
    model = LanguageModel(VOCABULARY, HIDDEN, [layer()])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        text = texts(8)
        logits = model(text)[:, :-1]  # each predicts the token after it
        loss = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.3f}", flush=True)
    return losses[0], losses[-1]


if __name__ == "__main__":
    train()
