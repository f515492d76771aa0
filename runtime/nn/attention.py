"""Softmax attention, global and sliding-window: the other mixers of a hybrid model.

They call torch's `scaled_dot_product_attention`. A windowed layer attends in blocks, each to itself
and the block before, so that memory grows with `T * window` and not with `T * T`; but in a program
that torch.export made for any number of tokens it masks a square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wide import wide
from .parts import Mixer, Split, across_ranks, last_tokens, multiple, positions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class AttentionState:
    """The state of attention between two tokens.

    Attributes:
        keys: the visible keys, rotated, the last token's last, `[B, H, S, D]`; S is what the
            longest sequence sees, and shorter ones begin with zeros that they do not see.
        values: their values, `[B, H, S, D]`.
        position: the position of each sequence's next token, int64 `[B]`.
    """

    keys: Tensor
    values: Tensor
    position: Tensor


def rotate(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of `x [..., T, H, D]` at `position [..., T]` (Su et al. 2021); D is even."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.float()[..., None, None] * frequency
    a, b = wide(x).split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module, Mixer):
    """Causal softmax attention (Vaswani et al. 2017) with rotary positions (Su et al. 2021).

    Args:
        hidden: size of the token vectors.
        heads: query heads; `hidden` is a multiple of `2 * heads`.
        window: each token sees itself and the `window - 1` tokens before it; None sees all.

    Raises:
        ValueError: `hidden` is not a multiple of `2 * heads`, or `window < 1`.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(self, hidden: int, heads: int, window: int | None = None) -> None:
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"hidden must be a multiple of 2 * heads: got {hidden} and {heads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1: got {window}")
        self.heads, self.window, self.channels = heads, window, hidden // heads
        self.hidden = hidden
        self.project = nn.Linear(hidden, 3 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def split(self, ranks: int) -> dict[str, Split | None]:
        """Keep the heads of one of `ranks` alone: how its parameters are split (tensor_parallel).

        Args:
            ranks: how many.

        Returns:
            By the path of each parameter, how ranks split it.

        Raises:
            ValueError: the heads are not a multiple of `ranks`.
        """
        multiple(ranks, heads=self.heads)
        parts = (self.heads * self.channels,) * 3
        self.heads //= ranks
        return {"project.weight": Split(0, parts), "output.weight": Split(1)}

    def _qkv(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            y.unflatten(-1, (self.heads, self.channels)) for y in self.project(x).chunk(3, dim=-1)
        )
        q, k = rotate(q, position), rotate(k, position)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _join(self, o: Tensor) -> Tensor:
        y: Tensor = self.output(o.transpose(1, 2).flatten(-2))
        return y

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """The outputs of whole sequences.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, which are independent; then
                B = 1.
            group: the ranks over which the tokens are split in order, as of a call of an op; then
                x has this rank's tokens, and `cu_seqlens` counts those of all. Keys and values of
                the tokens before them, as far as they are seen, are gathered on every rank.

        Returns:
            `[B, T, hidden]`.
        """
        return self._attend(x, cu_seqlens, group)[0]

    def _attend(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, and the keys and values of all tokens, `[B, H, T, D]`."""
        tokens, before, counts = x.shape[1], 0, ()
        if group is not None:
            halo = across_ranks()
            counts = halo.counted(x, "attention", cu_seqlens, group)
            before = halo.before(counts, group)
        sequence = None
        position = torch.arange(before, before + tokens, dtype=torch.int64, device=x.device)
        if cu_seqlens is not None and group is None:
            sequence, position = positions(cu_seqlens, tokens)
        elif cu_seqlens is not None:
            sequence, position = halo.sequences(cu_seqlens.to(x.device), counts, group)
            position = position[before:]
        q, k, v = self._qkv(x, position)
        if group is not None:
            if self.window is not None:
                before = min(before, self.window - 1)
            k, v = self._with_before(k, v, before, counts, group)
            sequence = None if sequence is None else sequence[len(sequence) - before - tokens :]
        return self._join(_mixed(q, k, v, before, self.window, sequence)), k, v

    def _with_before(
        self, k: Tensor, v: Tensor, before: int, counts: tuple[int, ...], group: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values behind those of the tokens before this rank's that it sees."""
        halo, tokens = across_ranks(), k.shape[2]
        both = torch.cat((k, v), 1).transpose(1, 2)  # [B, T, 2 H, D]
        flat = both.flatten(2)
        if self.window is None:
            flat = halo.with_all_before(flat, counts, group)
        else:
            flat = halo.with_halo(flat, self.window - 1, group)[:, -before - tokens :]
        k, v = flat.unflatten(2, both.shape[2:]).transpose(1, 2).chunk(2, 1)
        return k, v

    def prefill(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, AttentionState]:
        y, k, v = self._attend(x, cu_seqlens)
        if cu_seqlens is None:
            lengths = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
        else:
            lengths = cu_seqlens.diff().long()
        longest = x.shape[1] if cu_seqlens is None else int(lengths.max())
        seen = longest if self.window is None else min(longest, self.window - 1)
        keys, values = (last_tokens(z.transpose(1, 2), seen, cu_seqlens) for z in (k, v))
        return y, AttentionState(keys.transpose(1, 2), values.transpose(1, 2), lengths)

    def initial_state(self, batch: int) -> AttentionState:
        weight = self.project.weight
        shape = batch, self.heads, 0, self.channels
        empty = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        start = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return AttentionState(empty, empty, start)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        q, k, v = self._qkv(x[:, None], state.position[:, None])
        keys, values = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        column = torch.arange(keys.shape[2], 0, -1, dtype=torch.int64, device=x.device)
        mask = (column <= state.position[:, None] + 1)[:, None, None]
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        if self.window is not None and keys.shape[2] >= self.window:
            keys, values = keys[:, :, 1:], values[:, :, 1:]
        return self._join(o)[:, 0], AttentionState(keys, values, state.position + 1)


class GlobalAttention(Attention):
    """Attention over the whole past.

    Args:
        hidden: size of the token vectors.
        heads: query heads; `hidden` is a multiple of `2 * heads`.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads)


class SlidingWindowAttention(Attention):
    """Attention over the last tokens, at a cost linear in T.

    Args:
        hidden: size of the token vectors.
        heads: query heads; `hidden` is a multiple of `2 * heads`.
        window: each token sees itself and the `window - 1` tokens before it.
    """

    def __init__(self, hidden: int, heads: int, window: int) -> None:
        super().__init__(hidden, heads, window)


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, before: int, window: int | None, sequence: Tensor | None
) -> Tensor:
    """Causal attention of `[B, H, T, D]` to `[B, H, before + T, D]`, the `sequence` of each key."""
    tokens = q.shape[2]
    # tokens of an exported program, whose number is a symbol, are not cut into blocks
    symbolic = isinstance(tokens, torch.SymInt)
    if window is not None and not symbolic and window < tokens:
        return _windowed(F.pad(q, (0, 0, before, 0)), k, v, window, sequence)[:, :, before:]
    if sequence is None and (window is None or (not symbolic and not before)):
        if before:
            # whose import takes seconds
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(tokens, before + tokens)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    column = torch.arange(before + tokens, dtype=torch.int64, device=q.device)
    back = column[before:, None] - column
    mask = back >= 0
    if window is not None:
        mask = mask & (back < window)
    if sequence is not None:
        mask = mask & (sequence[before:, None] == sequence)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, sequence: Tensor | None) -> Tensor:
    """Banded attention over `[B, H, T, D]`: a block of `window` rows sees itself and the last."""
    tokens = q.shape[2]
    blocks = -(-tokens // window)
    extra = blocks * window - tokens

    def blocked(x: Tensor, before: int) -> Tensor:
        """`[B, H, blocks, (1 + before) * window, D]`, zeros before the start and past the end."""
        padded = F.pad(x, (0, 0, before * window, extra))
        own = padded.unfold(2, (1 + before) * window, window)
        return own.transpose(-1, -2)

    def numbers(count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int64, device=q.device)

    row, column = numbers(window)[:, None], numbers(2 * window) - window
    start = numbers(blocks)[:, None, None] * window
    # rows past the end attend to padding, never to nothing (that would be NaN)
    mask = (column <= row) & (column > row - window) & (start + column >= 0)
    if sequence is not None:
        padded = F.pad(sequence, (window, extra), value=-1).unfold(0, 2 * window, window)
        mask = mask & (padded[:, window:, None] == padded[:, None, :])
    # of four axes, which torch's fused kernels want: [B * H, blocks, rows, D]
    own, keys, values = (blocked(x, n).flatten(0, 1) for x, n in ((q, 0), (k, 1), (v, 1)))
    o = F.scaled_dot_product_attention(own, keys, values, attn_mask=mask)
    return o.reshape(*q.shape[:2], blocks * window, -1)[:, :, :tokens]
