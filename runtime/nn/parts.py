"""What layers are made of: norms in float32, and a short convolution over time.

On a GPU they are one kernel each (`fused`); what is written here in torch is their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..call import any_sharded, boundaries
from ..packing import token_sequences
from ..wide import L2_EPS, wide
from . import fused

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def again(product: Callable[[Tensor], Tensor], of: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`product(of(*inputs))`; the backward keeps the inputs alone and computes `of` again.

    It is for what costs little beside reading it: norms and activations before a matrix product.
    The product is not computed again, since nothing in its backward needs its result. Under
    torch.func's gradients, where no hooks see what is kept, all of it is kept; so it is in exported
    programs.

    Parameters are those of the call, if `product` and `of` are modules or methods of modules.
    """
    # is_exporting() says yes in every graph of torch 2.11's compiler; what it reads does not
    exporting = torch.compiler._is_exporting_flag
    watched = torch._C._are_functorch_transforms_active() or exporting
    if watched or not torch.is_grad_enabled():
        return product(of(*inputs))
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if torch.compiler.is_compiling():  # a graph computes again whatever is in the marked part
        return product(checkpoint(of, *inputs, **options))
    read = [x for f in (product, of) for x in _parameters(getattr(f, "__self__", f))]

    def both(*inputs: Any) -> Tensor:
        with _in_place(read):
            return product(of(*inputs))

    y: Tensor = checkpoint(both, *inputs, **options)  # which stops as soon as it can
    return y


_Parameter = tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]


def _parameters(x: object) -> list[_Parameter]:
    """Of a module and those within it: where each is, its name there, and what it is now."""
    parts = x.modules() if isinstance(x, nn.Module) else ()
    # FSDP puts whole weights into the modules that it splits, where they are called
    own = [p._parameters for p in parts if not hasattr(p, "unshard")]
    return [(held, name, now) for held in own for name, now in held.items()]


@contextmanager
def _in_place(read: list[_Parameter]) -> Iterator[None]:
    """Have modules hold what they held: `torch.func.functional_call` lends it for one call."""
    lent = [(held, n, x, held[n]) for held, n, x in read if n in held and held[n] is not x]
    for held, name, x, _ in lent:
        held[name] = x
    try:
        yield
    finally:
        for held, name, _, now in lent:
            held[name] = now


class Split(NamedTuple):
    """How ranks split a parameter along `axis`: each of its `parts`, or the axis as a whole.

    `parts`: sizes of consecutive parts, which together are the axis.
    """

    axis: int
    parts: tuple[int, ...] = ()


def multiple(ranks: int, **sizes: int) -> None:
    """Refuse sizes that so many ranks do not share alike.

    Raises:
        ValueError: one is not a multiple of `ranks`.
    """
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"{name} is {size}, expected a multiple of the {ranks} ranks")


def own(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter for `x`: of a DTensor this rank's part, if x is this rank's too."""
    if not any_sharded((parameter,), {}) or any_sharded((x,), {}):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    # what all ranks have has a part of its gradient on each
    places = [Partial() if p.is_replicate() else p for p in parameter.placements]
    part: Tensor = parameter.to_local(grad_placements=places)
    return part


def shared(x: Tensor, product: nn.Linear) -> Tensor:
    """`x`, which all ranks have, for several products with split weights: of one gradient."""
    weight = product.weight
    # what FSDP splits is whole where it is called
    if hasattr(product, "unshard") or not any_sharded((weight,), {}) or any_sharded((x,), {}):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(weight, DTensor)
    return DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)


class Mixer(Protocol):
    """The protocol of a module that mixes along time; its states have a type of its own."""

    def __call__(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor: ...

    def prefill(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """The result of a call, and the state from which `step` continues.

        Args:
            x: `[B, T, hidden]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences, none of them empty; then
                B = 1.

        Returns:
            The outputs `[B, T, hidden]`, and the state after the last token of every sequence.
        """
        ...

    def initial_state(self, batch: int) -> Any:
        """The state before the first token.

        Args:
            batch: number of sequences B.

        Returns:
            A state of the mixer's own type.
        """
        ...

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token of every sequence.

        Args:
            x: `[B, hidden]`.
            state: the state before it.

        Returns:
            The output `[B, hidden]`, and the state after it.
        """
        ...


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, in float32 (Zhang, Sennrich 2019).

    Args:
        size: length of the last axis.
        eps: added to the mean of squares.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=None, device=None))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The normalised vectors, times `silu(gate)` where a gate is given.

        Args:
            x: `[..., size]`, of any float dtype.
            gate: `[..., size]`.

        Returns:
            `[..., size]` in x's dtype.
        """
        weight = own(self.weight, x)
        # a compiler joins a norm without a gate to what is beside it
        if fused.serves(x) and not (gate is None and torch.compiler.is_compiling()):
            normed: Tensor = fused.rms_norm(x, weight, gate, self.eps)
            return normed
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * wide(weight)
        return (y if gate is None else y * F.silu(wide(gate))).to(x.dtype)


def positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence of every packed token and its position there, both `[T]`, without a sync.

    Raises:
        BadCuSeqlens: the boundaries are no tensor.
    """
    boundaries(cu_seqlens)
    t = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = token_sequences(cu_seqlens, tokens)
    return sequence, t - cu_seqlens[sequence]


def last_tokens(x: Tensor, count: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last tokens of every sequence, with zeros before the first.

    Args:
        x: `[B, T, ...]`.
        count: how many.
        cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.

    Returns:
        `[B, count, ...]`, or `[N, count, ...]`.
    """
    if cu_seqlens is None:
        short = max(count - x.shape[1], 0)
        return F.pad(x, (0, 0) * (x.dim() - 2) + (short, 0))[:, x.shape[1] + short - count :]
    index = cu_seqlens[1:, None] - torch.arange(
        count, 0, -1, dtype=cu_seqlens.dtype, device=x.device
    )
    found = x[0, index.clamp(min=0)]
    inside = (index >= cu_seqlens[:-1, None]).reshape(*index.shape, *[1] * (x.dim() - 2))
    return found.masked_fill(~inside, 0.0)


def causal_convolution(x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    """A causal depthwise convolution over time, in torch.

    Args:
        x: `[B, T, channels]`.
        weight: `[size, channels]`; the tap `weight[n]` is of the token n before.
        position: int `[T]` or `[B, T]`, of each token in its packed sequence, if packed.

    Returns:
        `[B, T, channels]`.
    """
    tokens, size = x.shape[1], weight.shape[0]
    padded = F.pad(x, (0, 0, size - 1, 0))
    y = x * weight[0]
    for back in range(1, size):
        start = size - 1 - back
        tap = padded[:, start : start + tokens] * weight[back]
        if position is not None:
            tap = tap.masked_fill((position < back).unsqueeze(-1), 0.0)
        y = y + tap
    return y


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time: each channel sees its last `size` tokens.

    Args:
        channels: number of channels, each with its own taps.
        size: number of taps; the last tap is the token itself.
        spans: channels of consecutive parts, and whether `activated` scales a part's vectors to
            unit length; together they have all channels.
    """

    spans: Tensor

    def __init__(
        self, channels: int, size: int = 4, spans: Sequence[tuple[int, bool]] = ()
    ) -> None:
        super().__init__()
        self.size = size
        self.set_spans(spans or [(channels, False)], torch.get_default_device())
        self.weight = nn.Parameter(torch.empty(size, channels, dtype=None, device=None))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def set_spans(self, spans: Sequence[tuple[int, bool]], device: torch.device) -> None:
        """Take the channels in such parts, of which this rank has all.

        Args:
            spans: as of the class.
            device: where the module is.
        """
        self._parts, table = tuple(spans), fused.span_table(spans)
        self.widest = max(width for _, width, _ in table)
        made = torch.tensor(table, dtype=torch.int32, device=device)
        self.register_buffer("spans", made, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShortConvolution:
        was_meta = self.spans.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.spans.is_meta:  # `to_empty` fills nothing, nor do state dicts
            self.set_spans(self._parts, self.spans.device)
        return self

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """The convolution of whole sequences.

        Args:
            x: `[B, T, channels]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1, and no token
                sees another sequence.
            group: the ranks over which the tokens are split in order, as of a call of an op; then
                x has this rank's tokens, and `cu_seqlens` counts those of all.

        Returns:
            `[B, T, channels]`.
        """
        if fused.serves(x):
            return self._fused(x, cu_seqlens, group, False)
        x, position, before = self._with_halo(x, cu_seqlens, group)
        return causal_convolution(x, own(self.weight, x).to(x.dtype), position)[:, before:]

    def activated(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
    ) -> Tensor:
        """On a GPU: `forward`, silu, and the spans scaled to unit length, as one kernel.

        Args:
            x: `[B, T, channels]`.
            cu_seqlens: int `[N + 1]`, as for `forward`.
            group: as for `forward`.

        Returns:
            `[B, T, channels]`.
        """
        return self._fused(x, cu_seqlens, group, True)

    def _fused(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        group: ProcessGroup | DeviceMesh | None,
        activate: bool,
    ) -> Tensor:
        x, position, before = self._with_halo(x, cu_seqlens, group)
        y: Tensor = fused.short_convolution(
            x, own(self.weight, x), self.spans, self.widest, position, activate, L2_EPS
        )
        return y[:, before:]

    def _with_halo(
        self, x: Tensor, cu_seqlens: Tensor | None, group: ProcessGroup | DeviceMesh | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """`x` behind the tokens before it on other ranks, their positions, and how many."""
        if group is None:
            return x, None if cu_seqlens is None else positions(cu_seqlens, x.shape[1])[1], 0
        before, position, halo = self.size - 1, None, across_ranks()
        counts = halo.counted(x, "a short convolution", cu_seqlens, group)
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(x.device, non_blocking=True)
            position = halo.sequences(bounds, counts, group)[1]
            position = position[len(position) - x.shape[1] :]
            position = F.pad(position, (before, 0))
        return halo.with_halo(x, before, group), position, before

    def last(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The cache after some tokens, from which `step` continues.

        Args:
            x: the inputs so far, `[B, T, channels]`.
            cu_seqlens: int `[N + 1]`, boundaries of N packed sequences; then B = 1.

        Returns:
            The last `size - 1` vectors of every sequence, `[B, size - 1, channels]` (B = N where
            they are packed); zeros before the first.
        """
        return last_tokens(x, self.size - 1, cu_seqlens)

    def step(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """One token, given the cache.

        Args:
            x: `[B, channels]`.
            cache: the last inputs, `[B, size - 1, channels]`.

        Returns:
            The output `[B, channels]` and the new cache.
        """
        window = torch.cat([cache, x[:, None]], 1)
        return (window * own(self.weight, x).to(x.dtype).flip(0)).sum(1), window[:, 1:]


def across_ranks() -> Any:
    from . import halo  # imports torch.distributed

    return halo
