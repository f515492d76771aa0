"""A small language model whose mixers are a list: a hybrid is a list with two kinds in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Mixer, RMSNorm


class SwiGLU(nn.Module):
    """`W3 (silu(W1 x) * W2 x)` (Shazeer 2020).

    Args:
        hidden: size of the token vectors.
        width: size of the inner vectors.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of tokens, each by itself.

        Args:
            x: `[..., hidden]`.

        Returns:
            `[..., hidden]`.
        """
        a, b = self.up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(a) * b)
        return y


class Block(nn.Module, Mixer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        hidden: size of the token vectors.
        mixer: a module of the protocol `Mixer`.
        width: inner size of the MLP; None for `4 * hidden`, 0 for no MLP.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(self, hidden: int, mixer: nn.Module, width: int | None = None) -> None:
        super().__init__()
        width = 4 * hidden if width is None else width
        self.mixer_norm = RMSNorm(hidden)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(hidden) if width else None
        self.mlp = SwiGLU(hidden, width) if width else None

    @property
    def mix(self) -> Mixer:
        """The mixer.

        Returns:
            The module that was passed as `mixer`.
        """
        return cast(Mixer, self.mixer)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        y: Tensor = self.mlp(self.mlp_norm(x))
        return x + y

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The outputs of whole sequences.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, which are independent; then
                B = 1.

        Returns:
            `[B, T, hidden]`.
        """
        return self._mlp(x + self.mix(self.mixer_norm(x), cu_seqlens))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.mix.prefill(self.mixer_norm(x))
        return self._mlp(x + y), state

    def initial_state(self, batch: int) -> Any:
        return self.mix.initial_state(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mix.step(self.mixer_norm(x), state)
        return self._mlp(x + y), state


class LanguageModel(nn.Module):
    """Token embedding, one block per mixer, a norm, and logits over the vocabulary.

    Args:
        vocabulary: number of tokens there are.
        hidden: size of the token vectors.
        mixers: one module of the protocol `Mixer` per block.
        width: inner size of the MLPs; None for `4 * hidden`, 0 for no MLPs.
        tied: whether the embedding and the output share a weight.

    Raises:
        TypeError: `mixers` is one module.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        mixers: Sequence[nn.Module],
        *,
        width: int | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(mixers, nn.Module) and not isinstance(mixers, nn.ModuleList):
            raise TypeError("mixers is one module, expected a list: mixers=[layer]")
        self.embed = nn.Embedding(vocabulary, hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(hidden, m, width) for m in mixers)
        self.norm = RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def _blocks(self) -> list[Block]:
        return [cast(Block, b) for b in self.blocks]

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The logits of the token after each.

        Args:
            tokens: int64 `[B, T]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.

        Returns:
            `[B, T, vocabulary]`.
        """
        x = self.embed(tokens)
        for block in self._blocks():
            x = block(x, cu_seqlens)
        return self._logits(x)

    def initial_state(self, batch: int) -> list[Any]:
        """The state before the first token.

        Args:
            batch: number of sequences B.

        Returns:
            The states of the mixers, one per block.
        """
        return [b.initial_state(batch) for b in self._blocks()]

    def prefill(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        """The result of `forward`, and the state from which `step` continues.

        Args:
            tokens: int64 `[B, T]`.

        Returns:
            The logits `[B, T, vocabulary]`, and the states of the mixers after the last token.
        """
        x, states = self.embed(tokens), []
        for block in self._blocks():
            x, state = block.prefill(x)
            states.append(state)
        return self._logits(x), states

    def step(self, token: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token of every sequence.

        Args:
            token: int64 `[B]`.
            states: the states of the mixers before it.

        Returns:
            The logits of the next token `[B, vocabulary]`, and the new states.
        """
        x, after = self.embed(token), []
        for block, state in zip(self._blocks(), states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self._logits(x), after
