"""Tiny models of transformers, of every family whose layers look for functions of other packages.

Sizes are the least that have grouped heads, two kinds of layers, and no axis as long as another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,  # the usual 0.02 leaves some gradients below what float32 tells apart
}
_ATTENTION = {**_COMMON, "num_attention_heads": 2, "num_key_value_heads": 2}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = {
    **_ATTENTION,
    **_LAYERS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {"state_size": 8, "n_groups": 2, "num_heads": 4, "head_dim": 16, "chunk_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA, "head_dim": 16, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "olmo_hybrid": _DELTA,
    "kimi_linear": {
        **_ATTENTION,
        **_LAYERS,
        "linear_num_heads": 2,
        "linear_head_dim": 8,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba2": {**_COMMON, **_MAMBA, "expand": 2},
    "falcon_h1": {
        **_ATTENTION,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 16,
    },
}
# that share functions with those above, but for a layout or an activation
MORE: dict[str, dict[str, Any]] = {
    "mamba": {**_COMMON, "state_size": 8, "use_mambapy": False},
    "falcon_mamba": {**_COMMON, "state_size": 8, "use_mambapy": False},
    "jamba": {
        **_ATTENTION,
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "bamba": {
        **_ATTENTION,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "attn_layer_indices": [1],
    },
    "lfm2": {**_ATTENTION, "full_attn_idxs": [1]},
}


@cache
def model(family: str) -> Any:
    """The model with weights drawn once; it computes in float32 on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES, **MORE}[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
