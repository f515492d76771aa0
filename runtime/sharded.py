"""Calls on DTensors: sequences of the batch and heads are split over a mesh, nothing else is.

A recurrence is independent of other sequences and other value heads, so each rank calls the op on
its own of them, and no rank waits for another. Per axis of the mesh, what most operands are split
by decides; operands that lie otherwise are moved first. Tokens are split by `group` instead
(runtime/parallel.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..dsl import errors
from ..dsl.ir import Per
from ..dsl.normal_form import Operand

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration


class _Split(Enum):
    """What an axis of a mesh splits."""

    SEQUENCES = "sequences of the batch"
    HEADS = "value heads, and the heads of Keys that serve them"
    NOTHING = "every rank has all"


@dataclass(frozen=True, slots=True)
class _Axes:
    """The axes of a tensor that can be split, None where it has none, and its number of heads."""

    sequences: int | None
    heads: int
    count: int


def call(
    op: Callable[..., Any],
    declaration: Declaration,
    args: Sequence[object],
    named: Mapping[str, object],
    states: Tensor | Sequence[Tensor | None] | None,
    cu_seqlens: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """What `op` returns, as DTensors split like the operands.

    Raises:
        BadLayout: an operand or state is a plain tensor, or on another mesh than the others.
    """
    known = {x.name: x for x in declaration.operands}
    given = {**dict(zip(known, args, strict=False)), **named}
    operands = {n: _on_a_mesh(n, x) for n, x in given.items() if isinstance(x, Tensor)}
    mesh = next(iter(operands.values())).device_mesh
    listed = (states,) if isinstance(states, Tensor) else states or ()
    starts = [x if x is None else _on_a_mesh("initial_state", x) for x in listed]
    for n, x in (*operands.items(), *(("initial_state", x) for x in starts if x is not None)):
        if x.device_mesh != mesh:
            raise errors.BadLayout(n, f"on {x.device_mesh}", help=f"others are on {mesh}")
    axes = {n: _axes(known[n], x) for n, x in operands.items() if n in known}
    splits = _splits(mesh, operands, axes, packed=cu_seqlens is not None)

    def local(name: str, x: object) -> object:
        if name in axes:
            return _local(operands[name], axes[name], splits)
        return x.to_local() if isinstance(x, DTensor) else x  # for the op to refuse

    first = [None if x is None else _local(x, _Axes(0, 1, x.shape[1]), splits) for x in starts]
    if isinstance(cu_seqlens, DTensor):
        cu_seqlens = cu_seqlens.full_tensor()
    o, finals = op(
        *(local(n, x) for n, x in zip(known, args, strict=False)),
        *(local("", x) for x in args[len(known) :]),
        initial_state=first[0] if isinstance(states, Tensor) else (first or None),
        cu_seqlens=cu_seqlens,
        **{n: local(n, x) for n, x in named.items()},
        **options,
    )
    return _joined(o, mesh, splits, 2), _joined(finals, mesh, splits, 1)


def _on_a_mesh(name: str, x: Tensor) -> DTensor:
    if not isinstance(x, DTensor):
        wanted = "distribute_tensor(x, mesh, [Replicate()]) makes one"
        raise errors.BadLayout(name, "a plain tensor beside DTensors", help=wanted)
    return x


def _axes(x: Operand, value: DTensor) -> _Axes:
    heads = value.ndim - 1 - len(x.kind.axes)
    count = value.shape[heads] if heads >= 0 else 1
    return _Axes(0 if x.per is Per.TOKEN else None, heads, count)


def _splits(
    mesh: DeviceMesh,
    operands: Mapping[str, DTensor],
    axes: Mapping[str, _Axes],
    *,
    packed: bool,
) -> list[_Split]:
    """What each axis of the mesh splits: what most numbers of operands are split by, if it can."""
    tokens = {n: a for n, a in axes.items() if a.sequences is not None}
    parts = {_Split.SEQUENCES: 1, _Split.HEADS: 1}
    found = []
    for n in range(mesh.ndim):
        votes = dict.fromkeys(parts, 0)
        for name, a in tokens.items():
            x = operands[name]
            place = x.placements[n]
            at = place.dim % x.ndim if isinstance(place, Shard) else None
            votes[_Split.SEQUENCES] += x.numel() * (at == a.sequences)
            votes[_Split.HEADS] += x.numel() * (at == a.heads)
        best = max(votes, key=lambda s: votes[s])
        ranks = parts[best] * mesh.size(n)
        if best is _Split.HEADS:
            fits = all(a.count % ranks == 0 or a.count == 1 for a in axes.values())
            fits = fits and max(a.count for a in axes.values()) % ranks == 0
        else:
            fits = not packed and all(operands[name].shape[0] % ranks == 0 for name in tokens)
        if votes[best] and fits:
            parts[best] = ranks
            found.append(best)
        else:
            found.append(_Split.NOTHING)
    return found


def _local(x: DTensor, axes: _Axes, splits: Sequence[_Split]) -> Tensor:
    """This rank's part; what several ranks have the whole of has a part of its gradient on each."""
    places: list[Placement] = []
    of_gradient: list[Placement] = []
    for split in splits:
        if split is _Split.NOTHING:
            own: Placement = Replicate()
        elif split is _Split.SEQUENCES:
            own = Replicate() if axes.sequences is None else Shard(axes.sequences)
        else:  # one head of Keys may serve all value heads
            own = Replicate() if axes.count == 1 else Shard(axes.heads)
        places.append(own)
        shared = split is not _Split.NOTHING and own.is_replicate()
        of_gradient.append(Partial() if shared else own)
    part: Tensor = x.redistribute(placements=places).to_local(grad_placements=of_gradient)
    return part


def _joined(made: Any, mesh: DeviceMesh, splits: Sequence[_Split], heads: int) -> Any:
    """What ranks return, as one tensor that is split; of tuples each."""
    if isinstance(made, tuple):
        return tuple(_joined(x, mesh, splits, heads) for x in made)
    if made is None:
        return None
    at = {_Split.SEQUENCES: 0, _Split.HEADS: heads}
    shape = list(made.shape)
    for n, split in enumerate(splits):
        if split in at:
            shape[at[split]] *= mesh.size(n)
    return DTensor.from_local(
        made,
        mesh,
        [Replicate() if split is _Split.NOTHING else Shard(at[split]) for split in splits],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(math.prod(shape[n + 1 :]) for n in range(len(shape))),
    )
