"""Fused parts of layers against the same parts in torch; kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import chunkwise as cw
import pytest
import torch
from chunkwise.runtime.nn import fused, losses
from chunkwise.runtime.nn.layers import RecurrentLayer
from chunkwise.runtime.nn.parts import RMSNorm, ShortConvolution
from torch import Tensor, nn

interpreted = pytest.mark.interpreter
BOUNDARIES = torch.tensor([0, 1, 3, 3, 40, 137], dtype=torch.int32)
TOKENS = 137  # more than one program walks, and no multiple of a tile


def _gradients(module: nn.Module, run: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    y = run()
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    wanted = [*inputs, *module.parameters()]
    return [y, *torch.autograd.grad((y * weights).sum(), wanted)]


def _agree(module: nn.Module, run: Callable[[], Tensor], *inputs: Tensor) -> None:
    """The module's outputs and gradients by kernels are those by torch, in float32."""
    want = _gradients(module, run, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "serves", lambda x: True)
        got = _gradients(module, run, *inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))


@interpreted
@pytest.mark.parametrize(("size", "packed"), [(3, False), (4, True)])
def test_convolution(size: int, packed: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(150, size)
    whole = torch.randn(1 if packed else 2, TOKENS, 160)
    x = whole[..., 5:155].requires_grad_()  # channels of a larger projection
    bounds = BOUNDARIES if packed else None
    _agree(conv, lambda: conv(x, bounds), x)
    turned = torch.randn(1, 150, 9).mT.requires_grad_()  # channels lie apart
    _agree(conv, lambda: conv(turned), turned)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [24, 300])
def test_norm(size: int, gated: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(size)
    nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 2, 70, 3, size, requires_grad=True)
    _agree(norm, lambda: norm(x, gate if gated else None), *([x, gate] if gated else [x]))


@interpreted
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs of five rows, whose logits come in two parts."""
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "_LOGITS", 5 * 90)
    monkeypatch.setattr(fused, "_ENTRIES", 64)
    head = nn.Linear(16, 90, bias=False)
    x = (4 * torch.randn(13, 16)).requires_grad_()
    targets = torch.randint(90, (13,)).index_fill(0, torch.tensor([3, 11]), losses.IGNORED)
    _agree(head, lambda: losses.linear_cross_entropy(x, head.weight, targets), x)
    want = losses.linear_token_losses(x, head.weight, targets)
    monkeypatch.setattr(fused, "serves", lambda x: True)
    got = losses.linear_token_losses(x, head.weight, targets)
    torch.testing.assert_close(got, want)


@interpreted
@pytest.mark.parametrize(
    ("name", "micro_steps", "packed"), [("gated_delta_rule", 1, True), ("delta_product", 2, False)]
)
def test_layer(name: str, micro_steps: int, packed: bool) -> None:
    """Convolution, silu and unit length of some features are one kernel; all gradients."""
    torch.manual_seed(0)
    layer = RecurrentLayer(
        getattr(cw.library, name), 24, 2, 8, 12, gated=True, micro_steps=micro_steps, engine="eager"
    )
    x = torch.randn(1, TOKENS, 24, requires_grad=True)
    bounds = BOUNDARIES if packed else None
    _agree(layer, lambda: layer(x, bounds), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_on_a_gpu(packed: bool, dtype: torch.dtype) -> None:
    """Gradients of the input and of all parameters, against the same layer in torch."""
    torch.manual_seed(0)
    layer = RecurrentLayer(cw.library.gated_delta_rule, 256, 2, 64, 128, gated=True, engine="eager")
    x = torch.randn(1, TOKENS, 256, device="cuda", requires_grad=True)
    bounds = BOUNDARIES.cuda() if packed else None
    layer = layer.cuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "serves", lambda x: False)
        want = _gradients(layer, lambda: layer(x, bounds), x)
    with torch.no_grad():
        layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    got = _gradients(layer, lambda: layer(x, bounds), x)
    limit = 1e-4 if dtype is torch.float32 else 3e-2
    for a, b in zip(got, want, strict=True):
        error = (a.detach().float() - b).norm() / b.norm()
        assert float(error.detach()) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [8192, 32003])
def test_cross_entropy_on_a_gpu(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients in bfloat16, against torch's of the same numbers in float32."""
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "_LOGITS", 1000 * vocabulary)
    hidden = torch.randn(2049, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, 128, device="cuda") / 8).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (2049,), device="cuda")
    targets[::7] = losses.IGNORED
    mean = losses.linear_cross_entropy(hidden, weight, targets)
    want = nn.functional.cross_entropy(hidden.float() @ weight.float().T, targets)
    torch.testing.assert_close(mean, want, rtol=1e-3, atol=1e-3)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (mean, want))
    for a, b in zip(*gradients, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1.5e-2


@interpreted
def test_nothing_to_do() -> None:
    empty = torch.empty(2, 0, 7, requires_grad=True)
    y = fused.rms_norm(empty, torch.ones(7), None, 1e-6)
    assert y.shape == empty.shape
    torch.autograd.grad(y.sum(), empty)
    conv = ShortConvolution(7)
    y = fused.short_convolution(empty, conv.weight, conv.spans, conv.widest, None, True, 1e-6)
    torch.autograd.grad(y.sum(), [empty, conv.weight])


def test_double_precision_stays_in_torch() -> None:
    def on_cuda(dtype: torch.dtype) -> bool:
        return fused.serves(SimpleNamespace(is_cuda=True, dtype=dtype))  # type: ignore[arg-type]

    assert on_cuda(torch.bfloat16)
    assert not on_cuda(torch.float64)
    assert not fused.serves(torch.ones(1))
