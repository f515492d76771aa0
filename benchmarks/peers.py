"""Calls the peers' kernels with our operands and no implicit scale; a first call imports fla."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor


def _fla(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    call = _fla("linear_attn", "chunk_linear_attn")
    o: Tensor = call(q, k, v, scale=1.0, normalize=False, cu_seqlens=cu_seqlens)[0]
    return o


def retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The peer computes its own decay; the harness draws the same one as `g`."""
    o: Tensor = _fla("retention", "chunk_retention")(q, k, v, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    call = _fla("simple_gla", "chunk_simple_gla")
    o: Tensor = call(q, k, v, g=g, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    call = _fla("delta_rule", "chunk_delta_rule")
    o: Tensor = call(q, k, v, beta, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    call = _fla("gated_delta_rule", "chunk_gated_delta_rule")
    o: Tensor = call(q, k, v, g, beta, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    o: Tensor = _fla("gla", "chunk_gla")(q, k, v, g, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    call = _fla("kda", "chunk_kda")
    o: Tensor = call(q, k, v, g, beta, scale=1.0, cu_seqlens=cu_seqlens)[0]
    return o


def lift_refusal() -> bool:
    """Make fla run the gated backward that it refuses here; returns whether it was refused.

    The backward's time is valid although its result may be wrong; the harness checks the result
    like any other and marks it.
    """
    module: Any = importlib.import_module("fla.ops.common.chunk_o")
    refused = bool(
        module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    )
    if refused:
        module.TRITON_ABOVE_3_7_1 = True
    return refused
