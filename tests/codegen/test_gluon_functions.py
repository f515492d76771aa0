"""Device functions of printed Gluon, emulated, against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.codegen import gluon_emulator


@pytest.mark.parametrize("gates", ["mild", "strong", "resets", "one row"])
def test_decays_of_any_strength(gates: str) -> None:
    """Scores and what is applied by them, against the definition: blocks of 8 rows, of 16."""
    C, K, FIRST = 16, 4, 3
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, C, K, generator=draw)
    g = {"mild": 1.0, "strong": 50.0, "resets": 8.0, "one row": 1.0}[gates]
    g = -g * torch.rand(C, K, generator=draw)
    if gates == "resets":
        g[5] = g[11] = -110.0
    if gates == "one row":
        g[6, 1] = -125.0
    i, j = torch.arange(C)[:, None], torch.arange(C)[None, :]
    room, ones, within = (gluon_emulator.shared(n, C, m) for n, m in ((3, K), (2, C), (1, C)))
    within.index(0).store(((i > j) & (i >> FIRST == j >> FIRST)).float())
    shared = [gluon_emulator.shared(C, K) for _ in range(3)]
    for held, value in zip(shared, (x, y, g), strict=True):
        held.store(value)
    found = gluon_emulator.called("decayed_dot", "decayed_apply")
    beside = (within.index(0), ones.index(0), room, C, K, FIRST, None, None)
    A = found["decayed_dot"](*shared, *beside)
    sums = g.double().cumsum(0)
    between = torch.where(i[:, :, None] > j[:, :, None], sums[:, None] - sums[None], -torch.inf)
    want = torch.einsum("ik,jk,ijk->ij", x.double(), y.double(), between.exp())
    torch.testing.assert_close(A.double(), want, rtol=1e-4, atol=1e-6)
    beside = (within.index(0), ones, room, C, K, FIRST, None, None)
    for transposed, axes in ((False, "ij,jk,ijk->ik"), (True, "ij,ik,ijk->jk")):
        got = found["decayed_apply"](want.float(), shared[0], shared[2], *beside, transposed)
        applied = torch.einsum(axes, want, x.double(), between.exp())
        torch.testing.assert_close(got.double(), applied, rtol=1e-4, atol=1e-6)
