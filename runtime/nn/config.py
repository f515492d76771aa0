"""The shape of a language model as data, which is saved with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from torch import nn

from ...codegen.limits import Within
from ...dsl import library
from ..recurrence import Recurrence
from ..tuned.json import from_plain, parse, render, to_plain
from .attention import Attention
from .layers import RecurrentLayer
from .roles import OperandRole

if TYPE_CHECKING:
    from typing import TypeAlias

_Size: TypeAlias = Annotated[int, Within(1, 2**31)]
_SizeOrZero: TypeAlias = Annotated[int, Within(0, 2**31)]


@dataclass(frozen=True, slots=True)
class RecurrentConfig:
    """The arguments of a `RecurrentLayer`.

    Attributes:
        rule: the name of a recurrence of the library, or of one that is passed as `rules`.
        heads: key heads H.
        key_dim: channels K of one head's Keys.
        value_dim: channels V of one head's Values.
        value_heads: value heads HV; None for H.
        conv_size: taps of the short convolution; 0 for none.
        normalise: features to scale to unit length; None for those that need it.
        roles: pairs of an operand and its role, which override what the declaration says.
        gated: whether the normalised output is multiplied by a gate.
        micro_steps: n of operands declared as tuples.
        params: pairs of the name and the value of a number of the declaration.
    """

    rule: str
    heads: _Size
    key_dim: _Size
    value_dim: _Size
    value_heads: _Size | None = None
    conv_size: _SizeOrZero = 4
    normalise: tuple[str, ...] | None = None
    roles: tuple[tuple[str, OperandRole], ...] = ()
    gated: bool = False
    micro_steps: _Size = 1
    params: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The arguments of softmax attention with rotary positions.

    Attributes:
        heads: query heads.
        window: each token sees itself and the `window - 1` tokens before it; None: all of them.
    """

    heads: _Size
    window: _Size | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a `LanguageModel`; a hybrid is one whose `mixers` are of several kinds.

    Attributes:
        vocabulary: number of tokens there are.
        hidden: size of the token vectors.
        mixers: one per block: `(delta, window) * 6`, or `(delta,) * 4 + (attention,)`.
        width: inner size of the MLPs; None for `4 * hidden`, 0 for no MLPs.
        tied: whether the embedding and the output share a weight.
    """

    vocabulary: _Size
    hidden: _Size
    mixers: tuple[RecurrentConfig | AttentionConfig, ...]
    width: _SizeOrZero | None = None
    tied: bool = False

    def save(self, path: Path) -> None:
        """Write the shape to a file.

        Args:
            path: a file of JSON.
        """
        path.write_text(render(to_plain(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> ModelConfig:
        """The shape in a file that `save` wrote.

        Args:
            path: the file.

        Returns:
            The shape; what the file says is checked.

        Raises:
            ValueError: a value in it does not fit; the message names its place.
        """
        try:
            return from_plain(ModelConfig, parse(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def mamba2(hidden: int, state: int = 128, head_dim: int = 64, expand: int = 2) -> RecurrentConfig:
    """The mixer of Mamba-2 (Dao, Gu 2024): one B and C for all heads, a skip, a gated norm.

    Mamba-2 has no MLPs and twice as many blocks: `ModelConfig(…, width=0)`. Unlike there, the norm
    is of each head and comes before the gate.

    Args:
        hidden: size of the token vectors.
        state: channels of B and C.
        head_dim: channels of one head of x.
        expand: channels of all heads of x together, by `hidden`.

    Returns:
        A mixer for a `ModelConfig`.

    Raises:
        ValueError: `expand * hidden` is no multiple of `head_dim`.
    """
    if expand * hidden % head_dim:
        raise ValueError(
            f"{expand} * hidden must be a multiple of head_dim: got {hidden}, {head_dim}"
        )
    heads = expand * hidden // head_dim
    return RecurrentConfig("mamba2", 1, state, head_dim, value_heads=heads, gated=True)


@cache
def _of_library(name: str) -> Recurrence:
    # one op for all layers, so that torch.compile compiles their blocks once
    return Recurrence(library.by_name(name))


def mixer(
    config: RecurrentConfig | AttentionConfig, hidden: int, rules: Mapping[str, Recurrence]
) -> nn.Module:
    """The module that a mixer's config describes; `rules` are looked up before the library."""
    if isinstance(config, AttentionConfig):
        return Attention(hidden, config.heads, config.window)
    return RecurrentLayer(
        rules[config.rule] if config.rule in rules else _of_library(config.rule),
        hidden,
        config.heads,
        config.key_dim,
        config.value_dim,
        value_heads=config.value_heads,
        conv_size=config.conv_size,
        normalise=config.normalise,
        roles=dict(config.roles),
        gated=config.gated,
        micro_steps=config.micro_steps,
        params=dict(config.params),
    )
