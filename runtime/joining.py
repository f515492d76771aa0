"""What ranks of a group exchange of their parts of sequences, and when within a call.

The state after a part is affine in the state before it, S' = A S + B (equation 9 of the
mathematics). A `Map` is A and B of a part. A run that is joined computes it, calls `Join.meet`,
which exchanges the maps of all ranks and writes the first states, and only then reads those.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor | None, ...]


class Map(NamedTuple):
    """What becomes of states over a stretch: `ends` from zero, and a factor of the state before it.

    A factor is a matrix `[N,HV,K,K]` (`[N,HV,V,V]` from the right, if transposed), or scales
    entries; None is 1. In a backward the ends are gradients of the states before the stretch, and
    the factors the same: their transposes apply.
    """

    ends: tuple[Tensor, ...]
    factors: Factors


@dataclass(slots=True)
class SegmentEnds:
    """What a forward's segments make of states, kept for the backward of the same call.

    Segments are as many as fill a GPU, so that this does not grow with the tokens.

    Attributes:
        rows: of a segment.
        tensors: by what the engine knows them by.
    """

    rows: int = 0
    tensors: dict[Hashable, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Join:
    """What a run of one rank needs of the others.

    Attributes:
        sequences: those of the rank whose map others want; all, of a batch that is not packed.
        bounds: boundaries of the rank's packed sequences.
        meet: takes the map of these sequences, and writes first states (of a backward, gradients of
            last ones) into the tensors that the run was given for them.
        ends: of a forward empty, for its run to fill; of a backward what that has left.
    """

    sequences: slice
    bounds: tuple[int, ...] | None
    meet: Callable[[Map], None]
    ends: SegmentEnds


def composed(matrices: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of parts that follow one another: `[n,parts,...,K,K]` and `[n,parts,...,K,V]`.

    Neighbours are joined two by two, all at once, in float64: a rounding here is taken again by
    every part that follows, and no setting of torch's makes float64 coarser.
    """
    keys = matrices.shape[-1]
    both = torch.cat((matrices, ends), -1).double()
    while both.shape[1] > 1:
        first, second = both[:, 0:-1:2], both[:, 1::2]
        made = second[..., :keys] @ first
        made[..., keys:] += second[..., keys:]
        both = torch.cat((made, both[:, -1:]), 1) if both.shape[1] % 2 else made
    return both[:, 0, ..., :keys], both[:, 0, ..., keys:]


def faded(logs: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same of parts that scale states by e^logs: `[n,parts,...]`, as long as ends or 1."""
    total = logs.flip(1).cumsum(1).flip(1)
    after = torch.cat((total[:, 1:], torch.zeros_like(total[:, :1])), 1)
    return total[:, 0].exp(), (after.exp() * ends).sum(1)
