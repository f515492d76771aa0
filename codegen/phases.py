"""How a kernel lies around its loop: extents of tiles, what is computed when, what is added up."""

from __future__ import annotations

from collections import Counter

from ..dsl.ir import Op
from .config import Dims, Space, Tiles, padded
from .expressions import unaliased
from .plan import Kernel, Loop
from .tile import ALIASES, Axis, Tile, TileOp, summed_axes, topological


def in_registers(dims: Dims, tiles: Tiles) -> dict[Axis, int]:
    """The extents of tiles in registers: all of K, of V what is asked for, both padded."""
    V = padded(dims.V)
    return {
        Axis.I: tiles.chunk,
        Axis.J: tiles.chunk,
        Axis.K: padded(dims.K),
        Axis.V: min(tiles.v, V),
    }


def extents(kernel: Kernel, dims: Dims, tiles: Tiles) -> tuple[Axis | None, dict[Axis, int]]:
    """The channel axis that is taken tile by tile in a loop, if any, and the extents of tiles."""
    order, buffers = kernel.order, kernel.buffers
    loops = kernel.loop is Loop.PARALLEL and tiles.space is Space.REGISTERS
    found, whole = in_registers(dims, tiles), padded(dims.V)
    if tiles.space is Space.MEMORY:  # a part of V per program, where parts are alike
        whole = dims.V
        found |= {Axis.K: dims.K, Axis.V: dims.V if dims.V % tiles.v else tiles.v}
    sums_v = any(t not in buffers and Axis.V in summed_axes(t) for t in order)
    if kernel.shares_vectors or (sums_v and not (loops and not _varies_after_sum(kernel, Axis.V))):
        # a sum over the value axis feeds what varies along it; or a program would read what another
        # has written
        found[Axis.V] = whole
    channels = Axis.V if sums_v and found[Axis.V] < dims.V else None
    uses_v = any(Axis.V in t.axes for t in order)
    if channels is None and loops and not uses_v and not _varies_after_sum(kernel, Axis.K):
        found[Axis.K] = min(tiles.k or found[Axis.K], found[Axis.K])
        channels = Axis.K if found[Axis.K] < dims.K else None
    return channels, found


def _varies_after_sum(kernel: Kernel, axis: Axis) -> bool:
    """Whether something along `axis` needs a sum over `axis`: then it cannot be tiled."""
    after: set[Tile] = set()
    buffers = kernel.buffers
    for t in kernel.order:
        if t not in buffers and (axis in summed_axes(t) or any(a in after for a in t.args)):
            after.add(t)
            if axis in t.axes:
                return True
    return False


def phases(kernel: Kernel, channels: Axis | None) -> tuple[list[Tile], list[Tile], list[Tile]]:
    """The tiles to compute before, in and after the loop over `channels`.

    Each as late as possible, so that little stays in registers.
    """
    axis, buffers = channels or Axis.V, kernel.buffers

    def inputs(t: Tile) -> tuple[Tile, ...]:
        return () if t in buffers else t.args

    def is_sum(t: Tile) -> bool:
        return t not in buffers and axis in summed_axes(t)

    late: set[Tile] = set()
    along: set[Tile] = set()
    for t in kernel.order:
        if any(a in late or is_sum(a) for a in inputs(t)):
            late.add(t)
        elif axis in t.axes or is_sum(t):
            along.add(t)
    stop = frozenset(buffers)
    needed = {a for t in along for a in topological(*inputs(t), stop=stop)}
    rest = [t for t in kernel.order if t not in along]
    return (
        [t for t in rest if t in needed],
        [t for t in kernel.order if t in along],
        [t for t in rest if t not in needed],
    )


def added_products(kernel: Kernel, channels: Axis | None) -> dict[Tile, Tile]:
    """Sums, and the product in each that is used nowhere else: it is added to the other part.

    `channels`: the axis that a loop runs over; a product that sums over it is added up there.
    """
    buffers = kernel.buffers
    computed = [t for t in kernel.order if t not in buffers and t.args]
    users: Counter[Tile] = Counter()
    for t in computed:
        if t.op not in ALIASES:
            users.update(unaliased(a) for a in t.args)
    users.update(unaliased(t) for _, t in kernel.stores)
    users.update(unaliased(c.end) for c in kernel.carried)

    def fits(x: Tile, other: Tile, t: Tile) -> bool:
        if x.op is not TileOp.DOT or x in buffers or users[x] != 1 or unaliased(other) in buffers:
            return False
        looped = channels is not None and channels in summed_axes(x)
        return not looped and x.axes == t.axes == other.axes

    found = {}
    for t in computed:
        if t.is_map(Op.ADD):
            for x, other in (t.args[::-1], t.args):
                if t not in found and fits(x, other, t):
                    found[t] = x
    return found
