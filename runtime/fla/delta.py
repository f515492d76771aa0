"""flash-linear-attention's names for the rules that correct what a key recalls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...dsl import errors
from . import rules
from .adapter import (
    Result,
    log_decay,
    no_context,
    no_extras,
    no_reverse,
    no_states,
    promised_bound,
    refuse,
    run,
    v_first,
    write_strength,
)

_GATE = frozenset({"A_log", "dt_bias"})
_LAYOUT = frozenset({"transpose_state_layout"})


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """The delta rule; beta `[B,T,H]`."""
    no_extras("chunk_delta_rule", kwargs)
    return run(
        rules.delta(use_qk_l2norm_in_kernel),
        q,
        k,
        v,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_delta_rule`; beta = 1 where it is absent."""
    if beta is not None and beta.ndim == 4:
        refuse(
            "fused_recurrent_delta_rule got a beta per value channel",
            "every column of the state would have a triangular solve of its own",
            "beta [B,T,H], one per head",
        )
    return chunk_delta_rule(
        q,
        k,
        v,
        write_strength(beta, v, logits=False, negative=False),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
    )


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: Any,
) -> Result:
    """Gated delta rule; g, beta `[B,T,HV]`; g is raw, with A_log, if `use_gate_in_kernel`."""
    name = "chunk_gated_delta_rule"
    no_context(name, cp_context)
    no_extras(name, kwargs, _LAYOUT | _GATE | {"use_gate_in_kernel"})
    if kwargs.get("use_gate_in_kernel", False):
        g = log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"), None)
    return run(
        rules.scalar_gated_delta(use_qk_l2norm_in_kernel),
        q,
        k,
        v,
        g,
        write_strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=v_first(name, state_v_first, kwargs),
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """As `chunk_gated_delta_rule`, with gates per key (`gk`) or value channel (`gv`) as well."""
    name = "fused_recurrent_gated_delta_rule"
    no_extras(name, kwargs, _LAYOUT)
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
    if use_gate_in_kernel:
        if g is None:
            raise errors.MissingOperand("g", "Scalar", "[B,T,HV]", op=name)
        g = log_decay(g, A_log, dt_bias, None)
    beta = write_strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    norm = use_qk_l2norm_in_kernel
    channels = gk if gk is not None else gv
    if channels is not None and g is not None:
        channels = channels + g.unsqueeze(-1)
    if gk is not None and channels is not None:
        return run(rules.key_gated_delta(norm, None), q, k, v, channels, beta, **options)
    if channels is not None:
        return run(rules.value_gated_delta(norm), q, k, v, channels, beta, **options)
    if g is not None:
        return run(rules.scalar_gated_delta(norm), q, k, v, g, beta, **options)
    return run(rules.delta(norm), q, k, v, beta, **options)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> Result:
    """Kimi delta attention; g `[B,T,HV,K]`, beta `[B,T,HV]`. `safe_gate` promises g >= -5."""
    name = "chunk_kda"
    no_context(name, cp_context)
    no_states(name, return_intermediate_states)
    no_extras(name, kwargs, _LAYOUT | _GATE)
    if use_gate_in_kernel:
        g = log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"), lower_bound)
    bound = promised_bound(use_gate_in_kernel, safe_gate, lower_bound)
    return run(
        rules.key_gated_delta(use_qk_l2norm_in_kernel, bound),
        q,
        k,
        v,
        g,
        write_strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=v_first(name, state_v_first, kwargs),
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """As `chunk_kda`."""
    name = "fused_recurrent_kda"
    no_extras(name, kwargs, _LAYOUT)
    if use_gate_in_kernel:
        g = log_decay(g, A_log, dt_bias, lower_bound)
    bound = promised_bound(use_gate_in_kernel, False, lower_bound)
    return run(
        rules.key_gated_delta(use_qk_l2norm_in_kernel, bound),
        q,
        k,
        v,
        g,
        write_strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=v_first(name, state_v_first, kwargs),
    )


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """Comba: p `[B,T,H,K]` reads what is erased. `fused_recurrent_comba` has p before v."""
    return run(
        rules.comba(use_qk_l2norm_in_kernel),
        q,
        k,
        v,
        k if p is None else p,
        g,
        write_strength(beta, v, logits=False, negative=False),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_comba`, but for the order of p and v."""
    return chunk_comba(
        q,
        k,
        v,
        p,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
    )


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object | None = None,
    lower_bound: float | None = None,
    **kwargs: Any,
) -> Result:
    """Diagonal plus low rank: `a` reads the undecayed state, `b` writes what was read."""
    name = "chunk_dplr_delta_rule"
    no_context(name, cp_context)
    no_extras(name, kwargs)
    return run(
        rules.low_rank(promised_bound(True, safe_gate, lower_bound)),
        q,
        k,
        v,
        a,
        b,
        gk,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_dplr_delta_rule`."""
    no_reverse("fused_recurrent_dplr_delta_rule", reverse)
    return chunk_dplr_delta_rule(
        q, k, v, a, b, gk, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object | None = None,
    lower_bound: float | None = None,
) -> Result:
    """RWKV-7: as `chunk_dplr_delta_rule` with r for q and w the log-decay; not scaled."""
    return chunk_dplr_delta_rule(
        r,
        k,
        v,
        a,
        b,
        w,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        safe_gate=safe_gate,
        cp_context=cp_context,
        lower_bound=lower_bound,
    )


def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """As `chunk_rwkv7`, but scaled by K^-0.5 and with the final state unless told otherwise."""
    return chunk_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens
    )


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: object | None = None,
    **kwargs: Any,
) -> Result:
    """Gated delta with an erase gate b per key channel and a write gate w per value channel."""
    name = "chunk_gdn2"
    no_context(name, cp_context)
    no_states(name, return_intermediate_states)
    no_extras(name, kwargs, _LAYOUT | _GATE)
    if use_gate_in_kernel:
        g = log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"), lower_bound)
    bound = promised_bound(use_gate_in_kernel, safe_gate, lower_bound)
    return run(
        rules.erase_write(use_qk_l2norm_in_kernel, bound),
        q,
        k,
        v,
        g,
        b,
        w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=v_first(name, state_v_first, kwargs),
    )


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
) -> Result:
    """n delta steps per token: k, v, beta have length T*n; `cu_seqlens` counts tokens of q."""
    no_context("chunk_gated_delta_product", cp_context)
    k, v, beta = (x.unflatten(1, (-1, num_householder)) for x in (k, v, beta))
    rule = rules.gated_product(use_qk_l2norm_in_kernel, g is not None)
    gates: tuple[Tensor, ...] = () if g is None else (g,)
    return run(
        rule,
        q,
        k,
        v,
        *gates,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


# the shorter names that the original has beside the long ones
chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
