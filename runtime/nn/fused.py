"""Parts of layers as one kernel each on a GPU, which keep their inputs alone for the backward.

The same parts are written in torch in `parts`; `serves` says which tensors come here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# tokens of a tile, which registers hold several times, and tiles of a program of the backward
_TOKENS, _TILES = 8, 16
_INSTALLED = importlib.util.find_spec("triton") is not None
_PROGRAMS = 512  # of a norm's backward, each with its own sum over rows
_ENTRIES = 8192  # of a row of logits at once
_CHANNELS = 128  # of a span that need not be one


def serves(x: Tensor) -> bool:
    """Whether kernels of this file take `x`: on a CUDA device, of at most 32 bits."""
    return x.is_cuda and x.dtype != torch.float64 and _INSTALLED


def _kernels() -> Any:
    from . import fused_kernels  # imports triton, which a CPU need not have

    return fused_kernels


def span_table(parts: Sequence[tuple[int, bool]]) -> list[tuple[int, int, bool]]:
    """Spans of channels, one for each program of a convolution.

    Args:
        parts: channels of consecutive parts, and whether each is scaled to length 1, as a whole.

    Returns:
        First channel, channels, and whether the span is scaled.
    """
    table, first = [], 0
    for width, unit in parts:
        most = width if unit else _CHANNELS
        for start in range(0, width, most):
            table.append((first + start, min(most, width - start), unit))
        first += width
    return table


def _above(n: int) -> int:
    """The least power of two that is no less than `n`."""
    return 1 << (n - 1).bit_length()


def _in_one_piece(x: Tensor) -> Tensor:
    """`x`, whose channels lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("chunkwise::short_convolution", mutates_args=())
def short_convolution(
    x: Tensor, weight: Tensor, spans: Tensor, widest: int, position: Tensor | None, activate: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """A causal depthwise convolution over time, silu, and spans of channels of length 1.

    Args:
        x: `[B, T, channels]`.
        weight: `[size, channels]`; the tap `weight[n]` is of the token n before.
        spans: int32 `[spans, 3]`: first channel, channels, and whether they are scaled to length 1.
            Every channel is in one span.
        widest: channels of the widest span.
        position: int `[T]`, the position of each token in its packed sequence, if packed.
        activate: apply silu after the convolution, and scale the spans; otherwise neither.
        eps: added to sums of squares.

    Returns:
        `[B, T, channels]`, contiguous, in x's dtype.
    """
    x = _in_one_piece(x)
    B, T, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    _kernels().convolve[(-(-T // _TOKENS), spans.shape[0], B)](
        *(x, weight, spans, position, y, T, x.stride(0), x.stride(1), channels, eps),
        SIZE=weight.shape[0], ACTIVATE=activate, PACKED=position is not None, BT=_TOKENS,
        BC=_above(widest),
    )  # fmt: skip
    return y


@short_convolution.register_fake
def _(x: Tensor, weight: Tensor, spans: Tensor, widest: int, position: Tensor | None,
      activate: bool, eps: float) -> Tensor:  # fmt: skip
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("chunkwise::short_convolution_backward", mutates_args=())
def short_convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, spans: Tensor, widest: int, position: Tensor | None,
    activate: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of `x`, contiguous, and of `weight`, given `dy` of the output."""
    x = _in_one_piece(x)
    B, T, channels = x.shape
    size = weight.shape[0]
    dy = dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = torch.empty_like(dx) if activate else dy
    programs = -(-T // (_TOKENS * _TILES))
    sums = torch.empty(B * programs, size, channels, dtype=torch.float32, device=x.device)
    if dx.numel():
        of, tokens = _kernels(), {"SIZE": size, "PACKED": position is not None, "BT": _TOKENS}
        of.activation_backward[(programs, spans.shape[0], B)](
            *(x, weight, spans, position, dy, dz, sums, T, x.stride(0), x.stride(1), channels, eps),
            **tokens, ACTIVATE=activate, TILES=_TILES, TAPS=_above(size), BC=_above(widest),
        )  # fmt: skip
        of.convolve_transposed[(-(-T // _TOKENS), -(-channels // _CHANNELS), B)](
            dz, weight, position, dx, T, channels, **tokens, BC=_CHANNELS
        )
    return dx, sums.sum(0).to(weight.dtype)


@short_convolution_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, spans: Tensor, widest: int, position: Tensor | None,
      activate: bool, eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, spans, ctx.widest, position, ctx.activate, ctx.eps = inputs
    ctx.save_for_backward(x, weight, spans, position)


def _convolution_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, spans, position = ctx.saved_tensors
    dx, dw = short_convolution_backward(
        dy, x, weight, spans, ctx.widest, position, ctx.activate, ctx.eps
    )
    return dx, dw, None, None, None, None, None


short_convolution.register_autograd(_convolution_backward, setup_context=_keep_convolution)


def _rows(BD: int) -> int:
    """Rows of a tile: of heads more at once than of whole tokens, as measured on an H100."""
    return 4096 // BD if BD <= 256 else max(1, 2048 // BD)


def _warps(BD: int) -> int:
    """Of a program that normalises rows of at most BD entries."""
    return max(4, min(16, BD // 256))


@torch.library.custom_op("chunkwise::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight * silu(gate)` over the last axis.

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        gate: of x's shape; None for none.
        eps: added to the mean of squares.

    Returns:
        Of x's shape and dtype, contiguous.
    """
    x, size = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if not y.numel():
        return y
    rows, BD = x.numel() // size, _above(size)
    BM = _rows(BD)
    gate = None if gate is None else gate.contiguous()
    _kernels().normalise[(-(-rows // BM),)](
        *(x, weight, gate, y, rows, size, eps),
        GATED=gate is not None, BM=BM, BD=BD, num_warps=_warps(BD),
    )  # fmt: skip
    return y


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("chunkwise::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight` and `gate` (empty where there is none)."""
    x, dy, size = x.contiguous(), dy.contiguous(), x.shape[-1]
    gate = None if gate is None else gate.contiguous()
    dx, dgate = torch.empty_like(x), torch.empty_like(x if gate is not None else x[:0])
    rows, BD = x.numel() // size, _above(size)
    BM = _rows(BD)
    programs = min(_PROGRAMS, -(-rows // BM))
    sums = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    if programs:
        _kernels().normalise_backward[(programs,)](
            *(x, weight, gate, dy, dx, sums, dgate, rows, size, eps),
            GATED=gate is not None, BM=BM, BD=BD, num_warps=_warps(BD),
        )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype), dgate


@rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float
      ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(weight), torch.empty_like(dx if gate is not None else dx[:0])


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, gate, ctx.eps = inputs
    ctx.save_for_backward(x, weight, gate)


def _norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    dx, dw, dgate = rms_norm_backward(dy, x, weight, gate, ctx.eps)
    return dx, dw, None if gate is None else dgate, None


rms_norm.register_autograd(_norm_backward, setup_context=_keep_norm)


@torch.library.custom_op("chunkwise::cross_entropy", mutates_args=("logits",))
def cross_entropy(logits: Tensor, labels: Tensor, ignored: int, share: Tensor | None) -> Tensor:
    """The cross entropy of every row; with a share, logits become the gradients of share * sum.

    Args:
        logits: `[rows, vocabulary]`, contiguous.
        labels: int64 `[rows]`.
        ignored: the label of rows without a loss.
        share: float32 `[]`.

    Returns:
        `[rows]`, float32; 0 where there is no loss.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        BV = min(_above(vocabulary), _ENTRIES)
        _kernels().cross_entropy[(rows,)](
            *(logits, labels, losses, share, vocabulary),
            IGNORED=ignored, GRADIENT=share is not None, BV=BV, num_warps=_warps(BV),
        )  # fmt: skip
    return losses


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, ignored: int, share: Tensor | None) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
