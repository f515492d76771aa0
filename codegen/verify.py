"""What passes promise, as tables: a rule for each op of TileIR, one for each statement of a kernel.

A rule says what is wrong, or nothing. Programs are walked after each pass, in production: a fault
of a pass is refused by name, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..dsl.errors import InvalidIR
from ..dsl.ir import Op
from . import tiled
from .chunk import ChunkProgram
from .differentiate import Adjoint
from .gates import DECAYED
from .padding import Padding, padding
from .plan import Kernel, Loop
from .tile import (
    LEAVES,
    NUMBERS,
    SQUARE,
    TIMES,
    Axes,
    Axis,
    Tile,
    TileOp,
    axes_of,
    gated_axis,
    renamed,
    summed_axes,
    topological,
)

# ---- TileIR --------------------------------------------------------------------------------------


def verify_tiles(part: ChunkProgram | Adjoint | Kernel) -> None:
    """Raises InvalidIR unless every tile of a chunk or kernel is one that its op can make."""
    named = part.stores if isinstance(part, Kernel) else part.outputs
    roots = [*(t for _, t in named), *(c.end for c in part.carried)]
    for t in topological(*roots):
        if len(t.axes) > 2:
            raise InvalidIR(f"a tile of {len(t.axes)} axes, which no target holds", _shown(t))
        if len(t.args) != _arity(t) or not _TILES[t.op](t, *t.args):
            raise InvalidIR(f"no {t.op.name} has these axes", _shown(t))


def _shown(t: Tile) -> str:
    def axes(x: Tile) -> str:
        return f"[{','.join(a.value for a in x.axes)}]"

    return f"{t.hint or 'x'}{axes(t)} = {t.op.name}{t.attrs} of {' '.join(map(axes, t.args))}"


def _arity(t: Tile) -> int:
    if t.op is TileOp.MAP:
        return t.attr(Op).arity
    fixed = {TileOp.DOT: 2, TileOp.PRODUCT: 2, TileOp.DECAYED_DOT: 5, TileOp.DECAYED_APPLY: 5}
    fixed |= {TileOp.SUBSTITUTE: 3}
    fixed |= {TileOp.DECAYED_CROSSING: 8, **dict.fromkeys((*LEAVES, *NUMBERS), 0)}
    return fixed.get(t.op, 1)


def _product(t: Tile, x: Tile, y: Tile) -> bool:
    """The axes of two matrices that share the one that is summed, and no other."""
    (over,) = t.attrs
    both = set(x.axes) & set(y.axes)
    matrices = len(x.axes) == len(y.axes) == 2 and both == {over}
    return matrices and set(t.axes) == (set(x.axes) | set(y.axes)) - both


def _gated(t: Tile, *args: Tile) -> bool:
    """Of an op under a vector gate: P of row i, Q of row j, and the log-decay of row i."""
    p, q, g = (x.axes for x in args[-3:])
    axis = gated_axis(t)
    sides = {
        TileOp.DECAYED_DOT: (SQUARE,),
        TileOp.DECAYED_APPLY: ((Axis.I, axis), (Axis.J, axis)),
        TileOp.DECAYED_CROSSING: ((Axis.I, axis),),
    }
    return (
        axis in (Axis.K, Axis.V)
        and p == g == (Axis.I, axis)
        and q == (Axis.J, axis)
        and (t.axes in sides[t.op])
    )


_TILES: Mapping[TileOp, Callable[..., bool]] = {
    TileOp.TOKEN: lambda t: Axis.J not in t.axes,
    TileOp.HEAD: lambda t: not set(TIMES) & set(t.axes),
    TileOp.CARRY: lambda t: not set(TIMES) & set(t.axes),
    TileOp.PARAM: lambda t: not t.axes,
    TileOp.CONST: lambda t: not t.axes,
    TileOp.EXTENT: lambda t: not t.axes,
    TileOp.MAP: lambda t, *args: t.axes == axes_of(*(a for x in args for a in x.axes)),
    TileOp.STEP: lambda t, x: t.axes == x.axes,
    TileOp.ROUND: lambda t, x: t.axes == x.axes,
    TileOp.FLOOR: lambda t, x: t.axes == x.axes,
    TileOp.FLUSH: lambda t, x: t.axes == x.axes,
    TileOp.EXPAND: lambda t, x: set(t.axes) > set(x.axes),
    TileOp.RENAME: lambda t, x: (
        len(set(x.axes) & set(TIMES)) == 1 and t.axes == renamed(x.axes, t.attr(Axis))
    ),
    TileOp.ROWS: lambda t, x: t.axes == axes_of(Axis.I, *x.axes),
    TileOp.PHASE: lambda t, x: t.axes == axes_of(Axis.I, *x.axes),
    TileOp.MASK: lambda t, x: t.axes == axes_of(*SQUARE, *x.axes),
    TileOp.SUM: lambda t, x: (
        set(t.attrs[0]) | set(t.axes) == set(x.axes) and not set(t.attrs[0]) & set(t.axes)
    ),
    TileOp.DOT: _product,
    TileOp.PRODUCT: lambda t, x, y: t.axes == x.axes == y.axes == SQUARE,
    TileOp.CUMSUM: lambda t, x: t.axes == x.axes and Axis.I in t.axes,
    TileOp.DECAY: lambda t, g: t.axes == SQUARE and g.axes == (Axis.I,),
    TileOp.INVERSE: lambda t, x: t.axes == x.axes == SQUARE,
    TileOp.SUBSTITUTE: lambda t, lower, b, x: (
        lower.axes == SQUARE and t.axes == b.axes == x.axes == (Axis.I, Axis.V)
    ),
    **dict.fromkeys(DECAYED, _gated),
}


# ---- tiled kernels -------------------------------------------------------------------------------


def verify_tiled(kernel: tiled.TiledKernel) -> None:
    """Raises InvalidIR unless every statement finds its values, and loses none of their entries."""
    checked = _Checked(kernel)
    for inside, phase in ((False, kernel.before), (True, kernel.inside), (False, kernel.after)):
        for s in phase:
            wrong = checked.wrong(s, inside=inside)
            if wrong:
                raise InvalidIR(f"{kernel.name}: {type(s).__name__} {wrong}")
        if inside and kernel.channels is not None:  # parts, of which one is left
            checked.known = {t for t in checked.known if kernel.channels not in t.axes}
    carries = [s.value for s in kernel.statements if isinstance(s, tiled.Begin)]
    ends = [s.value for s in kernel.statements if isinstance(s, tiled.Finish)]
    next_ = [
        start for s in kernel.statements if isinstance(s, tiled.Advance) for start, _ in s.ends
    ]
    if carries != next_ or ends not in (carries, []):
        raise InvalidIR(f"{kernel.name}: carries that do not begin, advance and finish once")


@dataclass(slots=True)
class _Checked:
    """What is known of values so far: defined, added up in the loop, zero in their padding."""

    kernel: tiled.TiledKernel
    known: set[Tile] = field(default_factory=set)
    sums: set[Tile] = field(default_factory=set)
    zero: set[Tile] = field(default_factory=set)

    def wrong(self, s: tiled.Statement, *, inside: bool) -> str:
        """What is wrong with the next statement; empty if nothing is."""
        for use in tiled.uses(s):
            if use.value not in self.known and use.value.op not in NUMBERS:
                return f"uses {_shown(use.value)}, which is not there"
            if len(use.axes) != len(use.value.axes):
                return f"sees {_shown(use.value)} over {use.axes}"
        return _STATEMENTS[type(s)](self, s, inside)

    def define(self, t: Tile, adds: bool = False) -> str:
        if adds != (t in self.sums):
            return f"adds to {_shown(t)} or does not, unlike what was begun"
        if t in self.known and not adds:
            return f"defines {_shown(t)} again"
        self.known.add(t)
        return ""

    def masks(self, axes: Axes, mask: Axes) -> str:
        """Entries that may not exist: the rows of a tile, and its channels where it is wider."""
        rows = [a for a in axes if a in TIMES][:1]
        needed = {a for a in axes if a in rows or self.kernel.is_padded(a)}
        return "" if needed == set(mask) else f"of {axes} masks {mask}"

    def fetch(self, s: tiled.Load | tiled.Begin, inside: bool) -> str:
        self.zero.add(s.value)
        return self.masks(s.value.axes, s.mask) or self.define(s.value)

    def start(self, s: tiled.Zero, inside: bool) -> str:
        self.sums.add(s.value)
        self.known.add(s.value)
        return ""

    def compute(self, s: tiled.Compute, inside: bool) -> str:
        if s.adds and not inside:
            return "adds outside the loop"
        summed = tuple(a for a in summed_axes(s.value) if a not in TIMES)
        for axis in (gated_axis(s.value),) if s.value.op in DECAYED else summed:
            for use in s.args if self.kernel.is_padded(axis) else ():
                if axis in use.axes and self.padding(use, axis) is not Padding.ZERO:
                    return f"sums the padding of {_shown(use.value)}"
        return self.whole(summed, s.adds) or self.define(s.value, s.adds)

    def product(self, s: tiled.Product, inside: bool) -> str:
        rows = min(s.value.axes, key=self.kernel.order.index)
        if s.over in s.value.axes or not all(s.over in u.axes for u in (s.left, s.right)):
            return f"sums {_shown(s.value)} over {s.over}"
        if rows not in s.left.axes:
            return f"has the rows of {_shown(s.value)} on the right"
        if self.kernel.is_padded(s.over):
            paddings = [self.padding(u, s.over) for u in (s.left, s.right)]
            if Padding.ZERO not in paddings or Padding.UNSAFE in paddings:
                return f"sums the padding of {_shown(s.value)}"
        return self.whole((s.over,), s.adds) or self.define(s.value, s.adds)

    def whole(self, axes: Axes, adds: bool) -> str:
        """A sum over channels takes all of them: here, or turn by turn."""
        if Axis.V in axes and self.kernel.v_parts > 1:
            return "sums a part of V"
        return "sums one tile of several" if (self.kernel.channels in axes) != adds else ""

    def padding(self, use: tiled.Use, axis: Axis) -> Padding:
        known = axis in use.clean or (axis in use.axes and use.value in self.zero)
        return Padding.ZERO if known else padding(use.value, axis)

    def clean(self, s: tiled.Clean, inside: bool) -> str:
        self.zero.add(s.value)
        return "" if s.value in self.known else f"of {_shown(s.value)}, which is not there"

    def store(self, s: tiled.Store, inside: bool) -> str:
        if s.once != (self.kernel.v_parts > 1 and Axis.V not in s.axes):
            return f"to {s.buffer} by all parts of V, or too few"
        return self.masks(s.axes, s.mask)

    def arrive(self, s: tiled.Arrive, inside: bool) -> str:
        return "" if all(c.value in self.known for c in s.carries) else "before all have begun"

    def advance(self, s: tiled.Advance, inside: bool) -> str:
        return "" if inside and self.kernel.scan is not Loop.PARALLEL else "outside of the scan"

    def finish(self, s: tiled.Finish, inside: bool) -> str:
        return self.masks(s.value.axes, s.mask)


_STATEMENTS: Mapping[type, Callable[[_Checked, Any, bool], str]] = {
    tiled.Load: _Checked.fetch,
    tiled.Zero: _Checked.start,
    tiled.Compute: _Checked.compute,
    tiled.Product: _Checked.product,
    tiled.Clean: _Checked.clean,
    tiled.Store: _Checked.store,
    tiled.Begin: _Checked.fetch,
    tiled.Arrive: _Checked.arrive,
    tiled.Advance: _Checked.advance,
    tiled.Finish: _Checked.finish,
}
