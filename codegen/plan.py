"""Planning as loop fission: the kernels that compute a chunk, and the tiles that each stores.

A kernel is a set of tiles to store. It reads what earlier kernels stored and computes the rest
itself; so any assignment is right, and a plan only chooses the tiles that are worth storing.
Legality is reachability: tiles that do not depend on the carry may be hoisted into a kernel
parallel over chunks (prep); tiles that the next carry needs stay in the scan; the rest may follow
in a kernel parallel over chunks that re-reads the stored carry (post).

Scans can also run on all segments of a sequence at once (codegen/segments.py): scans before them
compute the states in which the segments end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from ..dsl.errors import InvalidIR
from . import tile
from .buffers import BufferId, BufferKind
from .chunk import Carried, ChunkProgram, Named
from .differentiate import Adjoint
from .hoisting import Hoist as Hoist
from .hoisting import depends, hoisted, norms_along_keys
from .scans import exchanged, gradient_scans, has_gradient_scans
from .segments import Segments, Start, Transitions, segment_transitions
from .tile import Axis, Tile, TileOp, summed_axes

# suffixes of the names of scans that compute the ends of segments
ENDS, MATRICES = "_ends", "_matrices"


class Loop(Enum):
    """How a kernel runs over the chunks of a sequence."""

    PARALLEL = "one program per chunk"
    FORWARD = "a scan from the first chunk to the last"
    REVERSE = "a scan from the last chunk to the first"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one direction is cut into kernels.

    `reassociate`: T(x - bS) as Tx - (Tb)S (W stored, one product fewer in the serial chain).
    `sums_apart`: what follows the scans has its sums over the value axis in a kernel of their own,
    which stores them; the kernel after it can then loop over the key axis.
    `norms_apart`: sums over the key axis that something along it needs (norms) in kernels of their
    own, before and after, so that the kernel between them can loop over the key axis.
    `values_apart`: backward only: gradients along the value axis in a kernel of their own, which
    needs no sum over it; the other kernel then holds fewer tiles at once.
    `outputs_in_scan`: outputs are computed while the state is at hand, and the state is not stored;
    the backward can only where its scan is not split along the value axis, which its outputs sum
    over, or with `scans_apart`.
    `scans_apart`: backward only: each gradient in a scan of its own, which carries the one state
    that it reads (codegen/scans.py).
    `together`: scans that need nothing of one another in one launch, where a target has launches.
    `saves`: the kinds of C x C tiles that the forward stores for the backward, which would compute
    them again (codegen/saves.py); both directions of a configuration have the same.
    """

    hoist: Hoist
    reassociate: bool = False
    outputs_in_scan: bool = False
    values_apart: bool = False
    sums_apart: bool = False
    norms_apart: bool = False
    scans_apart: bool = False
    together: bool = False
    saves: Hoist = Hoist.NOTHING

    @property
    def label(self) -> str:
        """A short name for tables: e.g. `prefixes+solves+W|scan|post`."""
        kinds = (Hoist.PREFIXES, Hoist.SOLVES, Hoist.PRODUCTS)
        hoisted = [str(k.name).lower() for k in kinds if k in self.hoist]
        prep = "+".join(["norms"] * self.norms_apart + hoisted + ["W"] * self.reassociate)
        post = "+".join(("sums",) * self.sums_apart + ("values",) * self.values_apart + ("post",))
        scan = ("scans" if self.scans_apart else "scan") + "+together" * self.together
        cut = "|".join(p for p in (prep, scan, "" if self.outputs_in_scan else post) if p)
        saved = "+".join(str(k.name).lower() for k in kinds if k in self.saves)
        return f"{cut}, saved {saved}" if saved else cut


@dataclass(frozen=True)  # no slots: what follows from the fields is kept
class Kernel:
    """One kernel: the tiles it stores under their buffers' names, those it finds stored already.

    `transposed`: states are held transposed (`ChunkProgram`). `last`: whether the call is given
    what its carries are after the last chunk. `pooled`: a token's kernel reads states of a pool
    and writes each token's there, instead of first and last ones of the call.
    """

    name: str
    loop: Loop
    stores: Named
    carried: tuple[Carried, ...]
    stored: Named
    segments: Segments | None = None
    transposed: bool = False
    last: bool = True
    pooled: bool = False

    @property
    def shares_vectors(self) -> bool:
        """Whether programs for parts of V would read and write one vector of a pool."""
        return self.pooled and any(Axis.V not in c.start.axes for c in self.carried)

    @cached_property
    def order(self) -> tuple[Tile, ...]:
        """Every tile of the kernel, arguments first; buffers and carries are leaves."""
        roots = [t for _, t in self.stores] + [c.end for c in self.carried]
        return tuple(tile.topological(*roots, stop=frozenset(t for _, t in self.stored)))

    @cached_property
    def buffers(self) -> Mapping[Tile, BufferId]:
        """The stored tiles that this kernel reads."""
        used = set(self.order)
        return {t: name for name, t in self.stored if t in used}


@dataclass(frozen=True, slots=True)
class Program:
    """The kernels of one direction, in order, and the buffers that are its results."""

    kernels: tuple[Kernel, ...]
    results: tuple[BufferId, ...]

    @property
    def stages(self) -> tuple[tuple[Kernel, ...], ...]:
        """The kernels in order; scans that follow one another together.

        A stage of scans can run from end to end for one sequence and head, then for the next.
        """
        stages: list[tuple[Kernel, ...]] = []
        for kernel in self.kernels:
            scans = stages and Loop.PARALLEL not in (kernel.loop, stages[-1][0].loop)
            if scans:
                stages[-1] = (*stages[-1], kernel)
            else:
                stages.append((kernel,))
        return tuple(stages)

    def passed(self, stage: tuple[Kernel, ...]) -> frozenset[BufferId]:
        """The buffers that the kernels of `stage` pass to one another, and to no other."""
        stored = {name for kernel in stage for name, _ in kernel.stores}
        others = (k for k in self.kernels if k not in stage)
        return frozenset(stored.difference(self.results, *(k.buffers.values() for k in others)))


def forward_plans(body: ChunkProgram) -> tuple[Plan, ...]:
    """Every legal plan of a forward, the plainest first."""
    plans = _plans(body)
    if sums_over_values(body):
        plans += [replace(p, sums_apart=True) for p in plans if not p.outputs_in_scan]
    return tuple(plans)


def sums_over_values(body: ChunkProgram) -> bool:
    """Whether outputs take sums over the value axis: no part of it has them by itself."""
    return any(Axis.V in summed_axes(t) for t in tile.topological(*(t for _, t in body.outputs)))


def _plans(body: ChunkProgram) -> list[Plan]:
    """The plans that both directions have."""
    tiles = _tiles(body.carried, body.outputs)
    solves = any(t.op is TileOp.INVERSE for t in tiles)
    gates = any(t.op is TileOp.CUMSUM for t in tiles)
    prefixes = (Hoist.NOTHING, Hoist.PREFIXES) if gates else (Hoist.NOTHING,)
    kinds = [Hoist.NOTHING, Hoist.PRODUCTS]
    if solves:
        kinds = [Hoist.NOTHING, Hoist.SOLVES, Hoist.SOLVES | Hoist.PRODUCTS]
    plans = []
    for outputs_in_scan in (True, False):
        for prefix in prefixes:
            for kind in kinds:
                plans.append(Plan(prefix | kind, outputs_in_scan=outputs_in_scan))
            if solves:
                hoist = prefix | Hoist.SOLVES | Hoist.PRODUCTS
                plans.append(Plan(hoist, reassociate=True, outputs_in_scan=outputs_in_scan))
    if norms_along_keys(tiles):
        plans += [replace(p, norms_apart=True) for p in plans]
    return plans


def backward_plans(body: ChunkProgram) -> tuple[Plan, ...]:
    """Every legal plan of a backward."""
    both = _plans(body)
    plans = [p for p in both if not p.outputs_in_scan]
    plans += [replace(p, values_apart=True) for p in plans]
    plans += [replace(p, sums_apart=True) for p in plans]
    if has_gradient_scans(body):
        plans += [replace(p, scans_apart=True) for p in both if p.outputs_in_scan]
    whole = [p for p in plans if not (p.values_apart or p.sums_apart or p.norms_apart)]
    return (*plans, *(replace(p, together=True) for p in whole))


def plan_forward(
    body: ChunkProgram, plan: Plan, *, segments: bool = False, saved: Named = ()
) -> Program:
    """`body` cut into kernels by `plan`; `segments`: its scan too, if it can.

    `saved`: the tiles that it stores for a backward (`codegen.saves`).
    """
    build = _Builder("forward", body, segments=segments)
    carries = frozenset(c.start for c in body.carried)
    in_scan = body.outputs if plan.outputs_in_scan else ()
    roots = [c.end for c in body.carried] + [t for _, t in in_scan]
    if plan.norms_apart:
        build.norms([*roots, *(t for _, t in body.outputs)])
    build.prepare(plan, roots, carries, saved=saved)
    kept = () if plan.outputs_in_scan else _kept([t for _, t in body.outputs], carries)
    build.kernel("scan", Loop.FORWARD, (*in_scan, *build.fresh(kept)), body.carried)
    if not plan.outputs_in_scan:
        if plan.sums_apart:
            build.sums(body.outputs)
        build.kernel("post", Loop.PARALLEL, body.outputs)
    return Program(tuple(build.kernels), tuple(name for name, _ in body.outputs))


def plan_backward(
    body: ChunkProgram,
    adjoint: Adjoint,
    plan: Plan,
    *,
    segments: bool = False,
    saved: Named = (),
) -> Program:
    """The adjoint cut into kernels: prep, the states again, the reversed scan, all gradients.

    `saved`: the tiles that the forward has stored.
    """
    build = _Builder("backward", body, segments=segments, saved=saved)
    states = frozenset(adjoint.saved)
    reverse = frozenset(c.start for c in adjoint.carried)
    ends = [c.end for c in (*body.carried, *adjoint.carried)]
    outputs = [t for _, t in adjoint.outputs]
    if plan.norms_apart:
        build.norms([*ends, *outputs])
    build.prepare(plan, ends, states | reverse, outputs)
    if plan.scans_apart:
        build.gradient_scans(body, adjoint)
        return Program(tuple(build.kernels), tuple(name for name, _ in adjoint.outputs))
    kept = _kept([*outputs, *(c.end for c in adjoint.carried)], states | reverse)
    of_states = tuple(t for t in kept if not depends(t, reverse))
    build.kernel("states", Loop.FORWARD, build.fresh(of_states), body.carried)
    if plan.outputs_in_scan:
        build.kernel("reverse", Loop.REVERSE, adjoint.outputs, adjoint.carried)
        return Program(tuple(build.kernels), tuple(name for name, _ in adjoint.outputs))
    of_reverse = tuple(t for t in kept if depends(t, reverse))
    build.kernel("reverse", Loop.REVERSE, build.fresh(of_reverse), adjoint.carried)
    apart = tuple(o for o in adjoint.outputs if plan.values_apart and Axis.V in o[1].axes)
    if apart:
        build.kernel("values", Loop.PARALLEL, apart)
    rest = tuple(o for o in adjoint.outputs if o not in apart)
    if plan.sums_apart:
        build.sums(rest)
    cut = build.late_norms(rest) if plan.norms_apart else ()
    late = tuple(o for o in rest if depends(o[1], frozenset(cut)))
    early = tuple(o for o in rest if o not in late)
    build.kernel("gradients", Loop.PARALLEL, (*early, *build.fresh(cut)))
    if late:
        build.kernel("finish", Loop.PARALLEL, late)
    return Program(tuple(build.kernels), tuple(name for name, _ in adjoint.outputs))


class _Builder:
    """Kernels as they accumulate, with everything stored so far."""

    def __init__(
        self, direction: str, body: ChunkProgram, *, segments: bool, saved: Named = ()
    ) -> None:
        """`saved`: what is stored before the first kernel."""
        self._direction = direction
        self._transitions = segment_transitions(body.carried) if segments else None
        self._transposed = body.transposed
        self.kernels: list[Kernel] = []
        self._stored: dict[Tile, BufferId] = {t: name for name, t in saved}
        self._saved = frozenset(self._stored)
        self._names: set[BufferId] = set(self._stored.values())

    def kernel(
        self,
        name: str,
        loop: Loop,
        stores: Named,
        carried: tuple[Carried, ...] = (),
    ) -> None:
        before = tuple((n, t) for t, n in self._stored.items())
        if loop is not Loop.PARALLEL:  # a scan holds its own carry: nobody stored it before
            starts = {c.start for c in carried}
            before = tuple((n, t) for n, t in before if t not in starts)
        self._add(Kernel(f"{self._direction}_{name}", loop, stores, carried, before))
        for n, t in stores:
            self._names.add(n)
            while t.op is TileOp.RENAME:  # the same numbers, which printers know by their tile
                (t,) = t.args
            if t.op is not TileOp.EXPAND:
                self._stored.setdefault(t, n)

    def gradient_scans(self, body: ChunkProgram, adjoint: Adjoint) -> None:
        """The scans that carry the states which their gradients read."""
        scans = gradient_scans(body, adjoint)
        if scans is None:
            raise InvalidIR("gradients that no scans of their own can compute")
        before = tuple((n, t) for t, n in self._stored.items())
        for scan in scans:
            loop = Loop.REVERSE if scan.reverse else Loop.FORWARD
            carried = adjoint.carried if scan.reverse else body.carried
            kernel = Kernel(
                f"{self._direction}_{scan.name}",
                loop,
                scan.outputs,
                carried,
                before,
                last=scan.last,
            )
            self._add(_exchanged(kernel) if scan.exchanged else kernel)

    def _add(self, kernel: Kernel) -> None:
        """`kernel`, held as the chunk is; a scan of segments after those for their ends."""
        kernel = replace(kernel, transposed=kernel.transposed is not self._transposed)
        if self._transitions is not None and kernel.loop is not Loop.PARALLEL:
            self._ends(kernel, self._transitions)
            kernel = replace(kernel, segments=Segments(Start.ENDS, self._transitions))
        self.kernels.append(kernel)

    def _ends(self, scan: Kernel, transitions: Transitions) -> None:
        """Scans for the ends of segments; the first scan's transitions serve the scans after it."""
        known = any(k.segments is not None for k in self.kernels)
        new = () if known else tuple(dict.fromkeys(p for p in transitions if p is not None))
        fades = tuple(p.carried for p in new if not p.matrix)
        matrices = tuple(p.carried for p in new if p.matrix)
        zero, identity = Segments(Start.ZERO, ()), Segments(Start.IDENTITY, ())
        for suffix, carried, segments in (
            (ENDS, (*scan.carried, *fades), zero),
            (MATRICES, matrices, identity),
        ):
            if carried:
                own = replace(scan, stores=(), carried=carried, segments=segments)
                self.kernels.append(replace(own, name=scan.name + suffix))

    def fresh(self, tiles: Iterable[Tile]) -> Named:
        """Buffer names for `tiles`, in order, none of them used yet."""
        names: list[tuple[BufferId, Tile]] = []
        for t in tiles:
            stem = t.hint or "x"
            used = {*self._names, *(n for n, _ in names)}
            name, count = BufferId(BufferKind.INTERMEDIATE, stem), 1
            while name in used:
                count += 1
                name = BufferId(BufferKind.INTERMEDIATE, f"{stem}{count}")
            names.append((name, t))
        return tuple(names)

    def norms(self, roots: list[Tile]) -> None:
        """A kernel for the sums over K of operands that something along K needs."""
        wanted = norms_along_keys(tile.topological(*roots))
        if wanted:
            self.kernel("norms", Loop.PARALLEL, self.fresh(wanted))

    def late_norms(self, outputs: Named) -> tuple[Tile, ...]:
        """Sums over K of gradients that something along K needs, and the gradients they sum."""
        needed = tile.topological(*(t for _, t in outputs), stop=frozenset(self._stored))
        fresh = [t for t in needed if t not in self._stored]
        under_gate = (TileOp.DECAYED_APPLY, TileOp.DECAYED_CROSSING)
        along = frozenset(t for t in fresh if t.op in under_gate)
        wanted: dict[Tile, None] = {}
        for s in fresh:
            late = s.op is TileOp.SUM and Axis.K in summed_axes(s) and depends(s, along)
            if late and any(Axis.K in t.axes and depends(t, frozenset((s,))) for t in fresh):
                wanted[s] = None
                (summed,) = s.args
                parts = summed.args if summed.op is TileOp.MAP else (summed,)
                wanted |= {x: None for x in parts if depends(x, along)}
        return tuple(wanted)

    def sums(self, outputs: Named) -> None:
        """A kernel for the sums over the value axis that `outputs` need and nobody stored yet."""
        needed = tile.topological(*(t for _, t in outputs), stop=frozenset(self._stored))
        sums = [t for t in needed if t not in self._stored and Axis.V in summed_axes(t)]
        if sums:
            self.kernel("sums", Loop.PARALLEL, self.fresh(sums))

    def prepare(
        self,
        plan: Plan,
        roots: list[Tile],
        carries: frozenset[Tile],
        outputs: Iterable[Tile] = (),
        saved: Named = (),
    ) -> None:
        """The kernel ahead of the scans: `saved`, and what is worth hoisting."""
        wanted = hoisted(
            roots,
            carries,
            plan.hoist,
            reassociate=plan.reassociate,
            outputs=outputs,
            known=self._saved,
        )
        own = {t for _, t in saved}
        stores = (*saved, *self.fresh(t for t in wanted if t not in own))
        if stores:
            self.kernel("prep", Loop.PARALLEL, stores)


def _exchanged(kernel: Kernel) -> Kernel:
    """The same kernel with axis K called V, and V K."""
    ends = (c.end for c in kernel.carried)
    roots = (*(t for _, t in kernel.stores), *ends, *(t for _, t in kernel.stored))
    new = exchanged(roots)
    return replace(
        kernel,
        stores=tuple((n, new[t]) for n, t in kernel.stores),
        carried=tuple(Carried(c.start, new[c.end]) for c in kernel.carried),
        stored=tuple((n, new[t]) for n, t in kernel.stored),
        transposed=not kernel.transposed,
    )


def _kept(roots: list[Tile], carries: frozenset[Tile]) -> tuple[Tile, ...]:
    """The tiles that a scan stores for `roots` in later kernels: its carry, solves that need it."""
    solves = frozenset(
        t
        for t in tile.topological(*roots)
        if (t.op is TileOp.SUBSTITUTE or (t.op is TileOp.DOT and t.args[0].op is TileOp.INVERSE))
        and depends(t, carries)
    )
    needed = tile.topological(*roots, stop=solves)
    return tuple(t for t in needed if t in carries or t in solves)


def _tiles(carried: tuple[Carried, ...], outputs: Named) -> list[Tile]:
    return tile.topological(*(c.end for c in carried), *(t for _, t in outputs))
