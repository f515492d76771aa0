"""Layers and models of recurrences and of softmax attention, for torch."""

from __future__ import annotations

from .attention import (
    Attention,
    AttentionState,
    GlobalAttention,
    SlidingWindowAttention,
)
from .layers import LayerState, RecurrentLayer, RMSNorm, Role, ShortConvolution, default_roles
from .model import Block, LanguageModel, Mixer, SwiGLU

__all__ = [
    "Attention",
    "AttentionState",
    "Block",
    "GlobalAttention",
    "LanguageModel",
    "LayerState",
    "Mixer",
    "RMSNorm",
    "RecurrentLayer",
    "Role",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SwiGLU",
    "default_roles",
]
