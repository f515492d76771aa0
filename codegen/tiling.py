"""Decides a kernel: which tile is loaded, computed and stored when, with what mask and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import tiled
from .buffers import BufferId
from .chunk import Carried
from .config import Precision, Space, Tiles, dims_of
from .expressions import unaliased
from .gates import DECAYED
from .interface import Dtype, Signature, intermediate_dtype, segment_end
from .order import ordered, stored_early
from .padding import Padding, padding
from .phases import added_products, extents, phases
from .plan import Kernel, Loop
from .segments import Segments, Start
from .tile import (
    ALIASES,
    NUMBERS,
    TIMES,
    Axes,
    Axis,
    Tile,
    TileOp,
    gated_axis,
    summed_axes,
    topological,
)
from .verify import verify_tiled

# how the axes of a tile lie in registers, rows first: a scan keeps its state [V, K], split along V
_SCAN_ORDER = (Axis.V, Axis.I, Axis.J, Axis.K)
_PARALLEL_ORDER = (Axis.I, Axis.J, Axis.V, Axis.K)
_SOURCES = {
    TileOp.TOKEN: tiled.Source.TOKENS,
    TileOp.HEAD: tiled.Source.HEADS,
    TileOp.PARAM: tiled.Source.NUMBER,
}
_Statements = list[tiled.Statement]
_Phases = tuple[_Statements, _Statements, _Statements]  # before, in and after the loop


def tile(kernel: Kernel, signature: Signature, tiles: Tiles) -> tiled.TiledKernel:
    """`kernel`, decided for `signature` with `tiles`; InvalidIR for a fault of a pass."""
    if tiles.space is Space.MEMORY:
        signature = Signature(signature.dims, Dtype.FLOAT32, (), Precision.IEEE)
    decided = _Tiling(kernel, signature, tiles).kernel()
    if tiles.space is Space.REGISTERS and kernel.loop is not Loop.PARALLEL:
        decided = ordered(decided)
    verify_tiled(decided)
    return decided


class _Tiling:
    """The decisions for one kernel; statements are made in order, and remember what is clean."""

    def __init__(self, kernel: Kernel, signature: Signature, tiles: Tiles) -> None:
        self._kernel, self._signature = kernel, signature
        self._dims = dims_of(kernel, signature.dims)
        self._order, self._buffers = kernel.order, kernel.buffers
        self._is_scan = kernel.loop is not Loop.PARALLEL
        self._channels, self._extents = extents(kernel, self._dims, tiles)
        along = any(Axis.V in t.axes for t in self._order) and self._channels is not Axis.V
        self._v_parts = -(-self._dims.V // self._extents[Axis.V]) if along else 1
        self._cleaned: set[Tile] = set()
        self._in_memory = tiles.space is Space.MEMORY
        in_registers = _SCAN_ORDER if self._is_scan else _PARALLEL_ORDER
        self._layout: Axes = tuple(Axis) if self._in_memory else in_registers
        computed = {t.op for t in self._order if t not in self._buffers}
        split = not computed.isdisjoint((TileOp.DECAYED_DOT, TileOp.DECAYED_APPLY))
        self._block = min(tiles.block, tiles.chunk) if split else 0
        self._fused = {} if self._in_memory else added_products(kernel, self._channels)

    def kernel(self) -> tiled.TiledKernel:
        """All statements, in order."""
        statements = self._scan() if self._is_scan else self._parallel()
        before, inside, after = map(tuple, statements)
        low, precision = self._signature.dtype, self._signature.precision
        if low is not Dtype.FLOAT32 and precision is not Precision.IEEE:
            precision = Precision.TF32  # enough between roundings to 16 bits
        tokens = [t for t in self._order if t.op is TileOp.TOKEN]
        return tiled.TiledKernel(
            name=self._kernel.name,
            scan=self._kernel.loop,
            by_token=any(Axis.I not in t.axes for t in tokens),
            segments=self._kernel.segments,
            channels=self._channels,
            dims=self._dims,
            transposed=self._kernel.transposed,
            extents=self._extents,
            v_parts=self._v_parts,
            order=self._layout,
            precision=precision,
            block=self._block,
            pooled=self._kernel.pooled,
            before=before,
            inside=inside,
            after=after,
        )

    # ---- phases ----------------------------------------------------------------------------------

    def _parallel(self) -> _Phases:
        if self._in_memory:
            return [*self._run(self._order), *self._stores(self._order)], [], []
        before, during, after = phases(self._kernel, self._channels)
        if self._channels is None:
            everything = (*before, *during, *after)
            if any(_inverts(t) for t in everything):
                everything = self._inverses_last()
                whole = (*self._run(everything), *self._stores(everything))
                return list(stored_early(whole)), [], []
            return [*self._run(everything), *self._stores(self._order)], [], []
        summed = [t for t in during if t not in self._buffers and self._channels in summed_axes(t)]
        first = [*self._run(before), *map(tiled.Zero, summed)]
        inside = [*self._run(during, frozenset(summed))]
        inside += self._stores([t for t in during if t not in summed])
        last = [*self._run(after), *self._stores([*before, *summed, *after])]
        return first, inside, last

    def _inverses_last(self) -> tuple[Tile, ...]:
        """All tiles, what needs no inverse first: one takes the registers of several tiles."""
        stored = frozenset(self._buffers)
        roots = [unaliased(t) for _, t in self._kernel.stores]
        roots.sort(key=lambda root: any(map(_inverts, topological(root, stop=stored))))
        return tuple(topological(*roots, stop=stored))

    def _scan(self) -> _Phases:
        carried, segments = self._kernel.carried, self._kernel.segments
        starts = [c.start for c in carried]
        before: _Statements = [self._begin(s) for s in starts]
        if segments is not None and not segments.ends:
            before.append(self._arrive(segments))
        same = (TileOp.HEAD, TileOp.PARAM, *NUMBERS)  # from chunk to chunk
        before += self._run(t for t in self._order if t.op in same)
        inside = [*self._stores(starts), *self._run(t for t in self._order if t.op not in same)]
        inside += self._stores([t for t in self._order if t not in starts])
        inside.append(tiled.Advance(tuple((c.start, self._end(c)) for c in carried)))
        ends = segments is not None and segments.ends
        finished = carried if self._kernel.last or ends else ()
        return before, inside, [self._finish(c) for c in finished]

    # ---- what a scan carries ---------------------------------------------------------------------

    def _begin(self, start: Tile) -> tiled.Begin:
        segments = self._kernel.segments
        identity = segments is not None and segments.start is Start.IDENTITY
        from_call = segments is None or not segments.ends
        return tiled.Begin(start, self._mask(start.axes), from_call, identity)

    def _arrive(self, segments: Segments) -> tiled.Arrive:
        passed = []
        for c, p in zip(self._kernel.carried, segments.transitions, strict=True):
            by = tiled.Passed(c.start, segment_end(c).name, self._mask(c.start.axes))
            if p is not None:
                factor, axes = segment_end(p.carried).name, p.carried.start.axes
                by = by._replace(factor=factor, axes=axes, is_matrix=p.matrix)
            passed.append(by)
        # in all of float32's digits: what rounding takes here, every segment after takes again
        return tiled.Arrive(tuple(passed), self._signature.precision)

    def _end(self, carried: Carried) -> tiled.Use:
        """What a carry ends a chunk as: zero beyond the last channel, like what is loaded."""
        value = unaliased(carried.end)
        clean = tuple(a for a in value.axes if self._padding(value, a) is not Padding.ZERO)
        return tiled.Use(value, value.axes, clean)

    def _finish(self, carried: Carried) -> tiled.Finish:
        start, segments = carried.start, self._kernel.segments
        once = Axis.V not in start.axes and self._v_parts > 1
        ends = segments is not None and segments.ends
        end = segment_end(carried).name if ends else None
        last = segments is not None and not ends
        return tiled.Finish(start, end, self._mask(start.axes), once, last)

    # ---- statements ------------------------------------------------------------------------------

    def _run(self, tiles: Iterable[Tile], summed: frozenset[Tile] = frozenset()) -> _Statements:
        """Loads and computations of `tiles`, in order; those of `summed` add up over the loop."""
        made: _Statements = []
        fused = set(self._fused.values())
        for t in tiles:
            if t in self._buffers or t.op in _SOURCES:
                made.append(self._load(t))
            elif t.args and t.op not in ALIASES and t not in fused:
                made += self._compute(t, adds=t in summed)
        return made

    def _load(self, t: Tile) -> tiled.Load:
        mask = self._mask(t.axes)
        if t in self._buffers:
            dtype = intermediate_dtype(t, self._signature.dtype)
            return tiled.Load(t, tiled.Source.BUFFER, self._buffers[t], dtype, mask)
        name, source = str(t.attrs[0]), _SOURCES[t.op]
        dtype = self._signature.of(name) if source is tiled.Source.TOKENS else Dtype.FLOAT32
        return tiled.Load(t, source, name, dtype, mask)

    def _mask(self, axes: Axes) -> Axes:
        """The axes along which a tile may have entries that do not exist in memory."""
        time = [a for a in axes if a in TIMES][:1]
        return tuple(a for a in axes if a in time or self._is_padded(a))

    def _is_padded(self, axis: Axis) -> bool:
        return tiled.is_padded(self._dims, self._extents, axis)

    def _stores(self, tiles: Iterable[Tile]) -> _Statements:
        """Stores of those buffers whose value is among `tiles`."""
        present = {unaliased(t) for t in tiles}
        return [self._store(n, t) for n, t in self._kernel.stores if unaliased(t) in present]

    def _store(self, name: BufferId, t: Tile) -> tiled.Store:
        once = self._v_parts > 1 and Axis.V not in t.axes
        return tiled.Store(name, _use(t), t.axes, self._mask(t.axes), once)

    def _compute(self, t: Tile, *, adds: bool) -> Iterator[tiled.Statement]:
        if t.op is TileOp.DOT or t in self._fused:
            yield from self._product(t, adds=adds)
            return
        clean = (gated_axis(t),) if t.op in DECAYED else summed_axes(t)
        dtype = Dtype.FLOAT32
        made = t.op in (TileOp.DECAYED_DOT, TileOp.CUMSUM)  # from products
        if made and self._signature.dtype is Dtype.BFLOAT16:
            dtype = Dtype.BFLOAT16  # decayed factors underflow in float16 (mathematics, numerics 7)
        yield tiled.Compute(t, tuple(self._cleaned_use(a, clean) for a in t.args), dtype, adds)

    def _cleaned_use(self, x: Tile, axes: Axes) -> tiled.Use:
        along = (a for a in axes if a in x.axes and a not in TIMES)
        needed = (a for a in along if self._padding(x, a) is not Padding.ZERO)
        return _use(x)._replace(clean=tuple(needed))

    def _product(self, t: Tile, *, adds: bool) -> Iterator[tiled.Statement]:
        """A product, and before it what has to be cleaned for all that follows.

        Zeros of one factor are enough in the padding of the axis that is summed, where those of
        the other are finite.
        """
        product, start = self._fused.get(t, t), None
        if t in self._fused:
            (other,) = (a for a in t.args if a != product)
            start = _use(other)
        x, y = product.args
        over = product.attr(Axis)
        rows = min(product.axes, key=self._layout.index)
        if rows not in x.axes:
            x, y = y, x
        left, right = _use(x), _use(y)
        if over not in TIMES:
            of_x, of_y = self._padding(x, over), self._padding(y, over)
            if Padding.ZERO not in (of_x, of_y) or Padding.UNSAFE in (of_x, of_y):
                if of_y is Padding.UNSAFE and self._is_padded(over):
                    yield tiled.Clean(right.value, over)
                    self._cleaned.add(right.value)
                if of_x is not Padding.ZERO:
                    left = left._replace(clean=(over,))
        yield tiled.Product(t, left, right, over, self._signature.dtype, start, adds)

    def _padding(self, x: Tile, axis: Axis) -> Padding:
        """As `padding`; what was loaded from a buffer, or cleaned, has zeros there."""
        y = unaliased(x)
        if axis in y.axes and (y in self._buffers or y in self._cleaned):
            return Padding.ZERO
        return padding(x, axis)


def _inverts(x: Tile) -> bool:
    return x.op is TileOp.INVERSE


def _use(x: Tile) -> tiled.Use:
    """`x` as it is seen, its axes by the names that they have there, constant ones left out."""
    while x.op is TileOp.EXPAND:
        (x,) = x.args
    return tiled.Use(unaliased(x), x.axes)
