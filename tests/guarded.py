"""Calls of the TVM engine whose every tensor ends, or begins, where memory does.

    python -m tests.guarded kda

runs forward, backward and `step` of operands that lie in memory in every way, and compares them
with the float64 token loop. What a kernel is given (operands, states, tables, cotangents, results,
buffers, scratch) lies directly before a page that nobody may touch, and in a second run directly
behind one: what reads or writes past it ends the process with SIGSEGV. Tensors are moved as
kernels take them, so that copies which the engine made of them are guarded as well.

With `--control` the table of sequences is off by one token, for the net to be seen to hold.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import chunkwise as cw
import torch
from chunkwise.codegen.interface import Role
from chunkwise.codegen.tir.kernel import TirKernel
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tvm import engine as tvm_engine
from chunkwise.runtime.tvm import threads as tvm_threads
from chunkwise.runtime.tvm.build import Function
from chunkwise.runtime.tvm.threads import Work
from torch import Tensor

from tests.harness import Sizes
from tests.layout_calls import TURNS, check_call, check_steps
from tests.tolerances import BY_DTYPE, FLOAT32_HARD

_PAGE = mmap.PAGESIZE
_NONE = 0  # PROT_NONE of mprotect
_functions, _tables = tvm_engine.functions, tvm_engine._tables
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Side(Enum):
    """Where the page lies that nobody may touch."""

    BEHIND = "behind"
    BEFORE = "before"


# ---------------------------------------------------------------- memory


def _walled(x: Tensor, side: Side, rows: int, numbers: int) -> tuple[Tensor, int, int]:
    """Memory of `rows` times so many numbers of x's dtype, each between pages of no access.

    Returns all of it, where the first piece begins on that side, and how far apart pieces are.
    """
    size = numbers * x.itemsize
    room = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, _PAGE + rows * (room + _PAGE))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    base = torch.frombuffer(memory, dtype=x.dtype)
    for n in range(rows + 1):
        if protect(base.data_ptr() + n * (room + _PAGE), _PAGE, _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = _PAGE + (room - size if side is Side.BEHIND else 0)
    return base, first // x.itemsize, (room + _PAGE) // x.itemsize


def _once(x: Tensor) -> Tensor:
    """Each number in memory once."""
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(axis, 0, 1)
    return x


@dataclass(slots=True, eq=False)
class Wall:
    """The tensors of some kernels, moved to ends of memory."""

    side: Side
    _moved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _read: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def moved(self, x: Tensor, *, read: bool) -> Tensor:
        """The same numbers at the same strides; between them NaN, or a number far off.

        `read`: kernels must leave it alone.
        """
        if not x.numel():
            return x
        if id(x) not in self._moved:
            extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            base, first, _ = _walled(x, self.side, 1, extent)
            flat = base[first : first + extent]
            flat.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)
            moved = base.as_strided(x.shape, x.stride(), first)
            _once(moved).copy_(_once(x))
            self._moved[id(x)] = x, moved
            if read:
                bits = flat.view(_BITS[x.itemsize])
                self._read.append((bits, bits.clone()))
        return self._moved[id(x)][1]

    def rows(self, x: Tensor) -> Tensor:
        """Memory of the shape of `x`, every row of its first axis at an end of pages of its own."""
        if not x.numel():
            return x
        if id(x) not in self._moved:
            base, first, step = _walled(x, self.side, len(x), x[0].numel())
            moved = base.as_strided(x.shape, (step, *x[0].contiguous().stride()), first)
            self._moved[id(x)] = x, moved.fill_(torch.nan)
        return self._moved[id(x)][1]

    def arguments(self, kernel: TirKernel, values: Sequence[object]) -> list[object]:
        """What a kernel is given; of its scratch no more than it asked for."""
        count = len(kernel.parameters)
        read = {
            n for n, p in enumerate(kernel.parameters) if p.role in (Role.OPERAND, Role.INITIAL)
        } | {count, count + 1}  # the tables
        given = list(values)
        if isinstance(given[count + 2], Tensor):
            given[count + 2] = given[count + 2][: kernel.scratch].clone()
        return [
            self.moved(x, read=n in read) if isinstance(x, Tensor) else x
            for n, x in enumerate(given)
        ]

    def give_back(self) -> None:
        """What kernels wrote, where the engine looks for it."""
        for now, before in self._read:
            assert torch.equal(now, before), "a kernel wrote to an operand, a state or a table"
        for x, moved in self._moved.values():
            if x.is_contiguous() and not torch.equal(_bits(x), _bits(moved)):
                x.copy_(moved)


def _bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.itemsize])


# ---------------------------------------------------------------- the engine within it


@dataclass(frozen=True, slots=True, eq=False)
class _Kernel:
    """A compiled kernel that sees tensors between walls only."""

    net: Net
    kernel: TirKernel
    function: Function

    def __call__(self, *values: object) -> None:
        wall = Wall(self.net.side)
        self.function(*wall.arguments(self.kernel, values))
        wall.give_back()
        self.net.calls += 1


@dataclass(slots=True, eq=False)
class Net:
    """Put in place of what the engine compiles and of what shares its work among threads."""

    side: Side = Side.BEHIND
    calls: int = 0

    def functions(self, kernels: Sequence[TirKernel], cpu: object) -> list[_Kernel]:
        built = _functions(kernels, cpu)
        return [_Kernel(self, k, f) for k, f in zip(kernels, built, strict=True)]

    def run(self, works: Sequence[Work], items: int, threads: int) -> None:
        wall = Wall(self.side)
        tvm_threads.run([self._walled(wall, w) for w in works], items, threads)
        wall.give_back()
        self.calls += len(works)

    def _walled(self, wall: Wall, work: Work) -> Work:
        given = work.function
        assert isinstance(given, _Kernel)
        scratch = len(given.kernel.parameters) + 2
        own = {
            n: wall.rows(x[:, : given.kernel.scratch] if n == scratch else x)
            for n, x in work.own.items()
        }
        values = wall.arguments(given.kernel, work.values)
        return replace(work, function=given.function, values=values, own=own)


# ---------------------------------------------------------------- what is run

C = tvm_engine.configuration().chunk
# no whole vector of channels, then whole ones only; lengths around a chunk, unfinished ones last
ODD = Sizes(H=2, HV=4, K=5, V=19, initial=True, dtype=torch.float32)
WHOLE = Sizes(
    H=2, HV=2, K=16, V=32, initial=True, dtype=torch.bfloat16, gate_dtype=torch.float32
).packed(C, 0, C + 3)
EVERY = range(TURNS)


def check(name: str, net: Net) -> None:
    """All calls of a recurrence, on that side."""
    op: cw.Recurrence = getattr(cw.library, name)
    for sizes, turns, threads in (
        (ODD, EVERY, 1),
        (ODD.packed(C - 1, 1, 0, C + 2), EVERY[1::5], 2),
        (WHOLE, EVERY[::4], 1),
    ):
        torch.set_num_threads(threads)
        limit = FLOAT32_HARD if sizes.dtype is torch.float32 else BY_DTYPE[sizes.dtype]
        for turn in turns:
            at = sizes.lengths or (sizes.T,) * sizes.B
            print(f"{name}, {net.side.value}: {at} K={sizes.K}, turn {turn}", flush=True)
            check_call(op, sizes, turn, "tvm", limit)
    for turn in EVERY[::2]:
        print(f"{name}, {net.side.value}: steps, turn {turn}", flush=True)
        check_steps(op, replace(ODD, T=2), turn, "tvm", FLOAT32_HARD)


def _off_by_one(side: Side) -> object:
    """Tables whose last sequence has a token more, or whose first begins a token sooner."""

    def tables(*of: object) -> tuple[Tensor, Tensor, int]:
        *tables, longest = _tables(*of)
        sequences, chunks = (x.clone() for x in tables)
        if side is Side.BEHIND:
            sequences[-1, 2] += 1
        else:
            sequences[0, 1] -= 1
            sequences[0, 3] -= 1
        return sequences, chunks, longest

    return tables


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.guarded", description=__doc__)
    parser.add_argument("name", help="a recurrence of the library")
    parser.add_argument("--control", choices=[s.value for s in Side])
    options = parser.parse_args()
    faulthandler.enable()
    net = Net()
    vars(selection)["folders"] = lambda: ()  # nothing tuned
    vars(tvm_engine).update(functions=net.functions, run=net.run)
    if options.control:
        net.side = Side(options.control)
        check_call(getattr(cw.library, options.name), ODD, 0, "tvm", FLOAT32_HARD)
        print("as it is: ran", flush=True)
        vars(tvm_engine)["_tables"] = _off_by_one(net.side)
        Records.forget()
        check_call(getattr(cw.library, options.name), ODD, 0, "tvm", FLOAT32_HARD)
        return
    for net.side in Side:
        check(options.name, net)
    print(f"{net.calls} calls of kernels")


if __name__ == "__main__":
    main()
