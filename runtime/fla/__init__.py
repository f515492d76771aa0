"""The functions of `chunkwise.fla`: a row each, of a signature and the steps that it calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dsl import errors
from . import several
from .adapter import Given, Steps, adapter, called, run
from .arguments import GDN2_GATES, MOMENTUM, PER_KEY, PRECONDITIONED, SLOTS
from .rules import rule

__all__ = [
    "chunk_abc",
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_gsa",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_momentum_delta_rule",
    "chunk_precond_gated_delta_rule",
    "chunk_precond_kda",
    "chunk_retention",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_momentum_delta_rule",
    "fused_recurrent_precond_gated_delta_rule",
    "fused_recurrent_precond_kda",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
]

_RUN = "scale=None, initial_state=None, output_final_state=False"
_L2 = "use_qk_l2norm_in_kernel=False"
_BETA = "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False"
_CU = "cu_seqlens=None"
_CU_CPU = f"{_CU}, cu_seqlens_cpu=None"
_TRANSPOSED = "transpose_state_layout"  # what state_v_first was called before
_GATE = "A_log dt_bias"


def _linear(name: str, given: Given) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor] | None]:
    """Linear attention, by default of the chunked names with its normaliser."""
    initial, operands = given["initial_state"], [given[n] for n in ("q", "k", "v")]
    if not given["normalize"]:
        if isinstance(initial, tuple):
            raise errors.BadBatch("initial_state", 2, "one tensor where normalize=False")
        return run("linear_attention", operands, given)
    S, z = initial if isinstance(initial, tuple) else (initial, None)
    first = (S, None if z is None else z.squeeze(1))
    o, final = called(rule("normalised"), operands, given, first)
    assert isinstance(final, tuple)
    return o, (final[0] if given["output_final_state"] else None, final[1].unsqueeze(1))


def _heads(q: Tensor) -> Tensor:
    return torch.arange(q.shape[2], dtype=torch.float32, device=q.device)


def _retention(given: Given) -> Given:
    """The log-decay of head h: log(1 - 2^(-5-h))."""
    return {"g": torch.log1p(-torch.exp2(-5.0 - _heads(given["q"])))}


def _lightning(given: Given) -> Given:
    """The log-decay of a head, by its number and that of the layer."""
    heads = _heads(given["q"])
    slope = 8 / len(heads) * (1 - given["layer_idx"] / given["num_layers"])
    return {"g": -slope * heads}


def _by_micro_steps(given: Given) -> Given:
    """`[B,T*n,...]` as `[B,T,n,...]`."""
    n = given["num_householder"]
    return {name: given[name].unflatten(1, (-1, n)) for name in ("k", "v", "beta")}


chunk_linear_attn = fused_chunk_linear_attn = adapter(
    "chunk_linear_attn",
    f"q, k, v, {_RUN}, normalize=True, {_CU}",
    _linear,
    "Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020), by default normalised.",
)
fused_recurrent_linear_attn = adapter(
    "fused_recurrent_linear_attn",
    f"q, k, v, {_RUN}, reverse=False, normalize=False, {_CU}",
    _linear,
    "As `chunk_linear_attn`, not normalised by default.",
)

_RETENTION = Steps("retention: q k v g", first=_retention)
chunk_retention = adapter(
    "chunk_retention",
    f"q, k, v, {_RUN}, {_CU}, **kwargs",
    _RETENTION,
    "Retention (Sun et al. 2023): head h decays by 1 - 2^(-5-h).",
)
fused_chunk_retention = adapter(
    "fused_chunk_retention", f"q, k, v, {_RUN}, {_CU}", _RETENTION, "As `chunk_retention`."
)
fused_recurrent_retention = adapter(
    "fused_recurrent_retention",
    f"q, k, v, {_RUN}, reverse=False, state_v_first=False, {_CU}, **kwargs",
    _RETENTION,
    "As `chunk_retention`.",
    _TRANSPOSED,
)

_LIGHTNING = Steps("retention: q k v g", first=_lightning)
chunk_lightning_attn = adapter(
    "chunk_lightning_attn",
    f"q, k, v, layer_idx, num_layers, {_RUN}, {_CU}, **kwargs",
    _LIGHTNING,
    "Lightning attention (Qin et al. 2024): a slope per head, flatter in later layers.",
)
fused_recurrent_lightning_attn = adapter(
    "fused_recurrent_lightning_attn",
    f"q, k, v, layer_idx, num_layers, {_RUN}, reverse=False, {_CU}",
    _LIGHTNING,
    "As `chunk_lightning_attn`.",
)

_SIMPLE_GLA = Steps("simple_gla: q k v g", "retention: q k v g_gamma", "linear_attention: q k v")
chunk_simple_gla = adapter(
    "chunk_simple_gla",
    f"q, k, v, g=None, g_gamma=None, {_RUN}, state_v_first=False, {_CU_CPU}, **kwargs",
    _SIMPLE_GLA,
    "Linear attention (Dao, Gu 2024) with a scalar gate, a fixed decay per head, both, or neither.",
    _TRANSPOSED,
)
fused_chunk_simple_gla = adapter(
    "fused_chunk_simple_gla",
    f"q, k, v, g=None, g_gamma=None, {_RUN}, {_CU}",
    _SIMPLE_GLA,
    "As `chunk_simple_gla`.",
)
fused_recurrent_simple_gla = adapter(
    "fused_recurrent_simple_gla",
    f"q, k, v, g=None, g_gamma=None, {_RUN}, reverse=False, state_v_first=False, {_CU}, **kwargs",
    _SIMPLE_GLA,
    "As `chunk_simple_gla`.",
    _TRANSPOSED,
)

chunk_gla = adapter(
    "chunk_gla",
    f"q, k, v, g, {_RUN}, state_v_first=False, {_CU_CPU}",
    Steps("gla: q k v g"),
    "Gated linear attention (Yang, Wang, Shen, Panda, Kim 2024): a gate per key channel.",
    g=PER_KEY,
)
fused_recurrent_gla = adapter(
    "fused_recurrent_gla",
    f"q, k, v, gk=None, gv=None, {_RUN}, reverse=False, state_v_first=False, {_CU}, **kwargs",
    Steps(
        "gla_both: q k v gk gv", "gla: q k v gk", "value_gla: q k v gv", "linear_attention: q k v"
    ),
    "As `chunk_gla`, gated per key channel (`gk`), per value channel (`gv`), or neither.",
    _TRANSPOSED,
)

_RWKV6 = Steps("rwkv6: r k v w u")
chunk_rwkv6 = adapter(
    "chunk_rwkv6",
    f"r, k, v, w, u, {_RUN}, {_CU_CPU}, **kwargs",
    _RWKV6,
    "RWKV-6 (Peng et al. 2024): the current token counts with a bonus, not with a decay.",
)
fused_recurrent_rwkv6 = adapter(
    "fused_recurrent_rwkv6",
    f"r, k, v, w, u, {_RUN}, reverse=False, {_CU}",
    _RWKV6,
    "As `chunk_rwkv6`.",
)

_DELTA = Steps("delta_rule: q k v beta")
chunk_delta_rule = adapter(
    "chunk_delta_rule",
    f"q, k, v, beta, {_RUN}, {_L2}, {_CU_CPU}, **kwargs",
    _DELTA,
    "The delta rule (Schlag, Irie, Schmidhuber 2021).",
)
fused_recurrent_delta_rule = adapter(
    "fused_recurrent_delta_rule",
    f"q, k, v, beta=None, {_RUN}, {_L2}, {_CU}",
    _DELTA,
    "As `chunk_delta_rule`; beta may be absent.",
)

chunk_gated_delta_rule = chunk_gdn = adapter(
    "chunk_gated_delta_rule",
    f"q, k, v, g, beta, {_RUN}, {_L2}, {_BETA}, state_v_first=False, {_CU_CPU}, "
    "chunk_indices=None, cp_context=None, **kwargs",
    Steps("gated_delta_rule: q k v g beta"),
    "Gated delta rule (Yang, Kautz, Hatamizadeh 2024).",
    f"{_TRANSPOSED} {_GATE} use_gate_in_kernel",
)
fused_recurrent_gated_delta_rule = fused_recurrent_gdn = adapter(
    "fused_recurrent_gated_delta_rule",
    f"q, k, v, g=None, gk=None, gv=None, beta=None, {_RUN}, {_L2}, use_gate_in_kernel=False, "
    f"A_log=None, dt_bias=None, {_BETA}, state_v_first=False, {_CU}, **kwargs",
    Steps("kda: q k v gk beta", "gated_delta_rule: q k v g beta", "delta_rule: q k v beta"),
    "As `chunk_gated_delta_rule`, with a gate per key channel (`gk`) as well.",
    _TRANSPOSED,
)

_KDA = Steps("kda: q k v g beta")
chunk_kda = adapter(
    "chunk_kda",
    f"q, k, v, g, beta, {_RUN}, {_L2}, use_gate_in_kernel=False, {_BETA}, safe_gate=False, "
    "lower_bound=None, disable_recompute=False, return_intermediate_states=False, "
    f"state_v_first=False, {_CU_CPU}, cp_context=None, use_graph=False, max_num_seqs=None, "
    "**kwargs",
    _KDA,
    "Kimi delta attention (Kimi Team 2025): the delta rule with a gate per key channel.",
    f"{_TRANSPOSED} {_GATE}",
    g=PER_KEY,
)
fused_recurrent_kda = adapter(
    "fused_recurrent_kda",
    f"q, k, v, g, beta, A_log=None, dt_bias=None, {_RUN}, {_L2}, use_gate_in_kernel=False, "
    f"{_BETA}, lower_bound=None, state_v_first=False, {_CU}, **kwargs",
    _KDA,
    "As `chunk_kda`.",
    _TRANSPOSED,
    g=PER_KEY,
)

_COMBA = Steps("comba: q k v p g beta", "comba: q k v k g beta")
chunk_comba = adapter(
    "chunk_comba",
    f"q, k, v, p, g, beta=None, {_RUN}, {_L2}, {_CU_CPU}",
    _COMBA,
    "Comba (Hu et al. 2025): p reads what is erased. `fused_recurrent_comba` has p before v.",
)
fused_recurrent_comba = adapter(
    "fused_recurrent_comba",
    f"q, k, p, v, g, beta=None, {_RUN}, {_L2}, {_CU}",
    _COMBA,
    "As `chunk_comba`, but for the order of p and v.",
)

_DPLR = Steps("dplr: q k v a b gk")
chunk_dplr_delta_rule = adapter(
    "chunk_dplr_delta_rule",
    f"q, k, v, a, b, gk, {_RUN}, {_CU_CPU}, safe_gate=False, chunk_size=None, "
    "disable_recompute=False, cp_context=None, lower_bound=None, **kwargs",
    _DPLR,
    "Diagonal plus low rank (Peng et al. 2025): `b` writes what `a` reads.",
)
fused_recurrent_dplr_delta_rule = adapter(
    "fused_recurrent_dplr_delta_rule",
    f"q, k, v, a, b, gk, {_RUN}, reverse=False, {_CU}",
    _DPLR,
    "As `chunk_dplr_delta_rule`.",
)

_IPLR = Steps("iplr: q k v a b")
chunk_iplr_delta_rule = adapter(
    "chunk_iplr_delta_rule",
    f"q, k, v, a, b, {_RUN}, {_CU_CPU}, **kwargs",
    _IPLR,
    "Identity plus low rank (Peng et al. 2025): `b` writes what `a` reads; nothing decays.",
)
fused_recurrent_iplr_delta_rule = adapter(
    "fused_recurrent_iplr_delta_rule",
    f"q, k, v, a, b, {_RUN}, {_CU}",
    _IPLR,
    "As `chunk_iplr_delta_rule`.",
)

_RWKV7 = Steps("dplr: r k v a b w")
chunk_rwkv7 = adapter(
    "chunk_rwkv7",
    "r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, "
    f"{_CU_CPU}, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, "
    "lower_bound=None",
    _RWKV7,
    "RWKV-7 (Peng et al. 2025): as `chunk_dplr_delta_rule`, with r for q and w for gk; not scaled.",
)
fused_recurrent_rwkv7 = adapter(
    "fused_recurrent_rwkv7",
    f"r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=True, {_CU}",
    _RWKV7,
    "As `chunk_rwkv7`, but scaled by K^-0.5 and with the final state unless told otherwise.",
)

_GDN2 = Steps("gdn2: q k v g b w")
chunk_gdn2 = adapter(
    "chunk_gdn2",
    f"q, k, v, g, b, w, {_RUN}, {_L2}, use_gate_in_kernel=False, {_CU_CPU}, safe_gate=False, "
    "lower_bound=None, disable_recompute=False, return_intermediate_states=False, "
    "state_v_first=False, cp_context=None, **kwargs",
    _GDN2,
    "Gated DeltaNet-2 (Hatamizadeh, Choi, Kautz 2026): gates of what is erased and written.",
    f"{_TRANSPOSED} {_GATE}",
    **GDN2_GATES,
)
fused_recurrent_gdn2 = adapter(
    "fused_recurrent_gdn2",
    f"q, k, v, g, b, w, A_log=None, dt_bias=None, {_RUN}, {_L2}, use_gate_in_kernel=False, "
    f"lower_bound=None, state_v_first=False, {_CU}, **kwargs",
    _GDN2,
    "As `chunk_gdn2`.",
    _TRANSPOSED,
    **GDN2_GATES,
)
chunk_gated_delta_product = adapter(
    "chunk_gated_delta_product",
    f"q, k, v, g, beta, num_householder, {_RUN}, {_L2}, {_CU_CPU}, cp_context=None",
    Steps("gated_delta_product: q k v g beta", "delta_product: q k v beta", first=_by_micro_steps),
    "Gated DeltaProduct (Siems et al. 2025): n delta steps per token.",
    k="keys of all delta steps, `[B,T*n,H,K]`.",
    v="values of all delta steps, `[B,T*n,HV,V]`.",
    beta="step sizes of all delta steps, `[B,T*n,HV]`.",
    cu_seqlens="int `[N+1]`, boundaries of N sequences in tokens of q; then B = 1.",
)

chunk_gsa = adapter(
    "chunk_gsa",
    f"q, k, v, s, g=None, {_RUN}, checkpoint_level=2, {_CU_CPU}, **kwargs",
    several.gsa,
    "Gated slot attention (Zhang et al. 2024): softmax over M slots that keep keys and values.",
    **SLOTS,
)
fused_recurrent_gsa = adapter(
    "fused_recurrent_gsa",
    f"q, k, v, s, g=None, {_RUN}, reverse=False, {_CU}",
    several.gsa,
    "As `chunk_gsa`.",
    **SLOTS,
)
chunk_abc = adapter(
    "chunk_abc",
    "q, k, v, s, initial_state=None, output_final_state=False",
    several.abc,
    "Attention with bounded memory (Peng et al. 2022): `chunk_gsa` of slots that are averages.",
    **SLOTS,
)
fused_recurrent_hgrn = adapter(
    "fused_recurrent_hgrn",
    f"x, g, initial_state=None, output_final_state=False, {_CU}",
    several.hgrn,
    "HGRN (Qin, Yang, Zhong 2023): the state of a channel decays by exp(g) and x is added to it.",
    g="natural-log decays per channel, `[B,T,D]`, at most 0.",
    initial_state="the state before the first token, `[N,D]`; zero where it is None.",
    returns="`(o, final_state)`: o `[B,T,D]` in the dtype of x; the final state `[N,D]` in "
    "float32, or None where it was not asked for.",
)

_MOMENTS = (
    f"q, k, v, log_alpha, log_mu, p=None, beta=None, eta=None, {_RUN}, {_CU}, "
    "use_qk_l2norm_in_kernel=True, use_p_times_alpha=True"
)
chunk_momentum_delta_rule = adapter(
    "chunk_momentum_delta_rule",
    f"{_MOMENTS}, chunk_size=64",
    several.momentum,
    "The delta rule with momentum (MomentumDeltaNet, 2026): the momentum averages gradients.",
    **MOMENTUM,
)
fused_recurrent_momentum_delta_rule = adapter(
    "fused_recurrent_momentum_delta_rule",
    _MOMENTS,
    several.momentum,
    "As `chunk_momentum_delta_rule`.",
    **MOMENTUM,
)

_SUMS = "initial_state=None, initial_A_state=None, output_final_state=False"
_SQUASH = "transpose_state_layout=False, x=1.5, eps=1e-06, log_atk_scale=None"
chunk_precond_gated_delta_rule = adapter(
    "chunk_precond_gated_delta_rule",
    f"q, k, v, g_atk, g, beta_atk, beta, scale=None, {_SUMS}, use_qk_l2norm_in_kernel=True, "
    f"{_CU_CPU}, cp_context=None, {_SQUASH}",
    several.preconditioned,
    "Preconditioned gated delta rule (Tumma, Loo, Rus 2026): steps shrink as keys add up.",
    **PRECONDITIONED,
)
fused_recurrent_precond_gated_delta_rule = adapter(
    "fused_recurrent_precond_gated_delta_rule",
    "q, k, v, g=None, gk=None, gv=None, beta=None, g_atk=None, beta_atk=None, scale=None, "
    f"{_SUMS}, use_qk_l2norm_in_kernel=True, {_CU}, {_SQUASH}",
    several.preconditioned,
    "As `chunk_precond_gated_delta_rule`, with a gate per key channel (`gk`) as well.",
    **PRECONDITIONED,
)
chunk_precond_kda = adapter(
    "chunk_precond_kda",
    f"q, k, v, g, g_atk, beta_atk, beta, scale=None, {_SUMS}, use_gate_in_kernel=False, "
    f"safe_gate=False, lower_bound=None, {_CU_CPU}, chunk_indices=None, cp_context=None, "
    f"{_SQUASH}, solve_tril_precision=None, disable_recompute=False, "
    "return_intermediate_states=False, **kwargs",
    several.preconditioned,
    "Preconditioned Kimi delta attention (Tumma, Loo, Rus 2026); q and k are normalised.",
    f"{_GATE} use_qk_l2norm_in_kernel",
    g=PER_KEY,
    **PRECONDITIONED,
)
fused_recurrent_precond_kda = adapter(
    "fused_recurrent_precond_kda",
    f"q, k, v, g, g_atk, beta_atk, beta, A_log=None, dt_bias=None, scale=None, {_SUMS}, "
    "use_qk_l2norm_in_kernel=True, use_gate_in_kernel=False, lower_bound=None, "
    f"{_CU}, {_SQUASH}, **kwargs",
    several.preconditioned,
    "As `chunk_precond_kda`, whose norms may be left out.",
    g=PER_KEY,
    **PRECONDITIONED,
)
