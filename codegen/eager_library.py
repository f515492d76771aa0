"""The tile ops that torch has no single function for; printed eager kernels call these.

The vector-gated pair halves blocks: at each level, rows in the later half of a block meet columns
in its earlier half, both decayed to the last row of the earlier half. Every exponent is then <= 0
whatever the gate, and each level is one batched product (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(1 + L)^-1 for strictly lower L, [..., C, C]."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        eye + lower, eye.expand_as(lower), upper=False, unitriangular=True
    )
    return inverse


def prefix_sum(x: Tensor, dim: int, *, exclusive: bool) -> Tensor:
    """Sum over what comes before a token (and the token itself, unless exclusive)."""
    if exclusive:  # shifted, not `cumsum - x`, which cancels
        x = torch.cat(
            [torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim
        )
    return x.cumsum(dim)


def suffix_sum(x: Tensor, dim: int, *, exclusive: bool) -> Tensor:
    """Sum over what comes after a token (and the token itself, unless exclusive)."""
    return prefix_sum(x.flip(dim), dim, exclusive=exclusive).flip(dim)


def _levels(p: Tensor, q: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(half, e^(P_late - a), e^(a - Q_early)) of each level; both [..., blocks, half, K]."""
    half = 1
    while half < p.shape[-2]:
        early, late = _halves(q, half)[0], _halves(p, half)[1]
        anchor = early[..., -1:, :]
        yield half, torch.exp(late - anchor), torch.exp(anchor - early)
        half *= 2


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    blocks = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _below_diagonal(a: Tensor, half: int) -> Tensor:
    """A view of the blocks where late rows meet early columns: [..., half, half, blocks]."""
    size = a.shape[-1] // (2 * half)
    blocks = a.view(*a.shape[:-2], size, 2, half, size, 2, half)
    return torch.diagonal(blocks, dim1=-6, dim2=-3)[..., 1, :, 0, :, :]


def decayed_dot(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """A_ij = sum_k x_ik y_jk e^(P_ik - Q_jk) for i > j, else 0: [..., C, C]."""
    c = x.shape[-2]
    shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a = x.new_zeros(*shape, c, c)
    for half, e_late, e_early in _levels(p, q):
        block = (_halves(x, half)[1] * e_late) @ (_halves(y, half)[0] * e_early).mT
        _below_diagonal(a, half).copy_(block.movedim(-3, -1))
    return a


def decayed_apply(a: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """z_ik = sum_{j<i} A_ij y_jk e^(P_ik - Q_jk): [..., C, K]."""
    z = torch.zeros_like(p * y)
    for half, e_late, e_early in _levels(p, q):
        block = _below_diagonal(a, half).movedim(-1, -3)
        _halves_view(z, half)[..., 1, :, :] += e_late * (block @ (_halves(y, half)[0] * e_early))
    return z


def decayed_apply_transposed(a: Tensor, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """z_jk = sum_{i>j} A_ij x_ik e^(P_ik - Q_jk): [..., C, K]."""
    z = torch.zeros_like(p * x)
    for half, e_late, e_early in _levels(p, q):
        block = _below_diagonal(a, half).movedim(-1, -3)
        update = e_early * (block.mT @ (_halves(x, half)[1] * e_late))
        _halves_view(z, half)[..., 0, :, :] += update
    return z


def _halves_view(z: Tensor, half: int) -> Tensor:
    return z.view(*z.shape[:-2], -1, 2, half, z.shape[-1])
