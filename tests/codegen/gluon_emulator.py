"""Runs printed Gluon on the CPU: shared memory, barriers and asynchronous products as they are.

Every partition is a thread; a barrier counts arrivals and bytes. What a product makes is unknown
until it is waited for, what TMA is sent is read only as the next wait for it begins, and slots of a
ring hold NaN until they are written. Numbers are float32 throughout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from chunkwise.codegen.gluon.library import sources
from torch import Tensor

Numbers = Any
_PATIENCE = 20.0  # seconds
_OWN = threading.local()  # of a program's thread: its number, products in flight, stores by TMA


class Pointer:
    """The address of an entry of a flat tensor, or of many."""

    def __init__(self, tensor: Tensor, at: Numbers = 0) -> None:
        self.tensor, self.at = tensor, at
        self.dtype = SimpleNamespace(element_ty=torch.float32)

    def __add__(self, offset: Numbers) -> Pointer:
        return Pointer(self.tensor, self.at + offset)


class Descriptor:
    """A matrix that TMA moves blocks of."""

    layout = "swizzled"

    def __init__(self, matrix: Tensor, block: Sequence[int]) -> None:
        self.matrix, self.block = matrix, tuple(block)

    def part(self, at: Sequence[Numbers]) -> Tensor:
        """A block, or its rows that the matrix has; it has to lie within its columns."""
        (row, column), (rows, columns) = map(int, at), self.block
        assert 0 <= row < self.matrix.shape[0], (row, self.matrix.shape)
        assert 0 <= column <= self.matrix.shape[1] - columns, (column, self.matrix.shape)
        return self.matrix[row : row + rows, column : column + columns]


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Numbers) -> None:
        self.data = data

    def index(self, slot: int) -> Shared:
        return Shared(self.data[slot])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        assert self.data.shape == x.shape
        self.data.copy_(x)


class Pending:
    """The sums of a product that may not be over."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Barrier:
    """Counts arrivals and bytes; `phase` ends when none is missing."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def _change(self, arrivals: int, expected: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += expected
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def wait(self, parity: int) -> None:
        """Until the phase of that parity is over."""
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase % 2 != parity, _PATIENCE)
        assert over, "a barrier at which nothing arrives"


def _multiply(
    a: Numbers, b: Shared, acc: Numbers, *, use_acc: bool = True, is_async: bool = False
) -> Pending:
    assert is_async
    left = a.data if isinstance(a, Shared) else a
    start = acc.value if isinstance(acc, Pending) else acc
    product = left.to(torch.float32) @ b.data
    made = Pending(start + product if use_acc else product)
    _OWN.products.append(made)
    return made


def _wait(outstanding: int, deps: Sequence[Pending]) -> Numbers:
    over = _OWN.products[: len(_OWN.products) - outstanding]
    assert all(any(x is p for p in over) for x in deps), "a product that may not be over"
    values = tuple(x.value for x in deps)
    return values[0] if len(values) == 1 else values


def _scan(x: Any, axis: int, combine: Any, *, reverse: bool = False) -> Any:
    """Sums in time, or those without a row's own."""
    added = x[1] if isinstance(x, tuple) else x
    ahead = added.flip(axis) if reverse else added
    sums = ahead.cumsum(axis)
    sums = sums - ahead if isinstance(x, tuple) else sums
    sums = sums.flip(axis) if reverse else sums
    return (sums, None) if isinstance(x, tuple) else sums


def _load(at: Pointer, mask: Numbers = True, other: float = 0.0) -> Tensor:
    place = torch.as_tensor(at.at)
    there = torch.as_tensor(mask).expand(place.shape)
    assert ((place >= 0) & (place < at.tensor.numel()))[there].all()
    found = at.tensor[torch.where(there, place, 0)]
    return torch.where(there, found, other).to(found.dtype)


def _store(at: Pointer, x: Tensor, mask: Numbers = True) -> None:
    place = torch.as_tensor(at.at)
    there = torch.as_tensor(mask).expand(place.shape)
    at.tensor[place[there]] = torch.as_tensor(x).expand(place.shape)[there]


def _arrive(barrier: Shared, *, count: int) -> None:
    barrier.data._change(count, 0)


def _fetch(desc: Descriptor, at: Sequence[Numbers], barrier: Shared, to: Shared) -> None:
    part = desc.part(at)
    to.store(torch.nn.functional.pad(part, (0, 0, 0, desc.block[0] - len(part))))
    barrier.data._change(0, -2 * to.data.numel())  # bytes of bfloat16


def _send(desc: Descriptor, at: Sequence[Numbers], source: Shared) -> None:
    part = desc.part(at)
    assert part.shape == source.data.shape
    _OWN.sent.append((part, source))


def _sent(outstanding: int) -> None:
    assert outstanding == 0
    for part, source in _OWN.sent:
        part.copy_(source.data)
    _OWN.sent.clear()


def _allocate(dtype: object, shape: Sequence[int], layout: object) -> Shared:
    if dtype is torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full([int(n) for n in shape], torch.nan))


def _specialise(partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    errors: list[BaseException] = []

    def run(partition: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _OWN.products, _OWN.sent = [], []
        try:
            partition(*arguments)
        except BaseException as why:  # told to the test's own thread
            errors.append(why)

    threads = [threading.Thread(target=run, args=p, daemon=True) for p in partitions]
    for t in threads:
        t.start()
    for t in threads:
        t.join(2 * _PATIENCE)
    if errors:
        raise errors[0]


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _jit


def _any(*_: Any, **__: Any) -> str:
    return "a layout"


_LANGUAGE = SimpleNamespace(
    constexpr=object, float32=torch.float32, bfloat16=torch.float32,
    int32=torch.int32, int64=torch.int64,
    NVMMADistributedLayout=_any, DotOperandLayout=_any, SliceLayout=_any, BlockedLayout=_any,
    SwizzledSharedLayout=_any, NVMMASharedLayout=SimpleNamespace(get_default_for=_any),
    arange=lambda a, b, layout: torch.arange(a, b), where=torch.where, exp=torch.exp,
    log=torch.log, abs=torch.abs,
    zeros=lambda shape, dtype, layout: torch.zeros([int(n) for n in shape]),
    maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)), exp2=torch.exp2,
    minimum=lambda x, y: torch.minimum(*map(torch.as_tensor, (x, y))), max=torch.amax,
    load=_load, store=_store, convert_layout=lambda x, layout: x,
    program_id=lambda axis: torch.tensor(_OWN.program), static_range=range,
    num_programs=lambda axis: torch.tensor(_OWN.programs), floor=torch.floor,
    full=lambda shape, value, dtype, layout: torch.zeros(shape) + value,
    zeros_like=torch.zeros_like, sum=torch.sum, associative_scan=_scan,
    allocate_shared_memory=_allocate, warp_specialize=_specialise, barrier=lambda: None,
)  # fmt: skip
_BARRIERS = SimpleNamespace(
    MBarrierLayout=_any, arrive=_arrive,
    init=lambda barrier, count: barrier.data.init(count),
    wait=lambda barrier, parity: barrier.data.wait(int(parity)),
    expect=lambda barrier, count: barrier.data._change(1, count),
)  # fmt: skip
NAMES: Mapping[str, Any] = {
    "gluon": SimpleNamespace(jit=_jit), "gl": _LANGUAGE, "mbarrier": _BARRIERS,
    "tma": SimpleNamespace(async_load=_fetch, async_store=_send, store_wait=_sent),
    "fence_async_shared": lambda: None, "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait,
}  # fmt: skip


def run(source: str, name: str, programs: int, arguments: Mapping[str, Any]) -> None:
    """Run the kernel `name` of a printed module, one program after the other."""
    lines = source.split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("# Triton 3.6"))
    space = dict(NAMES)  # in place of what the lines before import
    exec("\n".join(lines[start:]), space)
    function = space[name]
    _OWN.programs = programs
    for _OWN.program in range(programs):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        function(*(arguments[n] for n in names))


def called(*names: str) -> dict[str, Any]:
    """The device functions of these names and all that they call, as functions of tensors."""
    space = {**NAMES, "barrier": lambda: None}
    _OWN.products, _OWN.sent = [], []
    exec("\n".join(sources(names)), space)
    return space


def shared(*shape: int) -> Shared:
    """Shared memory in which nothing was written."""
    return _allocate(torch.float32, shape, _any())
