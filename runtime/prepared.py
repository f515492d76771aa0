"""Records of layouts of calls: the shapes are checked and the kernels compiled once for each.

Training steps and decoders repeat the layout of the call before, so that a call compares its layout
with that of the latest record and then runs the record.
"""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..dsl import errors
from .engines import EngineName, choose, load
from .saves import Saved

if TYPE_CHECKING:
    from .call import Call, Places
    from .engine import Engine
    from .tuned.artifact import Configuration

Values = Sequence[Any]  # tensors (or None) and numbers of a call, in the order of its op
Run = Callable[[Values], Sequence[Tensor]]  # from values to results
States = tuple[Tensor | None, ...]
_Parts = tuple[Callable[[Values], Any], Callable[[Values], Any]]
_R = TypeVar("_R")
_MOST = 4096  # records that are kept, of each kind
_NOTHING = {type(None)}


@dataclass(frozen=True, slots=True)
class _Latest(Generic[_R]):
    """The record that was found last, with its layout.

    Attributes:
        rest: what was given besides values, and how many these were.
        parts: take tensors out of values, and what must be None; None if all are tensors.
        others: values that are no tensors, in their places, where some are not None.
        alike: whether tensors lie as those did.
    """

    rest: Sequence[object]
    count: int
    parts: _Parts | None
    others: list[object] | None
    alike: Callable[..., bool]
    record: _R


class Records(Generic[_R]):
    """Records by layout: the latest is compared before the others are looked up."""

    _all: ClassVar[weakref.WeakSet[Records[Any]]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _R] = {}
        self._latest: _Latest[_R] | None = None
        self._all.add(self)

    def latest(self, values: Values, rest: Sequence[object]) -> _R | None:
        """The record that was found last, if it is of `rest` and of values that lie so in memory.

        Then gradients of these tensors are recorded as they were, if `rest` says whether torch
        records any, and torch.func and modes of torch are entered or not as they were.
        """
        latest = self._latest
        if latest is None or latest.rest != rest or latest.count != len(values):
            return None
        tensors = values
        if latest.parts is not None:
            take, absent = latest.parts
            if {*map(type, absent(values))} != _NOTHING:
                return None
            tensors = take(values)
        elif latest.others is not None:
            tensors = [x for x in values if isinstance(x, Tensor)]
            if latest.others != _others(values):
                return None
        return latest.record if latest.alike(*tensors) else None

    def find(self, values: Values, rest: Sequence[object], prepare: Callable[[], _R]) -> _R:
        """Another record, of values that lie so and of `rest`; made by `prepare` if need be.

        An error that `prepare` raises is not kept: the next such call prepares again.
        """
        tensors, others = [x for x in values if isinstance(x, Tensor)], _others(values)
        try:
            places = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        except RuntimeError:  # a tensor without strides, which `prepare` refuses by name
            return prepare()
        key = (*rest, *others, *places)
        if key not in self._known:
            made = prepare()
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = made
        found = self._known[key]
        self._latest = _Latest(rest, len(values), *_parts(values, others), _guard(tensors), found)
        return found

    @classmethod
    def forget(cls) -> None:
        """Drop every record of this process: configurations are selected anew."""
        for records in cls._all:
            records._latest = None
            records._known.clear()


def _parts(values: Values, others: list[object]) -> tuple[_Parts | None, list[object] | None]:
    """`parts` and `others` of the latest record: at most one of them is not None."""
    tensors = [n for n, x in enumerate(values) if isinstance(x, Tensor)]
    absent = [n for n, x in enumerate(values) if x is None]
    if len(tensors) == len(values):
        return None, None
    if len(tensors) < 2 or len(tensors) + len(absent) < len(values):
        return None, others
    return (itemgetter(*tensors), itemgetter(*absent, absent[0])), None  # of one, no tuple comes


def _others(values: Values) -> list[object]:
    """What is no tensor, in its place; other things than numbers and None equal nothing."""
    return [
        Tensor
        if isinstance(x, Tensor)
        else x
        if x is None or isinstance(x, numbers.Real)
        else x.item()
        if isinstance(x, np.ndarray) and x.ndim == 0
        else object()
        for x in values
    ]


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether as many tensors are like these in all that torch knows without their numbers.

    It is the comparison that torch makes for compiled graphs, one call for types, dtypes, devices,
    shapes, strides, what reading does to numbers (a negation, say), and modes that are entered. It
    takes no tensor twice.
    """
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    guards: Any = torch._C._dynamo.guards.TensorGuards
    made = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = made.check
    return check


class Way(Enum):
    """What of a recurrence is computed, and how."""

    CHUNKS = "forward, in chunks"
    TOKENS = "forward, token by token"
    POOL = "forward, token by token, on states of a pool"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is to prepare: one way of calls of a layout.

    Attributes:
        cotangents: of a backward, how those of the output and of the final states lie.
        config: instead of the one that serves such calls.
        segment: of a config for a GPU, tokens of a segment (0: none), instead of as many as such
            calls have.
        places: where values stand, if not in the order of the op.
        joined: whether ranks of a group have parts of its sequences: a `Join` is the last value.
        saved: what the forward keeps for the backward; its tiles are the last values.
    """

    call: Call
    way: Way
    cotangents: States = ()
    config: Configuration | None = None
    segment: int | None = None
    places: Places | None = None
    joined: bool = False
    saved: Saved | None = None

    def bare(self) -> Request:
        """The same for layouts alone: what is kept must not keep tensors."""
        pool = self.call.pool
        if pool is not None:
            states, accepted = tuple(map(_bare, pool.states)), _bare_if_any(pool.accepted)
            pool = replace(pool, states=states, indices=_bare(pool.indices), accepted=accepted)
        call = replace(
            self.call,
            operands={n: _bare(x) for n, x in self.call.operands.items()},
            initial=tuple(map(_bare_if_any, self.call.initial)),
            cu_seqlens=_bare_if_any(self.call.cu_seqlens),
            pool=pool,
        )
        return replace(self, call=call, cotangents=tuple(map(_bare_if_any, self.cotangents)))


def _bare_if_any(x: Tensor | None) -> Tensor | None:
    return None if x is None else _bare(x)


def _bare(x: Tensor) -> Tensor:
    """A tensor without contents that would lie in memory as `x` does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The compiled computation of calls of one layout.

    Attributes:
        run: from the values of a call to the results of its op.
        device_type: where it runs; autocast there may not change dtypes inside an engine.
        host_bounds: whether boundaries of packed sequences come from the host, to be looked at.
        kept: shape, dtype and device of what a forward keeps, whose parts are its last values.
    """

    run: Run
    device_type: str
    host_bounds: bool = False
    kept: tuple[tuple[int, ...], torch.dtype, torch.device] | None = None

    def __call__(self, values: Values) -> Sequence[Tensor]:
        """The results of a call of that layout."""
        if torch.is_autocast_enabled(self.device_type):
            with torch.autocast(self.device_type, enabled=False):
                return self.run(values)
        return self.run(values)


def chosen(operands: Iterable[Tensor], engine: str | None) -> EngineName:
    """The engine of a call with these operands: as named, else by their device."""
    given = list(operands)
    double = any(x.dtype is torch.float64 for x in given)
    return choose(given[0].device.type, engine, double=double)


def saves(call: Call, engine: str | None) -> Saved | None:
    """What the forward of calls like `call` keeps for the backward; None: nothing."""
    if 0 in (call.B, call.T, call.HV, call.K, call.V):
        return None
    serving = load(chosen(call.operands.values(), engine))
    return None if serving.refusal(call) is not None else serving.saves(call)


def prepare_forward(call: Call, engine: str | None, saved: Saved | None = None) -> Prepared:
    """What serves the forward of calls like `call`, which fills what is `saved` if any is.

    Raises:
        NotLowered, EngineUnavailable: as their names say.
    """
    serving = serving_engine(call, engine)
    way = serving.forward_way(call) if saved is None else Way.CHUNKS
    run = serving.prepare(Request(call, way, saved=saved).bare())
    bounds = call.cu_seqlens
    on_host = bounds is not None and bounds.device.type == "cpu"
    kept = None if saved is None else (saved.shape(call), call.dtype, call.device)
    return Prepared(run, call.device.type, on_host, kept)


def prepare_backward(
    call: Call, cotangents: States, engine: str | None, saved: Saved | None = None
) -> Prepared:
    """What serves the backward of calls like `call`, for cotangents like these.

    The values of such a call are the cotangents, then those of its forward, then what it `saved`.
    """
    request = Request(call, Way.BACKWARD, cotangents, saved=saved)
    return Prepared(serving_engine(call, engine).prepare(request.bare()), call.device.type)


def serving_engine(call: Call, engine: str | None) -> Engine:
    """The engine of a call, which it must admit; the reference engine where no kernel has work.

    Without channels, reads are zero and outputs what the step makes of zero; without tokens, the
    final states are the initial ones, and so are their gradients.
    """
    name = chosen(call.operands.values(), engine)
    if 0 not in (call.K, call.V):
        serving = load(name)
        serving.admit(call)
        if 0 not in (call.B, call.T, call.HV):
            return serving
    return load(EngineName.REFERENCE)


def prepare_step(
    call: Call, engine: str | None, usual: str | None = None, places: Places | None = None
) -> Prepared | None:
    """What serves single tokens like `call`, or a few whose states lie in a pool.

    It is a kernel; where none does, torch for a pool, else None.

    Args:
        engine: must serve, if it has kernels of single tokens at all.
        usual: serves if it can.
        places: of the values, if not in the order of the op.

    Raises:
        EngineUnavailable: the named engine has no kernel for this step.
        BadLayout: its kernels do not take a pool that lies so.
    """
    serving, way = load(chosen(call.operands.values(), engine or usual)), Way.TOKENS
    by_kernel = serving.has_steps and 0 not in (call.B, call.HV, call.K, call.V)
    reason = serving.token_refusal(call) if by_kernel else None
    if reason is not None and engine is not None:
        raise errors.EngineUnavailable(serving.name.value, reason)
    by_kernel = by_kernel and reason is None
    if call.pool is not None:
        way = Way.POOL
        serving = serving if by_kernel else load(EngineName.REFERENCE)
    elif not by_kernel:
        return None
    request = Request(call, way, places=places)
    return Prepared(serving.prepare(request.bare()), call.device.type)
