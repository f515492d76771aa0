"""A recurrence over sequences that lie on several ranks of a process group, token after token.

The state after a rank's part of a sequence is affine in the state before it, S' = A S + B (equation
9 of the mathematics). Each rank computes A and B of its own part, all ranks exchange them, and each
combines those of the ranks before it to the state from which its part starts. Gradients go the
other way with the transposes of the same A. What is exchanged does not depend on the number of
tokens.

An engine whose scans run on segments computes A and B on its way (`Engine.joins`). Elsewhere the op
is called for them: B is the final state from zero. If a state only decays, A is e^(the sum of its
log-decays). Else it is a matrix: the final state from the identity, with operands of zero in the
place of what is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ..dsl import errors, oracle
from ..dsl.ir import Kind, Per
from ..dsl.normal_form import StateDecl
from .call import Call, bind, describe
from .check import asked, check_contents, check_results
from .joining import Factors, Join, Map, SegmentEnds
from .prepared import serving_engine
from .rank_scan import scanned
from .ranks import agree, group_of, refuse_transforms, share_of, tokens_of
from .sizes import check_boundaries
from .transitions import Kinds, kinds_of

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration
    from .ops import Ops

Tensors = tuple[Tensor, ...]


class Given(NamedTuple):
    """What a user passes: operands in order and by name, options."""

    args: Sequence[object]
    named: Mapping[str, object]
    initial_state: Tensor | Sequence[Tensor | None] | None
    cu_seqlens: Tensor | None
    engine: str | None
    check: bool | None


def call(declaration: Declaration, ops: Ops, given: Given, group: object) -> Tensors:
    """`(o, *states)` of this rank's tokens: o as of a call, states after this rank's part.

    Raises:
        RankMismatch: on every rank, if calls of ranks do not fit together or one was refused.
        NotLowered: the transition of the recurrence over a stretch of tokens is not derived.
        NoTransform: torch.func or forward mode looks on.
    """
    run = _call
    if "torch._dynamo" in sys.modules:  # whose import takes longer than most calls
        run = torch.compiler.disable(_call)
    return run(declaration, ops, given, group_of(group))


call._torchdynamo_disable = True  # type: ignore[attr-defined]


def _call(declaration: Declaration, ops: Ops, given: Given, group: ProcessGroup) -> Tensors:
    found: Call | None = None
    refused: Exception | None = None
    try:
        refuse_transforms(declaration.name)
        initial, bounds = given.initial_state, given.cu_seqlens
        found = bind(declaration, given.args, given.named, initial_state=initial, cu_seqlens=bounds)
        if found.T == 0:
            raise errors.BadBatch("tokens", 0, "at least one on every rank")
        kinds = kinds_of(found)
        if asked() if given.check is None else given.check:
            check_contents(replace(found, cu_seqlens=None), check=True)
        serving_engine(found, given.engine)
    except Exception as why:  # whatever it is: `agree` tells the other ranks, and raises it here
        refused = why
    tokens, offsets = agree(group, found, refused)
    assert found is not None
    if offsets is not None:
        check_boundaries(torch.tensor(offsets, dtype=torch.int64, device="cpu"), sum(tokens))
    parallel = _Parallel(ops, found, given, group, kinds, tokens, offsets)
    tensors = (*found.operands.values(), *found.initial)
    made: Tensors = _Function.apply(parallel, *tensors)  # type: ignore[no-untyped-call]
    return made


class _Function(torch.autograd.Function):
    """The call as a node of autograd's graph, whose backward every rank has to reach."""

    @staticmethod
    def forward(ctx: Any, parallel: _Parallel, *tensors: Tensor | None) -> Tensors:
        with _without_autocast(tensors):
            results, kept = parallel.forward()
        ctx.parallel = parallel
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with _without_autocast(saved):
            return (None, *ctx.parallel.backward(saved, *cotangents))


def _without_autocast(tensors: Sequence[Tensor | None]) -> torch.autocast:
    """Autocast may change no dtype within a call, as in the ops themselves."""
    (kind,) = {x.device.type for x in tensors if x is not None}
    return torch.autocast(kind, enabled=False)


class _Parallel:
    """One call of this rank."""

    def __init__(
        self,
        ops: Ops,
        call: Call,
        given: Given,
        group: ProcessGroup,
        kinds: Kinds,
        tokens: Sequence[int],
        bounds: Sequence[int] | None,
    ) -> None:
        self._ops, self._call, self._kinds, self._group = ops, call, kinds, group
        self._engine = given.engine
        self._checked = asked() if given.check is None else given.check
        self._serving = serving_engine(call, given.engine)
        self._rank, self._ranks = dist.get_rank(group), len(tokens)
        self._shares = [share_of(call, bounds, tokens, n) for n in range(self._ranks)]
        self._share = self._shares[self._rank]
        self._states = call.declaration.states
        self._count = len(self._states)
        self._leaves = any(x.leaves for x in self._shares)
        self._spanned = any(x.spans for x in self._shares)
        self._ends: tuple[int, tuple[Hashable, ...]] = (0, ())  # of segments: rows, and names

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensors, list[Tensor | None]]:
        """Output and states; and what the backward needs: first states, what was made of states."""
        call, rows = self._call, self._share.rows
        starts = [
            self._own_rows(x, state) for x, state in zip(call.initial, self._states, strict=True)
        ]
        kept: Factors = ()

        def meet(own: Map) -> None:
            nonlocal kept
            if self._spanned and not self._serving.joins:  # which find them again
                kept = own.factors
            for start, x in zip(starts, self._scanned(own), strict=False):
                start[: self._share.carried].copy_(x)

        def meet_from_zero(own: Map) -> None:
            meet(own._replace(ends=self._moved(self._before_last(), own.factors, own.ends)))

        if self._leaves and self._serving.joins:
            of_segments = SegmentEnds()
            o, *ends = self._serving.joined(
                self._own_call(call.operands, starts), self._join(-1, meet_from_zero, of_segments)
            )
            self._ends = of_segments.rows, tuple(of_segments.tensors)
            kept = tuple(of_segments.tensors.values())
        else:
            if self._leaves:
                meet(self._own_map())
            o, *ends = self._run(call.operands, starts, self._share.boundaries)
        states = tuple(x if rows is None else _spread(x, rows, call.N) for x in ends)
        if self._checked:
            check_results(call, (o, *states))
        return (o, *states), [*starts, *kept]

    def _own_rows(self, x: Tensor | None, state: StateDecl) -> Tensor:
        """New states of this rank's sequences: `x` of them, or zero."""
        call, rows = self._call, self._share.rows
        count = call.N if rows is None else rows.stop - rows.start
        if x is None:
            return self._zeros((count, *call.state_shape(state)[1:]))
        return (
            (x if rows is None else x[rows]).detach().to(call.state_dtype, copy=True).contiguous()
        )

    def _own_call(self, operands: Mapping[str, Tensor], starts: Sequence[Tensor]) -> Call:
        """The call of this rank's sequences alone."""
        call = self._call
        return describe(
            call.declaration,
            dict(operands),
            call.params,
            tuple(starts),
            self._share.boundaries,
            call.static,
        )

    def _join(self, sequence: int, meet: Callable[[Map], None], ends: SegmentEnds) -> Join:
        """`sequence`: of a packed batch, the one that goes over a border: the first or the last."""
        boundaries = self._share.boundaries
        if boundaries is None:
            return Join(slice(None), None, meet, ends)
        at = sequence % (len(boundaries) - 1)
        return Join(slice(at, at + 1), tuple(boundaries.tolist()), meet, ends)

    def _own_map(self) -> Map:
        """That of the stretch of this rank's tokens that goes on on the next; zero if none does."""
        call, share = self._call, self._share
        operands = tokens_of(call, share.last_from, None)
        if share.leaves:
            _, *ends = self._run(operands, self._before_last())
        else:
            ends = [self._zeros((share.carried, *call.state_shape(s)[1:])) for s in self._states]
        factors: Factors = (None,) * self._count
        if self._spanned:
            factors = self._factors(operands, zero=not share.spans)
        return Map(tuple(ends), factors)

    def _before_last(self) -> tuple[Tensor | None, ...]:
        """The states before the stretch that leaves: given if it begins here, else zero."""
        rows, initial = self._share.rows, self._call.initial
        if self._share.spans:
            return (None,) * self._count
        if rows is None:
            return initial
        return tuple(None if x is None else x[rows.stop - 1 : rows.stop] for x in initial)

    def _factors(self, operands: dict[str, Tensor], *, zero: bool) -> Factors:
        """A of every state; `zero`: of the right shape, for ranks whose own nobody needs."""
        call, carried = self._call, self._share.carried
        found: list[Tensor | None] = []
        keys, side = (Kind.KEY, call.V) if self._kinds.transposed else (Kind.VALUE, call.K)
        matrices: dict[int, Tensor] = {}
        if any(self._kinds.matrix) and not zero:
            one = torch.eye(side, dtype=call.state_dtype, device=call.device)
            blank = {
                x.name: operands[x.name].new_zeros(side).expand(*operands[x.name].shape[:-1], side)
                for x in call.step.operands
                if x.kind is keys
            }
            starts = tuple(
                one.expand(carried, call.HV, side, side) if matrix else None
                for matrix in self._kinds.matrix
            )
            _, *ends = self._run({**operands, **blank}, starts)
            matrices = dict(enumerate(ends))
        for n, state in enumerate(self._states):
            if self._kinds.matrix[n]:
                made = matrices.get(n)
                shape = (carried, call.HV, side, side)
                found.append(self._zeros(shape) if made is None else made)
            elif self._kinds.decays[n]:
                logs = self._log_decay(n, operands, state.kind)
                found.append(torch.zeros_like(logs) if zero else logs.exp())
            else:
                found.append(None)
        return tuple(found)

    def _log_decay(self, n: int, operands: dict[str, Tensor], kind: Kind) -> Tensor:
        """The sum of a state's log-decays, with the axes of the state, some of them of length 1."""
        call = self._call
        env = oracle.leaves(call.step, operands, call.params, call.state_dtype)
        total: Tensor | None = None
        tokens = next(operands[x.name] for x in call.step.operands if x.per is Per.TOKEN)
        B, T = tokens.shape[:2]
        for node in self._kinds.decays[n]:
            (log,) = oracle.evaluate([node], env)
            if node.kind is Kind.SCALAR:
                log = log[..., None] if kind is Kind.KEY_STATE else log[..., None, None]
            elif kind is not Kind.KEY_STATE:
                log = log[..., None, :] if node.kind is Kind.VALUE else log[..., None]
            log = log.expand(B, T, call.HV, *log.shape[3:]).sum(1)
            total = log if total is None else total + log
        assert total is not None
        return total

    def _scanned(self, own: Map, *, reverse: bool = False) -> Tensors:
        """The states that come to this rank, of a backward the gradients of its last ones."""
        arrives = [x.leaves if reverse else x.enters for x in self._shares]
        spans = [x.spans for x in self._shares]
        return scanned(self._group, own, arrives, spans, self._composed, reverse=reverse)

    def _composed(self, second: Map, first: Map) -> Map:
        """The map of two stretches."""
        factors: list[Tensor | None] = []
        for a, b, matrix in zip(second.factors, first.factors, self._kinds.matrix, strict=True):
            if a is None or b is None:  # 1, or a first stretch with a first state of its own
                factors.append(None)
            elif matrix:
                x, y = (b, a) if self._kinds.transposed else (a, b)
                factors.append((x.double() @ y.double()).to(a.dtype))
            else:
                factors.append(a * b)
        return Map(self._moved(first.ends, second.factors, second.ends), tuple(factors))

    def _moved(
        self,
        states: Sequence[Tensor | None],
        factors: Factors,
        added: Tensors,
    ) -> Tensors:
        """A S + B of every state; in float64, for the next rank rounds again."""
        moved = []
        for x, a, b, matrix in zip(states, factors, added, self._kinds.matrix, strict=True):
            if x is None:
                moved.append(b)
            elif a is None:
                moved.append(x + b)
            elif matrix:
                a, x = a.double(), x.double()
                moved.append(((x @ a if self._kinds.transposed else a @ x) + b).to(b.dtype))
            else:
                moved.append(a * x + b)
        return tuple(moved)

    # ---- backward --------------------------------------------------------------------------------

    def backward(
        self, saved: Sequence[Tensor | None], do: Tensor | None, *dstates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of operands and of initial states."""
        call, share, states = self._call, self._share, self._count
        a, b = len(call.operands), len(call.operands) + states
        operands: dict[str, Any] = dict(zip(call.operands, saved, strict=False))
        initial = saved[a:b]
        starts = [x for x in saved[b : b + states] if x is not None]
        kept = saved[b + states :]
        dlast = [self._own_rows(d, state) for d, state in zip(dstates, self._states, strict=True)]

        def meet(mine: Tensors, factors: Factors) -> None:
            own = Map(mine, self._turned(factors))
            for d, x in zip(dlast, self._scanned(own, reverse=True), strict=False):
                d[len(d) - share.carried :] += x

        def meet_from_zero(own: Map) -> None:
            ends = [d[: share.carried] for d in dlast]
            meet(self._moved(ends, self._turned(own.factors), own.ends), own.factors)

        grads: Sequence[Tensor | None]
        if self._leaves and self._serving.joins:
            segment, names = self._ends
            there = {n: x for n, x in zip(names, kept, strict=True) if x is not None}
            grads = self._serving.joined(
                self._own_call(operands, starts),
                self._join(0, meet_from_zero, SegmentEnds(segment, there)),
                (do, *dlast),
            )
        else:
            if self._leaves:
                meet(self._before_first(operands, starts, do, dlast), tuple(kept))
            grads = self._differentiate(operands, starts, do, dlast, share.boundaries)
        own: list[Tensor | None] = [*grads[:a]]
        for n, x in enumerate(initial):
            d, rows = grads[a + n], share.rows
            if x is None or d is None:
                own.append(None)
            elif rows is None:
                own.append((torch.zeros_like(d) if share.enters else d).to(x.dtype))
            else:
                d = d.clone()
                d[:1] *= not share.enters
                own.append(_spread(d, rows, call.N).to(x.dtype))
        return tuple(own)

    def _before_first(
        self,
        operands: dict[str, Any],
        starts: Sequence[Tensor],
        do: Tensor | None,
        dlast: Sequence[Tensor],
    ) -> Tensors:
        """The gradient of the states before what enters, by this rank's tokens; zero if none do."""
        call, share, k = self._call, self._share, self._share.carried
        if not share.enters:
            return tuple(self._zeros((k, *call.state_shape(s)[1:])) for s in self._states)
        T = share.first_tokens
        first = tokens_of(replace(call, operands=operands), 0, T)
        before, ends = [x[:k] for x in starts], [x[:k] for x in dlast]
        grads = self._differentiate(first, before, None if do is None else do[:, :T], ends)
        return tuple(x for x in grads[len(first) :] if x is not None)

    def _turned(self, factors: Factors) -> Factors:
        """What gradients are multiplied by, from the last token to the first."""
        pairs = zip(factors or (None,) * self._count, self._kinds.matrix, strict=True)
        return tuple(f.mT if matrix and f is not None else f for f, matrix in pairs)

    # ---- calls of the ops, and collectives -------------------------------------------------------

    def _run(
        self,
        operands: dict[str, Tensor],
        starts: Sequence[Tensor | None],
        boundaries: Tensor | None = None,
    ) -> Tensors:
        made: Tensors = self._ops.forward(
            *operands.values(), *starts, boundaries, *self._numbers, self._engine, False
        )
        return made

    def _differentiate(
        self,
        operands: dict[str, Any],
        starts: Sequence[Tensor | None],
        do: Tensor | None,
        dfinals: Sequence[Tensor | None],
        boundaries: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of operands and of first states, None of those that are not there."""
        inputs = (*operands.values(), *starts)
        grads = iter(
            self._ops.backward(do, *dfinals, *inputs, boundaries, *self._numbers, self._engine)
        )
        return [None if x is None else next(grads) for x in inputs]

    @property
    def _numbers(self) -> tuple[float, ...]:
        return (*self._call.params.values(), *(n for _, n in self._call.static))

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(*shape, dtype=self._call.state_dtype, device=self._call.device)


def _spread(x: Tensor, rows: slice, N: int) -> Tensor:
    """Rows of sequences among those of all, which are zero."""
    full = x.new_zeros(N, *x.shape[1:])
    full[rows] = x
    return full
