"""Operands as the rows that kernels take, and the gradients of rows as those of operands.

A row is one micro-step of a token: the chunk form of n micro-steps is that of one over n times as
many rows (codegen/chunk.py). Row m of a token has entry m of each tuple, so operands lose their
axis of micro-steps here, also where it is of length 1; operands of tokens are repeated for the rows
of each token. The output of a token is what its last row reads.

This file imports torch only, because exported packages carry it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """How the tensor of an operand is laid out in rows.

    Attributes:
        each: rows of a token.
        micro: entries of the operand's tuple; None where it is no tuple.
        per_head: whether the operand has no tokens.
    """

    each: int
    micro: int | None
    per_head: bool

    @property
    def make(self) -> Callable[[Tensor], Tensor] | None:
        """The function from the operand's tensor to rows; None where the tensor has them."""
        n = self.each
        if self.micro is not None:
            return lambda x: _entries(x, n).flatten(1, 2)
        return None if n == 1 or self.per_head else lambda x: x.repeat_interleave(n, dim=1)

    def gradient(
        self, g: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device, HV: int
    ) -> Tensor:
        """The operand's gradient, contiguous; zero where nothing depends on the operand.

        Args:
            g: what kernels wrote: per row and value head `[B,T,HV,…]`, flat or not; of an operand
                per head, partial sums `[chunks,HV,…]`, which are added up in a fixed order.
            shape: of the operand in rows: `[B,T,H,…]` with HV a multiple of H, or `[HV,…]`.
            dtype, device: of the operand.
            HV: value heads.
        """
        if g is None:
            own = torch.zeros(shape, dtype=dtype, device=device)
        elif self.each == 1 and self.micro is None and not self.per_head and shape[2] == HV:
            # of the same shape and dtype, both calls of torch would take 2 µs
            g = g if g.shape == shape else g.view(shape)
            return g if g.dtype is dtype else g.to(dtype)
        elif self.per_head:
            own = g.sum(0).to(dtype)
        else:
            heads = shape[2]
            if heads != HV:
                g = g.reshape(*shape[:2], heads, HV // heads, *shape[3:]).sum(3)
            own = g.view(shape).to(dtype)
        if self.micro is not None:
            own = _entries(own.unflatten(1, (-1, self.each)), self.micro)
        elif self.each > 1 and not self.per_head:
            own = own.unflatten(1, (-1, self.each)).sum(2)
        return own.contiguous()


def _entries(x: Tensor, n: int) -> Tensor:
    """`x [B,T,m,...]` as `[B,T,n,...]`: no row reads the entries cut off, or the zeros added."""
    padding = (*(0, 0) * (x.ndim - 3), 0, n - x.shape[2])
    return x if x.shape[2] == n else torch.nn.functional.pad(x, padding)


def last_rows(o: Tensor, n: int) -> Tensor:
    """The output of tokens from that of their rows, n of each: `[B,T*n,...]` to `[B,T,...]`."""
    return o if n == 1 else o[:, n - 1 :: n].contiguous()


def in_last_rows(do: Tensor, n: int) -> Tensor:
    """The gradient of the rows' output: that of a token in its last row, zero in the others."""
    if n == 1:
        return do
    B, T, *channels = do.shape
    rows = torch.zeros((B, T * n, *channels), dtype=do.dtype, device=do.device)
    rows[:, n - 1 :: n] = do
    return rows


def as_kernels_read(x: Tensor, *, per_head: bool) -> bool:
    """Whether kernels read `x` where it lies: channels without gaps, those per head without any."""
    return x.is_contiguous() if per_head else x.ndim <= 3 or x.stride(-1) == 1
