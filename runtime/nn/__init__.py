"""Layers and models of recurrences and of softmax attention, for torch."""

from __future__ import annotations

from .attention import (
    Attention,
    AttentionState,
    GlobalAttention,
    SlidingWindowAttention,
)
from .evaluation import (
    RecallSplit,
    loss_by_position,
    perplexity,
    perplexity_distance,
    recall_split,
    relative_perplexities,
    token_losses,
)
from .layers import LayerState, RecurrentLayer
from .model import Block, LanguageModel, SwiGLU
from .parts import Mixer, RMSNorm, ShortConvolution
from .roles import OperandRole, default_roles

__all__ = [
    "Attention",
    "AttentionState",
    "Block",
    "GlobalAttention",
    "LanguageModel",
    "LayerState",
    "Mixer",
    "OperandRole",
    "RMSNorm",
    "RecallSplit",
    "RecurrentLayer",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
    "default_roles",
    "loss_by_position",
    "perplexity",
    "perplexity_distance",
    "recall_split",
    "relative_perplexities",
    "token_losses",
]
