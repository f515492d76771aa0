"""flash-linear-attention's names for the rules that only decay and add: nothing is erased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dsl import errors
from . import rules
from .adapter import Result, no_extras, no_reverse, refuse, run, v_first

NormalisedState = tuple[Tensor | None, Tensor]


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | NormalisedState | None]:
    """Linear attention; with `normalize`, the state is (S, z), z `[N,1,H,K]` the sum of keys."""
    if not normalize:
        if isinstance(initial_state, tuple):
            raise errors.BadBatch("initial_state", 2, "one tensor where normalize=False")
        return run(
            rules.linear(),
            q,
            k,
            v,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    o, final = rules.linear_normalised()(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=(S, None if z is None else z.squeeze(1)),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    assert isinstance(final, tuple)
    return o, (final[0] if output_final_state else None, final[1].unsqueeze(1))


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | NormalisedState | None]:
    """As `chunk_linear_attn`, not normalised by default."""
    no_reverse("fused_recurrent_linear_attn", reverse)
    return chunk_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens
    )


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Retention: head h decays by 1 - 2^(-5-h)."""
    no_extras("chunk_retention", kwargs)
    return fused_chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_retention`."""
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    return run(
        rules.head_decay(),
        q,
        k,
        v,
        torch.log1p(-torch.exp2(-5.0 - heads)),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """As `chunk_retention`."""
    name = "fused_recurrent_retention"
    no_reverse(name, reverse)
    no_extras(name, kwargs, frozenset({"transpose_state_layout"}))
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    return run(
        rules.head_decay(),
        q,
        k,
        v,
        torch.log1p(-torch.exp2(-5.0 - heads)),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=v_first(name, state_v_first, kwargs),
    )


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Lightning attention: a slope per head, flatter in later layers."""
    no_extras("chunk_lightning_attn", kwargs)
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    return run(
        rules.head_decay(),
        q,
        k,
        v,
        -(8 / q.shape[2] * (1 - layer_idx / num_layers)) * heads,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_lightning_attn`."""
    no_reverse("fused_recurrent_lightning_attn", reverse)
    return chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """A scalar gate `[B,T,H]`, a fixed decay per head `g_gamma` `[H]`, both, or neither."""
    name = "chunk_simple_gla"
    no_extras(name, kwargs, frozenset({"transpose_state_layout"}))
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "state_v_first": v_first(name, state_v_first, kwargs),
    }
    if g is not None:
        gate = g if g_gamma is None else g + g_gamma
        return run(rules.scalar_decay(), q, k, v, gate, **options)
    if g_gamma is not None:
        return run(rules.head_decay(), q, k, v, g_gamma, **options)
    return run(rules.linear(), q, k, v, **options)


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_simple_gla`."""
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """As `chunk_simple_gla`."""
    no_reverse("fused_recurrent_simple_gla", reverse)
    return chunk_simple_gla(
        q,
        k,
        v,
        g,
        g_gamma,
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        **kwargs,
    )


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """Gated linear attention: a log-decay per key channel, `[B,T,H,K]`."""
    return run(
        rules.key_decay(),
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
    )


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """A log-decay per key channel `gk`, per value channel `gv`, or neither; not both."""
    name = "fused_recurrent_gla"
    no_reverse(name, reverse)
    no_extras(name, kwargs, frozenset({"transpose_state_layout"}))
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "state_v_first": v_first(name, state_v_first, kwargs),
    }
    if gk is not None and gv is not None:
        refuse(
            f"{name} got both gk and gv",
            "a chunk factorises decays along one axis of the state",
            "one of the two gates",
        )
    if gk is not None:
        return run(rules.key_decay(), q, k, v, gk, **options)
    if gv is not None:
        return run(rules.value_decay(), q, k, v, gv, **options)
    return run(rules.linear(), q, k, v, **options)


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """RWKV-6: w `[B,T,H,K]` the log-decay, u `[H,K]` the bonus of the current token."""
    no_extras("chunk_rwkv6", kwargs)
    return run(
        rules.bonus(),
        r,
        k,
        v,
        w,
        u,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_rwkv6`."""
    no_reverse("fused_recurrent_rwkv6", reverse)
    return chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens)
