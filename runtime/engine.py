"""The base of every engine: calls as kernels see them, once per layout; an engine compiles those.

A layout is a call without contents: its tensors lie on "meta", with the shapes, strides and dtypes
of the call's. From the layout follows how each value of a call becomes a tensor of a kernel (as
rows of micro-steps, by a copy without gaps); a call only carries this out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen.config import Dims
from ..codegen.differentiate import GRADIENT
from ..codegen.programs import chunk_program
from ..codegen.token import row_names
from ..dsl.errors import EngineUnavailable, NotLowered
from ..dsl.ir import Per
from ..dsl.normal_form import NormalForm, Operand, has_entries_apart
from ..dsl.oracle import joined
from .call import Call, places_of, values_of
from .engines import EngineName
from .joining import Join
from .micro_steps import by_entry, expanded, rows_of
from .prepared import Records, Request, Run, States, Values, Way
from .rows import as_kernels_read, in_last_rows, last_rows
from .saves import Saved, saved_under
from .tuned.artifact import Configuration, Key
from .tuned.selection import call_size_of, key_here, token_loop_wins

Make = Callable[[Any], Tensor]
# from a call's values to a task's results; of a gradient None where no output depends on it
Execute = Callable[[Values], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Feed:
    """How a tensor that kernels take is made of a value of the call.

    Attributes:
        at: the number of the value.
        make: the function from the value to the tensor; None where the tensor is the value.
        like: a tensor of the same layout without contents; None where the value is None.
    """

    at: int
    make: Make | None
    like: Tensor | None

    def then(self, make: Make) -> Feed:
        """With `make` done to it as well."""
        first, like = self.make, None if self.like is None else make(self.like)
        return Feed(self.at, make if first is None else lambda x: make(first(x)), like)

    def dense(self) -> Feed:
        """Without gaps between its numbers."""
        if self.like is None or self.like.is_contiguous():
            return self
        return self.then(Tensor.contiguous)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One way of calls of one layout, for an engine to compile.

    Attributes:
        call, rows: the layout as called, and as kernels take it: with a row for each micro-step.
        operands: the operands by name; a backward has the outputs' cotangents too, as `d_o`.
        starts: the first values of carries by name; a start without a `like` is zero.
        pools: states that lie in a pool, by name; `slots`: its indices, and numbers of tokens.
        params: the numbers of floats among the values of a call.
        results: the names that kernels give to the results: outputs and states, or gradients.
        time: whether values of tokens have a time axis.
        joined: as of a request.
        saved: what the forward keeps for the backward; its tiles are operands, by their buffers.
    """

    way: Way
    call: Call
    rows: Call
    operands: dict[str, Feed]
    starts: dict[str, Feed]
    params: dict[str, int]
    cu_seqlens: Feed | None
    results: tuple[str, ...]
    time: bool = True
    pools: dict[str, Feed] = field(default_factory=dict)
    slots: tuple[Feed, ...] = ()
    joined: bool = False
    saved: Saved | None = None

    @property
    def per_head(self) -> frozenset[str]:
        """The operands that have no tokens."""
        return frozenset(o.name for o in self.rows.step.operands if o.per is Per.HEAD)

    def carry_shape(self, name: str) -> tuple[int, ...]:
        """The shape of what is carried under that name: a state, or the gradient of one."""
        name = name.removeprefix(GRADIENT)
        return next(self.call.state_shape(s) for s in self.call.step.states if s.name == name)

    @property
    def one_token(self) -> bool:
        """Whether every sequence is a single token, taken as such."""
        return self.way is Way.TOKENS and is_one_token(self.call)


class Engine(ABC):
    """The interface of engines, for ops, for the tuner and for validation."""

    name: EngineName
    has_steps = True  # whether it has kernels of single tokens
    joins = False  # whether it prepares requests that are `joined`

    @abstractmethod
    def refusal(self, call: Call) -> str | None:
        """Why calls of this layout cannot be served; None if they can."""

    def device_refusal(self, call: Call) -> str | None:
        """Why the engine serves no call on this device; None if it serves some."""
        return None

    @abstractmethod
    def token_refusal(self, call: Call) -> str | None:
        """Why no kernel takes tokens of this layout one at a time; None if one does."""

    @abstractmethod
    def forward_way(self, call: Call) -> Way:
        """How the forward of calls of this layout is computed."""

    def saves(self, call: Call) -> Saved | None:
        """What forwards of such calls keep for the backward; None: nothing."""
        return None

    @abstractmethod
    def prepare(self, request: Request) -> Run:
        """What computes calls of a layout that is not refused, from their values.

        Results are the output and final states, or gradients of all operands and of the first
        states that are given; they share no memory with values.
        """

    def admit(self, call: Call) -> None:
        """Refuse calls that the engine cannot serve.

        Raises:
            EngineUnavailable: it runs on another kind of device.
            NotLowered: it has no kernels for such a call.
        """
        elsewhere = self.device_refusal(call)
        if elsewhere is not None:
            raise EngineUnavailable(
                self.name.value,
                elsewhere,
                help="name no engine: the device of the operands then chooses its own",
            )
        reason = self.refusal(call)
        if reason is not None:
            help = 'engine="reference" runs any legal step, token by token'
            if call.dtype is torch.float64:
                help = f'engine="eager" takes float64; {help}'
            if self.has_steps and self.token_refusal(call) is None:
                help = f"{call.declaration.name}.step runs it by a kernel, one token a call; {help}"
            raise NotLowered(
                f"engine {self.name.value!r} cannot serve this call of {call.declaration.name}",
                reason,
                help,
            )

    # ---- a checked call, for those who tune, examine and measure ---------------------------------

    def forward(
        self, call: Call, config: Configuration | None = None, segment: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o [B,T,HV,V] in the call's dtype; final states [N,HV,K,V] (or [N,HV,K]) in float32."""
        way = self.forward_way(call) if config is None else Way.CHUNKS
        o, *finals = self._run(Request(call, way, (), config, segment))
        return o, tuple(finals)

    def forward_by_token(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` returns, one token at a time."""
        o, *finals = self._run(Request(call, Way.TOKENS))
        return o, tuple(finals)

    def forward_saving(
        self, call: Call, config: Configuration | None, segment: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """As `forward`, and what `config` has it keep for `backward`; None: nothing."""
        if (saved := saved_under(config, call)) is None:
            return (*self.forward(call, config, segment), None)
        kept = torch.empty(saved.shape(call), dtype=call.dtype, device=call.device)
        request = Request(call, Way.CHUNKS, (), config, segment, saved=saved)
        o, *finals = self._run(request, *kept.unbind(0))
        return o, tuple(finals), kept

    def backward(
        self,
        call: Call,
        do: Tensor,
        dfinals: States,
        config: Configuration | None = None,
        segment: int | None = None,
        kept: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], States]:
        """Gradients of operands, as these, and initial states; `kept` by `forward_saving`."""
        saved = None if kept is None else saved_under(config, call)
        request = Request(call, Way.BACKWARD, (do, *dfinals), config, segment, saved=saved)
        made = self._run(request, *(() if kept is None else kept.unbind(0)))
        rest = iter(made[len(call.operands) :])
        initials = tuple(None if x is None else next(rest) for x in call.initial)
        return dict(zip(call.operands, made, strict=False)), initials

    def joined(
        self, call: Call, join: Join, cotangents: States | None = None
    ) -> tuple[Tensor, ...]:
        """Output and last states of this rank's part of sequences; of `cotangents`, gradients.

        The first states (of a backward the gradients of the last ones), float32 and all there, are
        read after `join.meet` was called.
        """
        way = Way.CHUNKS if cotangents is None else Way.BACKWARD
        return tuple(self._run(Request(call, way, cotangents or (), joined=True), join))

    def _run(self, request: Request, *more: Join | Tensor) -> Sequence[Tensor]:
        call, values = request.call, values_of(request.call, request.cotangents)
        tensors = values[: len(values) - len(call.params)]
        how = (self, call.declaration, call.static, request.way, request.config, request.segment)
        layout = tensors, (*how, request.joined, request.saved, torch.get_num_threads())
        run = _RECORDS.latest(*layout)
        run = run or _RECORDS.find(*layout, lambda: self.prepare(request.bare()))
        return run([*values, *more])


_RECORDS: Records[Run] = Records()


class KernelEngine(Engine):
    """The base of engines that print kernels: a subclass refuses calls and compiles tasks."""

    @abstractmethod
    def compile(self, task: Task, config: Configuration | None, segment: int | None) -> Execute:
        """What computes a task, under `config` and `segment` as a request has them."""

    def forward_way(self, call: Call) -> Way:
        """As `Engine.forward_way`: a token as a token, others in chunks if those are faster."""
        if is_one_token(call) and self.token_refusal(call) is None:
            return Way.TOKENS
        return Way.TOKENS if token_loop_wins(self.key(call), call_size_of(call)) else Way.CHUNKS

    def key(self, call: Call) -> Key:
        """What artifacts for calls of this layout lie under, here."""
        return key_here(call.form, self.name, call.dtype, Dims(call.K, call.V), call.device)

    def prepare(self, request: Request) -> Run:
        """As `Engine.prepare`."""
        task = task_of(request)
        execute = self.compile(task, request.config, request.segment)
        finish = [_finish(task, name) for name in task.results]
        combine = _combine(task)
        if combine is None and not any(finish):
            return execute

        def run(values: Values) -> list[Tensor]:
            made = execute(values)
            done = [x if f is None else f(x) for f, x in zip(finish, made, strict=True)]
            return done if combine is None else combine(done)

        return run


def is_one_token(call: Call) -> bool:
    """Whether every sequence of the call is a single token."""
    return call.T == 1 and call.cu_seqlens is None


def task_of(request: Request) -> Task:
    """What an engine compiles for a request."""
    call, way, cotangents = request.call, request.way, request.cotangents
    places = request.places or places_of(call, len(cotangents))
    tokens, apart = way in (Way.TOKENS, Way.POOL), has_entries_apart(call.form)
    n = 1 if tokens else len(call.form.micro_steps)
    operands: dict[str, Feed] = {}
    for o in call.step.operands:
        value = Feed(places.operands[o.name], None, call.operands[o.name])
        if tokens or apart:
            operands |= _entry_feeds(value, o, call.micro, places.time)
        else:
            make = rows_of(call, o).make
            operands[o.name] = value if make is None else value.then(make)
    per_head = {o.name for o in call.step.operands if o.per is Per.HEAD}
    operands = {name: _strided(f, per_head=name in per_head) for name, f in operands.items()}
    pool = call.pool
    states = call.initial if pool is None else pool.states
    starts = {
        s.name: Feed(places.states[s.name], None, x)
        for s, x in zip(call.step.states, states, strict=True)
    }
    pools: dict[str, Feed] = {}
    slots: tuple[Feed, ...] = ()
    if pool is not None:
        assert places.slots is not None
        starts, pools = {}, starts
        given = enumerate((pool.indices, pool.accepted), places.slots)
        slots = tuple(Feed(at, None, x) for at, x in given)
    results = [*call.output_shapes, *starts]
    if way is Way.BACKWARD:
        operands |= _cotangents(call, places.cotangents, cotangents[0])
        names = by_entry(call).operands if apart else call.operands
        results = [GRADIENT + name for name in names]
        results += [GRADIENT + name for name, feed in starts.items() if feed.like is not None]
        for at, (name, d) in enumerate(zip(tuple(starts), cotangents[1:], strict=True), 1):
            starts[GRADIENT + name] = Feed(places.cotangents + at, None, d)
    bounds = None
    if call.cu_seqlens is not None:
        assert places.cu_seqlens is not None
        bounds = _boundaries(Feed(places.cu_seqlens, None, call.cu_seqlens), call.device, n)
    if request.saved is not None:
        operands |= _saved_feeds(call, request.saved)
    rows = by_entry(call) if tokens else expanded(call)
    return Task(
        way, call, rows, operands, starts, places.params, bounds, tuple(results), places.time,
        pools, slots, request.joined, request.saved,
    )  # fmt: skip


def _saved_feeds(call: Call, saved: Saved) -> dict[str, Feed]:
    """The tiles that a forward fills and a backward reads: the last values of a call."""
    count, *shape = saved.shape(call)
    like = torch.empty(shape, dtype=call.dtype, device="meta")
    return {name: Feed(n - count, None, like) for n, name in enumerate(saved.names(call))}


def _like(feed: Feed) -> Tensor:
    assert feed.like is not None
    return feed.like


def _strided(feed: Feed, *, per_head: bool) -> Feed:
    """As kernels take operands: channels without gaps, those per head without any."""
    return feed if as_kernels_read(_like(feed), per_head=per_head) else feed.dense()


def _entry_feeds(value: Feed, o: Operand, micro: int, time: bool) -> dict[str, Feed]:
    """The tensors of an operand for kernels that take the entries of tuples apart.

    Their layout has a time axis, also where values have none.
    """
    if not o.micro:
        return {o.name: value}
    axis = 2 if time else 1

    def entry(n: int) -> Feed:
        return Feed(value.at, lambda x: x.select(axis, n), _like(value).select(2, n))

    return {name: entry(n) for n, name in enumerate(row_names(o, micro))}


def _cotangents(call: Call, at: int, do: Tensor | None) -> dict[str, Feed]:
    """The gradients of the rows' outputs; an expanded one (of a sum, say) has strides of 0."""
    shape, dtype, device = call.output_shape, call.dtype, call.device
    if do is None:
        like = torch.empty(shape, dtype=dtype, device="meta")
        feed = Feed(at, lambda _: torch.zeros(shape, dtype=dtype, device=device), like)
    else:
        feed = Feed(at, None, do)
    feeds, first, n = {}, 0, len(call.form.micro_steps)
    for name, own in call.output_shapes.items():
        width = math.prod(own[3:])
        part = feed if own == shape else feed.then(partial(_part, first, width, own))
        part, first = part.dense(), first + width
        feeds[GRADIENT + name] = part if n == 1 else part.then(lambda x: in_last_rows(x, n))
    return feeds


def _part(first: int, width: int, shape: tuple[int, ...], do: Tensor) -> Tensor:
    """The gradient of one output of several, from the channel `first` on."""
    return do[..., first : first + width].reshape(shape)


def _boundaries(feed: Feed, device: torch.device, micro_steps: int) -> Feed:
    """Of rows, without gaps, where the operands are: they may come from the host."""

    def make(x: Tensor) -> Tensor:
        x = x.contiguous() if x.is_meta else x.to(device, non_blocking=True).contiguous()
        return x if micro_steps == 1 else x * micro_steps

    return feed.then(make)


def _combine(task: Task) -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
    """The function from all results to those of the call; None where they are the same."""
    call = task.call
    if task.way is Way.BACKWARD:
        if not has_entries_apart(call.form):
            return None
        return partial(_stacked, [call.micro if o.micro else 0 for o in call.step.operands])
    count = len(call.step.outputs)
    if count == 1:
        return None
    return lambda made: [joined(made[:count], call.step), *made[count:]]


def _stacked(entries: Sequence[int], made: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of tuples, `[B,T,n,...]`, of those of their entries; the other results after.

    `entries`: how many the tuple of each operand has; 0: it is none.
    """
    rest = iter(made)
    whole = [torch.stack([next(rest) for _ in range(n)], 2) if n else next(rest) for n in entries]
    return [*whole, *rest]


def _finish(task: Task, name: str) -> Callable[[Any], Tensor] | None:
    """The function from a task's result to the call's; None where both are the same."""
    call, rows = task.call, task.rows
    n = 1 if task.way in (Way.TOKENS, Way.POOL) else len(call.form.micro_steps)
    if name in call.output_shapes:
        return None if n == 1 else partial(last_rows, n=n)
    if task.way is not Way.BACKWARD:
        return None
    name = name.removeprefix(GRADIENT)
    if name not in rows.operands:
        (start,) = (
            x for s, x in zip(call.step.states, call.initial, strict=True) if s.name == name
        )
        assert start is not None
        dtype = start.dtype
        return None if dtype is call.state_dtype else partial(torch.Tensor.to, dtype=dtype)
    x = rows.operands[name]
    (operand,) = (
        o for o in call.form.operands if name == o.name or name in row_names(o, call.micro)
    )
    gradient = rows_of(call, operand).gradient
    return partial(gradient, shape=x.shape, dtype=x.dtype, device=call.device, HV=call.HV)


def chunk_refusal(form: NormalForm) -> str | None:
    """Why no chunk form of `form` is derived; None if one is."""
    try:
        chunk_program(form)
    except NotLowered as refused:
        return refused.reason
    return None
