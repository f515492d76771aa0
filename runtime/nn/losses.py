"""The cross entropy of a linear head, a run of tokens at a time: not all logits exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import fused

IGNORED = -100  # torch's own mark of a target without a loss
_LOGITS = 2**26  # of one run of tokens: 256 MiB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy of `hidden @ weight.T`.

    Logits are computed in runs of tokens and become their own gradient at once, as in liger-kernel
    (Hsu et al. 2024); their exponentials are summed in float32. Under autocast, `hidden` and
    `weight` are cast as a linear layer would.

    Args:
        hidden: `[..., hidden]`.
        weight: `[vocabulary, hidden]`.
        targets: int64 `[...]`, -100 where there is no loss.

    Returns:
        A scalar `[]`, in float32 (float64 for float64).
    """
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    mean: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        _cast(rows), weight, labels, torch.is_grad_enabled()
    )
    return mean


def linear_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of every token, without gradients.

    Args:
        hidden: `[..., hidden]`.
        weight: `[vocabulary, hidden]`.
        targets: int64 `[...]`, -100 where there is no loss.

    Returns:
        `[...]`, in float32 (float64 for float64); 0 where there is no loss.
    """
    with torch.no_grad():
        rows, found = _cast(hidden.reshape(-1, hidden.shape[-1])), []
        narrow = weight.to(rows.dtype)
        for part, label in _runs(rows, targets.reshape(-1), weight.shape[0]):
            found.append(_losses(part @ narrow.T, label, None)[0])
        return torch.cat(found).reshape(targets.shape)


def _cast(rows: Tensor) -> Tensor:
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


def _runs(rows: Tensor, labels: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their labels, so many at once that they have `_LOGITS` logits."""
    size = max(1, _LOGITS // vocabulary)
    return zip(rows.split(size), labels.split(size), strict=True)


def _losses(logits: Tensor, labels: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """The losses of rows of logits, and the gradients of `share` times their sum.

    The gradients, made where there is a share, are in the logits' dtype and may lie in their place.
    """
    if fused.serves(logits):
        return fused.cross_entropy(logits, labels, IGNORED, share), logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != IGNORED
    at = labels.where(counted, 0)[:, None]
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    losses = -log_p.gather(1, at)[:, 0].where(counted, 0.0)
    if share is None:
        return losses, logits
    d = log_p.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=wide))
    return losses, d.mul_((share * counted)[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made beside the losses, since logits are not kept for a backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, recorded: bool) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        narrow = weight.to(rows.dtype)
        total = torch.zeros((), dtype=wide, device=rows.device)
        share = 1.0 / (labels != IGNORED).sum().clamp(min=1).to(wide)
        recorded = recorded and any(ctx.needs_input_grad)  # which is so without gradients, too
        shape = weight.shape if recorded else (0,)
        d_weight = torch.zeros(shape, dtype=wide, device=weight.device)
        d_rows = []
        for part, label in _runs(rows, labels, weight.shape[0]):
            losses, d_logits = _losses(part @ narrow.T, label, share if recorded else None)
            total = total + losses.sum()
            if recorded:
                d_rows.append(d_logits @ narrow)
                d_weight += d_logits.T @ part
        if d_rows:
            ctx.save_for_backward(torch.cat(d_rows), d_weight)
            ctx.dtype = weight.dtype
        return total * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_rows, d_weight = ctx.saved_tensors
        return (d_rows * d).to(d_rows.dtype), (d_weight * d).to(ctx.dtype), None, None
