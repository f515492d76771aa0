"""What only a GPU can show: no synchronisation, CUDA graphs, streams, packing from the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chunkwise as cw
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def inputs(kit: Any) -> Any:
    """bf16 operands of a packed gated delta rule on the GPU."""
    sizes = kit.Sizes(H=2, HV=4, K=64, V=64, initial=True, dtype=torch.bfloat16, device="cuda")
    return kit.make_inputs(cw.library.gated_delta_rule, sizes.packed(70, 0, 130, 1))


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(mode)


def _train(inputs: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    o, state = cw.library.gated_delta_rule(
        **inputs.operands, **{**inputs.options, **options}, output_final_state=True
    )
    leaves = list(inputs.leaves.values())
    grads = torch.autograd.grad((o, state), leaves, (torch.ones_like(o), torch.ones_like(state)))
    return (o, state, *grads)


@pytest.mark.usefixtures("sync_is_an_error")
def test_no_host_synchronisation(inputs: Any) -> None:
    _train(inputs)  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    _train(inputs)


def test_cuda_graph(inputs: Any) -> None:
    """Forward and backward are captured; a replay sees new data and new boundaries."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _train(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _train(inputs)
    with torch.no_grad():
        inputs.operands["v"].mul_(-0.5)
        inputs.cu_seqlens.copy_(torch.tensor([0, 100, 101, 101, 201]))
    graph.replay()
    want = _train(inputs)
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a, b)


def test_boundaries_from_the_host(inputs: Any) -> None:
    """cu_seqlens on the CPU is checked there and moved: the same result."""
    want = _train(inputs)
    got = _train(inputs, cu_seqlens=inputs.cu_seqlens.cpu())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    wrong = inputs.cu_seqlens.cpu() + 1
    with pytest.raises(cw.errors.BadCuSeqlens, match=r"1 at \[0\]"):
        _train(inputs, cu_seqlens=wrong)


def test_autocast_on_the_gpu(inputs: Any) -> None:
    want = _train(inputs)
    with torch.autocast("cuda", dtype=torch.float16):
        got = _train(inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_another_stream(inputs: Any) -> None:
    """Kernels, the reference engine's among them, run on the stream of the caller."""
    for engine in ("triton", "reference"):
        want = _train(inputs, engine=engine)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            got = _train(inputs, engine=engine)
        side.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_inductor(inputs: Any) -> None:
    """fullgraph, with other operations fused around the op."""

    def model(v: torch.Tensor) -> torch.Tensor:
        x = {**inputs.operands, "v": torch.nn.functional.silu(v)}
        o, _ = cw.library.gated_delta_rule(**x, **inputs.options)
        return (o * 2.0).sum()

    v = inputs.operands["v"]
    compiled = torch.compile(model, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(v), v)
    (want,) = torch.autograd.grad(model(v), v)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
