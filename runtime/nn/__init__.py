"""Layers and models of recurrences and of softmax attention, for torch."""

from __future__ import annotations

from .attention import (
    Attention,
    AttentionState,
    GlobalAttention,
    SlidingWindowAttention,
)
from .config import AttentionConfig, ModelConfig, RecurrentConfig, mamba2
from .evaluation import (
    RecallSplit,
    loss_by_position,
    perplexity,
    perplexity_distance,
    recall_split,
    relative_perplexities,
    token_losses,
)
from .flops import flop_formulas
from .generation import sample
from .layers import LayerState, RecurrentLayer
from .losses import linear_cross_entropy, linear_token_losses
from .model import Block, LanguageModel, SwiGLU
from .parts import Mixer, RMSNorm, ShortConvolution
from .roles import OperandRole, default_roles
from .training import parameter_groups, tensor_parallel

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "Block",
    "GlobalAttention",
    "LanguageModel",
    "LayerState",
    "Mixer",
    "ModelConfig",
    "OperandRole",
    "RMSNorm",
    "RecallSplit",
    "RecurrentConfig",
    "RecurrentLayer",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
    "default_roles",
    "flop_formulas",
    "linear_cross_entropy",
    "linear_token_losses",
    "loss_by_position",
    "mamba2",
    "parameter_groups",
    "perplexity",
    "perplexity_distance",
    "recall_split",
    "relative_perplexities",
    "sample",
    "tensor_parallel",
    "token_losses",
]
