"""The functions of the package causal_conv1d: short convolutions over time, on any device.

A convolution is causal and depthwise: each channel sees its last W tokens, the last tap is the
token's own. Gradients are those of x, weight, bias and initial states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dsl import errors
from ..runtime.axes import check, measure
from ..runtime.nn import fused
from ..runtime.nn.parts import causal_convolution
from ..runtime.wide import L2_EPS, wide

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

_SILU = ("silu", "swish")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(_SILU, F.silu),
    "gelu": F.gelu,
    "relu": F.relu,
}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The convolution of whole sequences.

    Args:
        x: `[B,D,T]`.
        weight: `[D,W]`.
        bias: `[D]`.
        seq_idx: int `[B,T]`, the number of each token's sequence, if several lie one behind
            another; no token sees another sequence.
        initial_states: `[B,D,W-1]`, the tokens before the first; zeros where it is None.
        return_final_states: return the last W - 1 tokens too.
        final_states_out: `[B,D,W-1]`, where to write them.
        activation: "silu" ("swish"), "gelu", "relu", or None for none.

    Returns:
        `[B,D,T]` in x's dtype; with `return_final_states` a pair of it and `[B,D,W-1]`.

    Raises:
        BadShape: x, weight, bias or initial states do not fit together.
        BadOption: an activation that is none of these, or `seq_idx` with states.
    """
    sizes = _sizes(x, weight, bias)
    check(sizes, "BT", seq_idx=seq_idx)
    check(sizes, "BDS", initial_states=initial_states, final_states_out=final_states_out)
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise errors.BadOption("seq_idx", "a tensor", "None where states are passed or returned")
    before = sizes["S"]
    seen = x if initial_states is None else torch.cat([initial_states.to(x.dtype), x], -1)
    y = _convolved(seen.mT, weight, bias, seq_idx, activation).mT[..., seen.shape[2] - x.shape[2] :]
    if not return_final_states:
        return y
    short = max(before - seen.shape[2], 0)
    last = F.pad(seen, (short, 0))[..., seen.shape[2] + short - before :]
    return y, last.clone() if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next tokens, whose state is changed in place.

    Args:
        x: `[B,D]`, or `[B,D,T]` for several tokens.
        conv_state: the tokens before, `[B,D,S]` with S >= W - 1, or `[slots,D,S]`.
        weight: `[D,W]`.
        bias: `[D]`.
        activation: as for `causal_conv1d_fn`.
        cache_seqlens: int `[B]` in the package; refused unless None: states are not rings.
        conv_state_indices: int `[B]`, the slot of each sequence.

    Returns:
        `[B,D]` or `[B,D,T]` as x, in x's dtype.

    Raises:
        BadShape: x, weight, bias or states do not fit together.
        BadOption: an activation that is not offered, or `cache_seqlens`.
    """
    if cache_seqlens is not None:
        raise errors.BadOption("cache_seqlens", "a tensor", "None: states end with the last token")
    tokens = x.unsqueeze(-1) if x.ndim == 2 else x
    sizes = _sizes(tokens, weight, bias)
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices]
    check(sizes | {"S": max(sizes["S"], state.shape[-1])}, "BDS", conv_state=state)
    seen = torch.cat([state.to(x.dtype), tokens], -1)
    last = seen[..., seen.shape[2] - state.shape[2] :].to(conv_state.dtype)
    if conv_state_indices is None:
        conv_state.copy_(last)
    else:
        conv_state.index_copy_(0, conv_state_indices.long(), last)
    windows = seen[..., state.shape[2] - weight.shape[1] + 1 :].unfold(-1, weight.shape[1], 1)
    y = (wide(windows) * wide(weight).unsqueeze(1)).sum(-1)
    y = _activated(y if bias is None else y + wide(bias).unsqueeze(-1), activation).to(x.dtype)
    return y.squeeze(-1) if x.ndim == 2 else y


def _sizes(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, int]:
    """The sizes of a convolution, whose weights and bias fit to x."""
    sizes = measure("DW", weight=weight) | measure("BDT", x=x)
    check(sizes, "DW", weight=weight)
    check(sizes, "D", bias=bias)
    return sizes | {"S": sizes["W"] - 1}


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation not in _ACTIVATIONS:
        raise errors.BadOption("activation", activation, f"one of {', '.join(_ACTIVATIONS)}, None")
    return _ACTIVATIONS[activation](x)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, activation: str | None
) -> Tensor:
    """The convolution of `[B,T,D]`."""
    taps = weight.flip(1).mT.contiguous()  # the tap n is of the token n before
    position = None if seq_idx is None else _positions(seq_idx)
    if not fused.serves(x):
        y = causal_convolution(wide(x), wide(taps), position)
        return _activated(y if bias is None else y + wide(bias), activation).to(x.dtype)
    silu = bias is None and activation in _SILU
    rows = x if position is None else x.reshape(1, -1, x.shape[2])  # a position for every token
    at = None if position is None else position.flatten()
    spans, widest = _spans(x.shape[2], x.device)
    made: Tensor = fused.short_convolution(rows, taps, spans, widest, at, silu, L2_EPS)
    y = made.view(x.shape)
    if silu:
        return y
    return _activated(y if bias is None else wide(y) + wide(bias), activation).to(x.dtype)


@lru_cache
def _spans(channels: int, device: torch.device) -> tuple[Tensor, int]:
    """The spans of a convolution's channels, none of them scaled, and the widest one's channels."""
    table = fused.span_table([(channels, False)])
    with torch.inference_mode(mode=False):  # what is kept may be part of a graph later
        spans = torch.tensor(table, dtype=torch.int32, device=device)
    return spans, max(width for _, width, _ in table)


def _positions(seq_idx: Tensor) -> Tensor:
    """The position of each token in its own sequence, `[B,T]`, without waiting for a device."""
    t = torch.arange(seq_idx.shape[1], dtype=torch.int64, device=seq_idx.device)
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return t - torch.where(begins, t, 0).cummax(1).values
