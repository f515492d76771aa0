"""A language model whose mixers are a list: a hybrid is a list with two kinds in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..call import any_sharded
from . import generation, training
from .config import ModelConfig, mixer
from .losses import linear_cross_entropy, linear_token_losses
from .parts import Mixer, RMSNorm, Split, again, multiple
from .weights import read_weights, write_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from ..recurrence import Recurrence


class SwiGLU(nn.Module):
    """`W3 (silu(W1 x) * W2 x)` (Shazeer 2020).

    Args:
        hidden: size of the token vectors.
        width: size of the inner vectors.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of tokens, each by itself.

        Args:
            x: `[..., hidden]`.

        Returns:
            `[..., hidden]`.
        """
        return self.after(None, x)

    def split(self, ranks: int) -> dict[str, Split | None]:
        """How so many ranks split the parameters by inner channels.

        Args:
            ranks: how many.

        Returns:
            By the path of each parameter, how ranks split it.

        Raises:
            ValueError: these are not a multiple of `ranks`.
        """
        width = self.down.in_features
        multiple(ranks, width=width)
        return {"up.weight": Split(0, (width, width)), "down.weight": Split(1)}

    def after(self, norm: RMSNorm | None, x: Tensor) -> Tensor:
        """`forward(norm(x))`, of which the backward keeps x and the product with W1 and W2.

        Args:
            norm: of the module's own size; None for none.
            x: `[..., hidden]`.

        Returns:
            `[..., hidden]`.
        """

        def swish(inner: Tensor) -> Tensor:
            a, b = inner.chunk(2, dim=-1)
            return F.silu(a) * b

        inner = self.up(x) if norm is None else again(self.up, norm, x)
        return again(self.down, swish, inner)


class Block(nn.Module, Mixer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        hidden: size of the token vectors.
        mixer: a module of the protocol `Mixer`.
        width: inner size of the MLP; None for `4 * hidden`, 0 for no MLP.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(self, hidden: int, mixer: nn.Module, width: int | None = None) -> None:
        super().__init__()
        width = 4 * hidden if width is None else width
        self.mixer_norm = RMSNorm(hidden)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(hidden) if width else None
        self.mlp = SwiGLU(hidden, width) if width else None

    @property
    def mix(self) -> Mixer:
        """The mixer.

        Returns:
            The module that was passed as `mixer`.
        """
        return cast(Mixer, self.mixer)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp.after(self.mlp_norm, x)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """The outputs of whole sequences.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, which are independent; then
                B = 1.
            group: the ranks over which the tokens are split in order, for a mixer that takes it.

        Returns:
            `[B, T, hidden]`.
        """
        ranks = {} if group is None else {"group": group}
        return self._mlp(x + self.mixer(self.mixer_norm(x), cu_seqlens, **ranks))

    def prefill(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        y, state = self.mix.prefill(self.mixer_norm(x), cu_seqlens)
        return self._mlp(x + y), state

    def initial_state(self, batch: int) -> Any:
        return self.mix.initial_state(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mix.step(self.mixer_norm(x), state)
        return self._mlp(x + y), state


class LanguageModel(nn.Module):
    """Token embedding, one block per mixer, a norm, and logits over the vocabulary.

    Args:
        vocabulary: number of tokens there are.
        hidden: size of the token vectors.
        mixers: one module of the protocol `Mixer` per block.
        width: inner size of the MLPs; None for `4 * hidden`, 0 for no MLPs.
        tied: whether the embedding and the output share a weight.

    Attributes:
        config (ModelConfig | None): the shape, of a model that was made of one.
        checkpointing (bool): whether a backward computes blocks again instead of keeping what is
            within them (Chen et al. 2016); False at first.

    Raises:
        TypeError: `mixers` is one module, or has something that is no module.
        ValueError: a layer of `mixers` is of another `hidden`.
    """

    __call__: Callable[..., Tensor]  # of forward; torch's own type says Any

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        mixers: Sequence[nn.Module],
        *,
        width: int | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(mixers, nn.Module) and not isinstance(mixers, nn.ModuleList):
            raise TypeError("mixers is one module, expected a list: mixers=[layer]")
        for n, m in enumerate(mixers):
            if not isinstance(m, nn.Module):
                raise TypeError(f"mixers[{n}] is {m!r}, expected a layer: RecurrentLayer({m!r}, …)")
            if (own := getattr(m, "hidden", hidden)) != hidden:
                raise ValueError(f"mixers[{n}] takes vectors of {own}, and the model has {hidden}")
        self.config: ModelConfig | None = None
        self.checkpointing = False
        self.embed = nn.Embedding(vocabulary, hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(hidden, m, width) for m in mixers)
        self.norm = RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @classmethod
    def from_config(
        cls, config: ModelConfig, rules: Mapping[str, Recurrence] | None = None
    ) -> LanguageModel:
        """A model of that shape, initialised.

        Args:
            config: the shape.
            rules: recurrences by the names that the config has for them, before the library's.

        Returns:
            The model, whose `config` is kept.

        Raises:
            UnknownRecurrence: a rule is neither in `rules` nor in the library.
        """
        mixers = [mixer(m, config.hidden, rules or {}) for m in config.mixers]
        model = cls(config.vocabulary, config.hidden, mixers, width=config.width, tied=config.tied)
        model.config = config
        model.initialise()
        return model

    def initialise(self) -> None:
        """Draw the weights of linear layers and the embedding anew; the rest stays as it is.

        They are normal, with variance 2 / (5 hidden) (Nguyen, Salazar 2019); those of the layers
        that add to the residual stream are smaller by the root of their number (Radford et al.
        2019).
        """
        training.initialise(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; the second replaces its old self at once.

        Args:
            folder: made if it does not exist.

        Raises:
            ValueError: the model was not made by `from_config`, or ranks have parts of its weights.
            ModuleNotFoundError: safetensors (extra `train`) is not installed.
        """
        if self.config is None:
            raise ValueError("the model has no config: make it by LanguageModel.from_config")
        if any_sharded(self.parameters(), {}):
            how = "load what torch's get_model_state_dict gathers into a model of the same config"
            raise ValueError(f"ranks have parts of the weights: {how}, and save that")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.config.save(path / "config.json")
        write_weights(self, path / "model.safetensors")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, rules: Mapping[str, Recurrence] | None = None
    ) -> LanguageModel:
        """The model that `save_pretrained` wrote, in torch's default dtype and device.

        Args:
            folder: with `config.json` and `model.safetensors`.
            rules: as for `from_config`.

        Returns:
            The model.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: the config does not fit, or the weights do not fit the config.
            ModuleNotFoundError: safetensors (extra `train`) is not installed.
        """
        names = ("config.json", "model.safetensors")
        missing = [name for name in names if not (Path(folder) / name).is_file()]
        if missing:
            wanted = "save_pretrained writes config.json and model.safetensors"
            raise FileNotFoundError(f"no {' and no '.join(missing)} in {folder}: {wanted}")
        model = cls.from_config(ModelConfig.read(Path(folder) / "config.json"), rules)
        path = Path(folder) / "model.safetensors"
        try:
            read_weights(model, path)
        except RuntimeError as error:
            few = " ".join(str(error).split("\n\t")[:3])  # the rest says the same of other weights
            raise ValueError(f"{path}: {few}") from None
        return model

    def _blocks(self) -> list[Block]:
        return [cast(Block, b) for b in self.blocks]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits that the last block's output gives.

        Args:
            hidden: `[..., hidden]`.

        Returns:
            `[..., vocabulary]`.
        """
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """The logits of the token after each, or the loss.

        Args:
            tokens: int64 `[B, T]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.
            targets: the tokens that follow, int64 `[B, T]`, -100 where there is no loss.
            group: the ranks over which the tokens are split in order; then `tokens` and `targets`
                are this rank's, and `cu_seqlens` counts those of all.

        Returns:
            `[B, T, vocabulary]`; with `targets`, the mean cross entropy `[]` (of this rank's
            tokens), for which the logits never exist all at once.
        """
        hidden = self._hidden(tokens, cu_seqlens, group)
        if targets is None:
            return self.logits(hidden)
        return linear_cross_entropy(self.norm(hidden), self.head.weight, targets)

    def token_losses(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The loss of every token, without gradients.

        Args:
            tokens: int64 `[B, T]`.
            targets: the tokens that follow, int64 `[B, T]`, -100 where there is no loss.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.

        Returns:
            Minus the natural log of each target's probability, `[B, T]`, in float32.
        """
        with torch.no_grad():
            hidden = self.norm(self._hidden(tokens, cu_seqlens))
            return linear_token_losses(hidden, self.head.weight, targets)

    def _hidden(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """What the last block gives, `[B, T, hidden]`."""
        x: Tensor = self.embed(tokens)
        for block in self._blocks():
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cu_seqlens, group, use_reentrant=False)
            else:
                x = block(x, cu_seqlens, group)
        return x

    def initial_state(self, batch: int) -> list[Any]:
        """The state before the first token.

        Args:
            batch: number of sequences B.

        Returns:
            The states of the mixers, one per block.
        """
        return [b.initial_state(batch) for b in self._blocks()]

    def prefilled(
        self, tokens: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        """As `prefill`, without the logits.

        Args:
            tokens: int64 `[B, T]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.

        Returns:
            The last block's output `[B, T, hidden]`, and the states of the mixers.
        """
        x, states = self.embed(tokens), []
        for block in self._blocks():
            x, state = block.prefill(x, cu_seqlens)
            states.append(state)
        return x, states

    def prefill(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        """The result of `forward`, and the state from which `step` continues.

        Args:
            tokens: int64 `[B, T]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, none of them empty; then
                B = 1, and `step` continues all N.

        Returns:
            The logits `[B, T, vocabulary]`, and the states of the mixers after the last token.
        """
        hidden, states = self.prefilled(tokens, cu_seqlens)
        return self.logits(hidden), states

    def step(self, token: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token of every sequence.

        Args:
            token: int64 `[B]`.
            states: the states of the mixers before it.

        Returns:
            The logits of the next token `[B, vocabulary]`, and the new states.
        """
        x, after = self.embed(token), []
        for block, state in zip(self._blocks(), states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.logits(x), after

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor],
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continue texts of any lengths, which are packed for the prefill.

        Args:
            prompts: int64 `[T]` each, of one or more tokens.
            tokens: the most new tokens of a text.
            temperature: what logits are divided by; 0 takes the likeliest token.
            top_k: choose among the k likeliest tokens; None among all.
            top_p: choose among the fewest tokens whose probabilities add up to p (Holtzman et al.
                2020); None among all.
            stop: the token that ends a text; None for none.
            generator: torch's, of the model's device; None for the default one.

        Returns:
            The new tokens of every text, int64 `[at most tokens]`, with the `stop` that ends it.

        Raises:
            ValueError: a prompt is empty, or an option is out of its range.
        """
        return generation.generate(
            self, prompts, tokens, temperature, top_k, top_p, stop, generator
        )
