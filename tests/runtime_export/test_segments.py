"""An exported package scans long sequences of few heads in segments, as the op does."""

from __future__ import annotations

import importlib
from pathlib import Path

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Dims
from chunkwise.codegen.interface import Dtype
from chunkwise.runtime.export.package import Request, export, write

from tests.interpreted import small


@pytest.mark.interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_segments(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, name = cw.library.gated_delta_rule, f"in_segments_{packed}"
    config = small(rule.declaration.normal_form())
    request = Request("gated_delta_rule", (Dims(8, 6),), (Dtype.FLOAT32,), name, config=config)
    write(tmp_path / name, export(rule.declaration, request))
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(name)
    size = importlib.import_module(f"{name}.segment_size")
    support = importlib.import_module(f"{name}.support")
    plan, seen = support.plan_launches, []
    monkeypatch.setattr(
        support, "plan_launches", lambda k, layout: seen.append(layout.segment) or plan(k, layout)
    )
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 70, 1, 8), "k": (1, 70, 1, 8), "v": (1, 70, 2, 6), "g": (1, 70, 2)}
    x = {n: 0.3 * torch.randn(s, generator=random) for n, s in shapes.items()}
    x |= {"g": -x["g"].abs(), "beta": x["g"].sigmoid()}
    bounds = torch.tensor([0, 67, 70]) if packed else None
    first = torch.randn(2 if packed else 1, 2, 8, 6, generator=random)
    results = []
    for tokens in (1 << 20, 7):  # at least, of a segment
        monkeypatch.setattr(size, "_TOKENS", tokens)
        given = {n: y.clone().requires_grad_() for n, y in {**x, "initial_state": first}.items()}
        o, end = getattr(package, name)(**given, cu_seqlens=bounds, output_final_state=True)
        grads = torch.autograd.grad(o.square().sum() + end.sum(), list(given.values()))
        results.append((o, end, *grads))
    assert seen == [0, 0, 1, 1]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
