"""Models of transformers whose layers look for fast functions of other packages, in any size."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

VOCABULARY = 64
# one for each kind of layer
FAMILIES = ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "mamba2", "falcon_h1")
# that share functions with those, but for a layout or an activation
MORE = ("mamba", "falcon_mamba", "jamba", "bamba", "lfm2")


def configuration(family: str, hidden: int, heads: int, dim: int) -> dict[str, Any]:
    """A configuration of two layers, of which one is attention where the family has both.

    Args:
        family: the model type.
        hidden: size of the vectors between layers.
        heads: key heads of a linear layer; where value heads can be more, they are twice as many.
        dim: channels of a key; a value has half as many more where they can differ.
    """
    every = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "intermediate_size": 3 * hidden // 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.2,  # the usual 0.02 leaves gradients that float32 hardly tells apart
    }
    attention = {**every, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixed = {**attention, "layer_types": ["linear_attention", "full_attention"]}
    delta = {
        **mixed,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": 3 * dim // 2,
    }
    scalar = {"n_heads": 2 * heads, "d_head": hidden // heads, "d_state": dim, "n_groups": heads}
    mamba2 = {**attention, **{f"mamba_{name}": size for name, size in scalar.items()}}
    mamba = {**every, "state_size": dim, "use_mambapy": False}
    found: dict[str, dict[str, Any]] = {
        "qwen3_next": {**delta, "head_dim": 16, "num_experts": 0, "mlp_only_layers": [0, 1]},
        "qwen3_5_text": {**delta, "head_dim": 16},
        "olmo_hybrid": delta,
        "kimi_linear": {
            **mixed,
            "linear_num_heads": heads,
            "linear_head_dim": dim,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        "mamba2": {
            **every,
            "num_heads": 2 * heads,
            "head_dim": hidden // heads,
            "state_size": dim,
            "n_groups": heads,
        },
        "falcon_h1": {**mamba2, "mamba_d_ssm": 2 * hidden, "head_dim": 16},
        "mamba": mamba,
        "falcon_mamba": mamba,
        "jamba": {
            **attention,
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": dim,
        },
        "bamba": {**mamba2, "attn_layer_indices": [1]},
        "lfm2": {**attention, "full_attn_idxs": [1]},
    }
    return found[family]


@cache
def model(family: str, hidden: int = 32, heads: int = 2, dim: int = 8) -> Any:
    """A model with weights drawn anew, in float32 on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **configuration(family, hidden, heads, dim))
    make: Any = AutoModelForCausalLM.from_config
    return make(config, attn_implementation="eager").eval()
