"""The state that comes to each rank from those before it: a scan of their maps over the ranks.

Maps of ranks that follow one another compose (equation 9 of the mathematics), so that distances
double: after n rounds a rank knows what 2^(n - 1) ranks before it make of a state (Hillis, Steele
1986). A rank receives at most 1 + log2(R) maps, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .joining import Map

Tensors = tuple[Tensor, ...]


def scanned(
    group: dist.ProcessGroup,
    own: Map,
    arrives: Sequence[bool],
    spans: Sequence[bool],
    after: Callable[[Map, Map], Map],
    *,
    reverse: bool = False,
) -> Tensors:
    """The states that come to this rank; empty if none do.

    Args:
        group: the ranks; `reverse`: from the last to the first.
        own: the map of this rank's stretch that goes on on the next. Its factors are of the right
            shape also where nobody needs them.
        arrives: whether states come to a rank, by rank.
        spans: whether a rank's stretch began before it: a state passes by its map. Those of other
            ranks have a first state of their own in their ends.
        after: `(second, first)`, the map of two stretches.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    way = -1 if reverse else 1
    at = ranks - 1 - rank if reverse else rank
    arrives, spans = arrives[::way], spans[::way]

    def passes(begin: int, end: int) -> bool:
        """Whether a state passes all ranks from `begin` on, before `end`."""
        return all(spans[max(begin, 0) : end])

    def wants(n: int, distance: int) -> bool:
        """Whether rank n needs what the rank at that distance knows by then."""
        if distance == 0:  # the neighbour's own map
            return 0 < n < ranks and arrives[n]
        return distance < n < ranks and arrives[n] and passes(n - distance, n)

    known: Map | None = None
    rounds = [0, *(1 << n for n in range(max(ranks - 2, 0).bit_length()))]
    for d in rounds:
        mine, reach = (known, d) if d else (own, 1)
        given = taken = None
        if wants(at + reach, d):
            assert mine is not None
            given = _flat(mine, with_factors=passes(at - d, at) if d else spans[at])
        moving = False
        if wants(at, d):
            moving = passes(at - 2 * d, at - d) if d else spans[at - 1]
            taken = torch.empty_like(_flat(own, with_factors=moving))
        swap(group, given, way * reach, taken)
        if taken is not None:
            first = _unflat(taken, own, with_factors=moving)
            known = first if known is None else after(known, first)
    return () if known is None else known.ends


def swap(group: dist.ProcessGroup, given: Tensor | None, to: int, taken: Tensor | None) -> None:
    """Send `given` to the rank that is `to` ranks on, and receive `taken` from the other side."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    for send, x, peer in ((dist.isend, given, rank + to), (dist.irecv, taken, rank - to)):
        if x is not None and 0 <= peer < ranks:
            operations.append(dist.P2POp(send, x, dist.get_global_rank(group, peer), group))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def _flat(x: Map, *, with_factors: bool) -> Tensor:
    return torch.cat([t.reshape(-1) for t in _tensors(x, with_factors=with_factors)])


def _tensors(x: Map, *, with_factors: bool) -> list[Tensor]:
    return [*x.ends, *(f for f in x.factors if with_factors and f is not None)]


def _unflat(flat: Tensor, like: Map, *, with_factors: bool) -> Map:
    shapes = _tensors(like, with_factors=with_factors)
    parts = flat.split([x.numel() for x in shapes])
    found = iter([part.view(x.shape) for part, x in zip(parts, shapes, strict=True)])
    ends = tuple(next(found) for _ in like.ends)
    factors = (None if f is None or not with_factors else next(found) for f in like.factors)
    return Map(ends, tuple(factors))
