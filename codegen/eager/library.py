"""The tile ops that torch has no single function for; printed eager kernels call these.

Decays between two tokens sum the log-decays between them, never differences of prefix sums: one
reset of -100 would leave its rounding in all differences after it (decision 38). Ops under
a vector gate halve blocks: at each level, rows in the later half of a block meet columns in its
earlier half, both decayed to the last row of the earlier half. Every exponent is then <= 0 for any
gate, and each level is one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "decay",
    "decayed_apply",
    "decayed_apply_transposed",
    "decayed_crossing",
    "decayed_dot",
    "flush",
    "prefix_sum",
    "substitute",
    "suffix_sum",
    "unit_lower_inverse",
]


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(1 + L)^-1 for strictly lower L, [..., C, C]."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        eye + lower, eye.expand_as(lower), upper=False, unitriangular=True
    )
    return inverse


def substitute(lower: Tensor, b: Tensor, x: Tensor, *, transposed: bool) -> Tensor:
    """U = x - b (L U) for strictly lower L [..., C, C], entry by entry scaled by b [..., C, V].

    `transposed`: U = x - L^T (b U). Each column of U is a system of its own.
    """
    shape = torch.broadcast_shapes(lower.shape[:-2], b.shape[:-2], x.shape[:-2])
    b = b.expand(*shape, *b.shape[-2:])
    u = x.expand(*shape, *x.shape[-2:]).clone()
    rows = range(u.shape[-2])
    for n in reversed(rows) if transposed else rows:
        before, row = u[..., :n, :], lower[..., n : n + 1, :n]
        if transposed:
            before -= row.mT @ (b[..., n : n + 1, :] * u[..., n : n + 1, :])
        else:
            u[..., n : n + 1, :] -= b[..., n : n + 1, :] * (row @ before)
    return u


def prefix_sum(x: Tensor, dim: int, *, exclusive: bool) -> Tensor:
    """Sum over the tokens before each one (and the token itself, unless exclusive)."""
    if exclusive:  # shifted, not `cumsum - x`, which cancels
        x = torch.cat(
            [torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim
        )
    return x.cumsum(dim)


def suffix_sum(x: Tensor, dim: int, *, exclusive: bool) -> Tensor:
    """Sum over the tokens after each one (and the token itself, unless exclusive)."""
    return prefix_sum(x.flip(dim), dim, exclusive=exclusive).flip(dim)


def decay(g: Tensor, *, exclusive: bool) -> Tensor:
    """e^(g_j+1 + ... + g_i) for i >= j, else 0: [..., C] to [..., C, C].

    `exclusive`: up to g_i-1, for i > j.
    """
    c = g.shape[-1]
    own = torch.ones(c, c, dtype=torch.bool, device=g.device).tril(-1)
    since = torch.where(own, g[..., :, None], 0.0)  # row t, column j: g_t where t > j
    sums = prefix_sum(since, -2, exclusive=exclusive)
    return torch.exp(sums.masked_fill(~(own if exclusive else own.mT.logical_not()), -torch.inf))


def flush(x: Tensor, least: float) -> Tensor:
    """`x`, but 0 where it is smaller than `least`; NaN stays."""
    return x.masked_fill(x < least, 0.0)


def _levels(g: Tensor, exclusive: bool, least: float = 0.0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(half, decays to late rows, decays from early ones), both [..., blocks, half, K].

    Both refer to the last row of the earlier half, a: the decay from it to a late row (itself left
    out if `exclusive`), and the decay from an early row to it.
    """
    half = 1
    while half < g.shape[-2]:
        early, late = _halves(g, half)
        since = prefix_sum(late, -2, exclusive=exclusive)
        after = suffix_sum(early, -2, exclusive=True)
        yield half, flush(torch.exp(since), least), flush(torch.exp(after), least)
        half *= 2


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    blocks = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _below_diagonal(a: Tensor, half: int) -> Tensor:
    """A view of the blocks where late rows meet early columns: [..., half, half, blocks]."""
    size = a.shape[-1] // (2 * half)
    blocks = a.view(*a.shape[:-2], size, 2, half, size, 2, half)
    return torch.diagonal(blocks, dim1=-6, dim2=-3)[..., 1, :, 0, :, :]


def decayed_dot(
    x: Tensor, y: Tensor, p: Tensor, q: Tensor, g: Tensor, *, exclusive: bool, least: float
) -> Tensor:
    """A_ij = sum_k x_ik y_jk e^(P_ik - Q_jk) for i > j, else 0: [..., C, C]."""
    del p, q  # sums of g
    c = x.shape[-2]
    shape = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a = x.new_zeros(*shape, c, c)
    for half, e_late, e_early in _levels(g, exclusive, least):
        block = (_halves(x, half)[1] * e_late) @ (_halves(y, half)[0] * e_early).mT
        _below_diagonal(a, half).copy_(block.movedim(-3, -1))
    return a


def decayed_apply(
    a: Tensor, y: Tensor, p: Tensor, q: Tensor, g: Tensor, *, exclusive: bool, least: float
) -> Tensor:
    """z_ik = sum_{j<i} A_ij y_jk e^(P_ik - Q_jk): [..., C, K]."""
    del p, q
    z = torch.zeros_like(g * y)
    for half, e_late, e_early in _levels(g, exclusive, least):
        block = _below_diagonal(a, half).movedim(-1, -3)
        _halves_view(z, half)[..., 1, :, :] += e_late * (block @ (_halves(y, half)[0] * e_early))
    return z


def decayed_apply_transposed(
    a: Tensor, x: Tensor, p: Tensor, q: Tensor, g: Tensor, *, exclusive: bool, least: float
) -> Tensor:
    """z_jk = sum_{i>j} A_ij x_ik e^(P_ik - Q_jk): [..., C, K]."""
    del p, q
    z = torch.zeros_like(g * x)
    for half, e_late, e_early in _levels(g, exclusive, least):
        block = _below_diagonal(a, half).movedim(-1, -3)
        update = e_early * (block.mT @ (_halves(x, half)[1] * e_late))
        _halves_view(z, half)[..., 0, :, :] += update
    return z


def decayed_crossing(
    a: Tensor,
    x: Tensor,
    y: Tensor,
    dx: Tensor,
    dy: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    *,
    exclusive: bool,
) -> Tensor:
    """z_tk = sum of A_ij x_ik y_jk e^(P_ik - Q_jk) over i >= t > j (i > t, if exclusive).

    In a pair of halves, a late t is crossed by the entries of later rows with the earlier half, an
    early t by the entries of earlier rows with the later half.
    """
    del dx, dy, p, q  # this engine always sums, where others may take a difference of sums
    z = torch.zeros_like(g * x * y)
    for half, e_late, e_early in _levels(g, exclusive):
        block = _below_diagonal(a, half).movedim(-1, -3)
        late, early = _halves(x, half)[1] * e_late, _halves(y, half)[0] * e_early
        halves = _halves_view(z, half)
        halves[..., 1, :, :] += suffix_sum(late * (block @ early), -2, exclusive=exclusive)
        halves[..., 0, :, :] += prefix_sum(early * (block.mT @ late), -2, exclusive=True)
    return z


def _halves_view(z: Tensor, half: int) -> Tensor:
    return z.view(*z.shape[:-2], -1, 2, half, z.shape[-1])
