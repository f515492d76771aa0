"""A hub repository as Hugging Face's `kernels` loads it, and as transformers calls its layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
import torch.nn.functional as F
from chunkwise.codegen.config import Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.runtime.export.package import Layout, Request, export, write
from torch import Tensor, nn

kernels = pytest.importorskip("kernels")
NAME = "chunk_gated_delta_rule"


class Rule(nn.Module):
    """A layer of the arguments that transformers' function of that name has."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the kernel's forward comes instead")


def test_the_loader_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rule = cw.library.gated_delta_rule
    dims, dtypes = (Dims(16, 16), Dims(8, 16)), (Dtype.FLOAT32, Dtype.BFLOAT16)
    request = Request("gated_delta_rule", dims, dtypes, layout=Layout.HUB)
    write(tmp_path, export(rule.declaration, request))
    folder = tmp_path / "build" / "torch-cuda"
    assert len(list(folder.glob("kernels_*_segments.py"))) == 4
    found = kernels.use_kernel_forward_from_hub(NAME)(Rule)
    where = kernels.LocalLayerRepository(repo_path=tmp_path, layer_name=NAME)
    with kernels.use_kernel_mapping({NAME: {"cpu": where}}):
        layer = kernels.kernelize(found(), mode=kernels.Mode.TRAINING, device="cpu")
    B, T, H, HV = 2, 5, 2, 4
    q, k, v = torch.randn(B, T, H, 8), torch.randn(B, T, H, 8), torch.randn(B, T, HV, 16)
    g, beta, first = -torch.rand(B, T, HV), torch.rand(B, T, HV), torch.randn(B, HV, 8, 16)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta, first)]
    given = {"g": g, "beta": beta, "initial_state": first, "output_final_state": True}
    given |= {"use_qk_l2norm_in_kernel": True}
    made = layer(q, k, v, **given, position_ids=None)
    want = cw.fla.chunk_gated_delta_rule(q, k, v, **given)
    for x, y in zip(made, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    (dx, dy) = (torch.autograd.grad(m[0].square().sum() + m[1].sum(), leaves) for m in (made, want))
    torch.testing.assert_close(dx, dy, atol=1e-4, rtol=1e-4)
    o, none = layer(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta, scale=1.0)
    assert none is None
    torch.testing.assert_close(
        o,
        cw.library.gated_delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)[0],
        atol=1e-5,
        rtol=1e-4,
    )
