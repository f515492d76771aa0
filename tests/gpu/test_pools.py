"""Steps on pools on a GPU: captured in a graph, without waiting, and safe from bad indices."""

from __future__ import annotations

import chunkwise as cw
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytestmark = pytest.mark.gpu

B, H, K, V, SLOTS = 5, 4, 128, 128, 12


def _token() -> list[Tensor]:
    x = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = torch.randn(B, H, K, **x), normalize(torch.randn(B, H, K, **x), dim=-1)
    v = torch.randn(B, H, V, **x)
    return [q, k, v, -torch.rand(B, H, device="cuda"), torch.rand(B, H, device="cuda")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_graph_captures_steps_in_a_pool(dtype: torch.dtype) -> None:
    """What indices and operands hold may change between replays; nothing waits for the device."""
    op, token = cw.library.gated_delta_rule, _token()
    pool = torch.randn(SLOTS, H, K, V, device="cuda").to(dtype)
    indices = torch.arange(B, device="cuda", dtype=torch.int32)
    op.warmup({"HV": H, "K": K, "V": V, "B": B}, torch.bfloat16, "cuda", state_dtypes=dtype)
    op.step(*token, state=pool.clone(), state_indices=indices)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            o, _ = op.step(*token, state=pool, state_indices=indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for slots in ([3, 1, 2, 0, 4], [11, 5, -1, 7, SLOTS]):
        for x, new in zip(token, _token(), strict=True):
            x.copy_(new)
        indices.copy_(torch.tensor(slots))
        there = [n for n, s in enumerate(slots) if 0 <= s < SLOTS]
        own = [slots[n] for n in there]
        before = pool.clone()
        want, states = op.step(*(x[there] for x in token), state=pool[own].float())
        graph.replay()
        torch.testing.assert_close(o[there], want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(pool[own].float(), states, rtol=2e-2, atol=2e-2)
        others = [s for s in range(SLOTS) if s not in own]
        assert torch.equal(pool[others], before[others])


@torch.no_grad()
def test_pools_with_values_first() -> None:
    """A pool `[slots,HV,V,K]` is passed transposed, and gives what a pool of K rows gives."""
    op, token = cw.library.gated_delta_rule, _token()
    pool = torch.randn(SLOTS, H, K, V, device="cuda")
    first = pool.mT.contiguous()
    indices = torch.arange(B, device="cuda")
    want, _ = op.step(*token, state=pool, state_indices=indices)
    o, _ = op.step(*token, state=first.mT, state_indices=indices)
    torch.testing.assert_close(o, want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(first.mT, pool, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bad_indices_are_named_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKWISE_CHECK", "1")
    pool = torch.zeros(SLOTS, H, K, V, device="cuda")
    with pytest.raises(cw.errors.BadSlots, match=r"12 at \[1\], expected a slot, 0 to 11"):
        cw.library.gated_delta_rule.step(
            *_token(), state=pool, state_indices=torch.tensor([0, 12, 1, 2, 3], device="cuda")
        )
