"""What each thread of an OpenMP team runs: kernels on pieces of work, with no interpreter involved.

Threads that run Python wait for its lock in turn, tens of microseconds each: on 16 cores that took
longer than the kernels of a usual call. So the loop over pieces is compiled as well. It calls
kernels by the C interface of tvm-ffi, of which this module knows the layout of arguments: pairs of
64-bit words, a type and a value.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache

import tvm_ffi
from torch import Tensor
from tvm import tirx
from tvm.tirx import Expr, PrimFunc, Var

from ...codegen.tir.code import Code, int32, int64
from .build import Function, host_cpu, symbol

_INT, _FLOAT, _DLTENSOR, _TENSOR = 1, 3, 7, 70  # types of arguments (tvm/ffi/c_api.h)
_KERNEL = 4  # words that describe a kernel
_CPU, _FLOAT32 = 1, 2 | 32 << 8 | 1 << 16  # device and dtype in a DLTensor (dlpack.h)
_ROW = 48  # bytes of a DLTensor
_NAME = "chunkwise_worker"


class Arguments:
    """Those of a kernel, for each thread: all but the last two, which say which items to do.

    `own`: by position, float32 tensors of which each thread has one row.
    """

    def __init__(
        self, function: Function, values: Sequence[object], own: Mapping[int, Tensor], threads: int
    ) -> None:
        self._kept: list[object] = []
        words: list[int] = []
        for x in values:
            if isinstance(x, Tensor):
                lent = tvm_ffi.from_dlpack(x)
                self._kept.append(lent)
                words += (_TENSOR, lent.__chandle__())
            elif isinstance(x, float):
                words += (_FLOAT, *struct.unpack("q", struct.pack("d", x)))
            else:  # None: each thread has its own
                assert x is None or isinstance(x, int)
                words += (_INT, x or 0)
        words += (_INT, 0, _INT, 0)
        self.words = len(words)
        self.function = function
        self.memory = array("q", words) * threads
        for position, rows in own.items():
            first = self._rows(rows, threads)
            self.memory[2 * position :: self.words] = array("q", (_DLTENSOR,) * threads)
            places = range(first, first + threads * _ROW, _ROW)
            self.memory[2 * position + 1 :: self.words] = array("q", places)

    def _rows(self, rows: Tensor, threads: int) -> int:
        """The address of DLTensors of the rows, one for each thread, side by side."""
        sizes = array("q", (*rows.shape[1:], *rows.stride()[1:]))
        at, count = sizes.buffer_info()
        axes = count // 2
        one = (0, _CPU, axes | _FLOAT32 << 32, at, at + 8 * axes, 0)
        tensors = array("q", one) * threads
        data, step = rows.data_ptr(), rows.stride(0) * rows.itemsize
        tensors[:: len(one)] = array("q", range(data, data + threads * step, step))
        self._kept += (sizes, tensors, rows)
        return tensors.buffer_info()[0]


def described(kernels: Sequence[tuple[Arguments, int]]) -> array[int]:
    """What the worker is given: kernels, and how many items each makes of one of a piece.

    The second word is not 0 once a kernel has failed.
    """
    words = [len(kernels), 0]
    for arguments, each in kernels:
        address, _ = arguments.memory.buffer_info()
        words += (arguments.function.__chandle__(), address, arguments.words, each)  # type: ignore[attr-defined]
    return array("q", words)


@lru_cache(maxsize=1)
def worker() -> int | None:
    """The address of `void worker(void *)`; None where nothing can be linked."""
    return symbol(_worker(), host_cpu())


def _worker() -> PrimFunc:
    """Takes pieces of the team's loop; of several kernels, one item after the other."""
    code = Code()
    data = tirx.decl_buffer((int64(1 << 48),), "int64", "data", layout=None)
    bounds, result = (
        tirx.decl_buffer((2,), "int64", name, scope="", layout=None)
        for name in ("bounds", "result")
    )
    for buffer in (bounds, result):
        code.emit(tirx.AllocBuffer(buffer))

    def address(buffer: tirx.Buffer, at: int = 0) -> Expr:
        return tirx.address_of(tirx.BufferLoad(buffer, [int32(at)]))

    def word(at: Expr | int) -> Expr:
        return tirx.BufferLoad(data, [int64(at) if isinstance(at, int) else at])

    thread = code.bind(
        "thread", tirx.Cast("int64", tirx.call_extern("int32", "omp_get_thread_num"))
    )
    count = code.bind("count", word(0))
    more = tirx.call_extern(
        "int8", "GOMP_loop_dynamic_next", address(bounds, 0), address(bounds, 1)
    )
    with code.whilst(more != tirx.IntImm("int8", 0)):
        begin = code.bind("begin", tirx.BufferLoad(bounds, [int32(0)]))
        items = code.bind("items", tirx.BufferLoad(bounds, [int32(1)]) - begin)
        step = code.bind("step", tirx.Select(count.equal(int64(1)), items, int64(1)))
        with (
            code.loop(int64(0), tirx.truncdiv(items, step), "turn", "int64") as turn,
            code.loop(int64(0), count, "kernel", "int64") as kernel,
        ):
            at = code.bind("at", kernel * _KERNEL + 2)
            words = code.bind("words", word(at + 2))
            first = code.bind("first", (begin + turn * step) * word(at + 3))
            start = word(at + 1) + thread * words * 8
            given = tirx.decl_buffer((int64(1 << 48),), "int64", "given", layout=None)
            place = Var("place", given.data.ty)
            code.emit(tirx.Bind(place, tirx.reinterpret(given.data.ty, start)))
            code.emit(tirx.DeclBuffer(given, data=place))
            code.emit(tirx.BufferStore(given, first, [words - 3]))
            code.emit(tirx.BufferStore(given, first + step * word(at + 3), [words - 1]))
            for n in range(2):
                code.emit(tirx.BufferStore(result, int64(0), [int32(n)]))
            failed = tirx.call_extern(
                "int32",
                "TVMFFIFunctionCall",
                tirx.reinterpret("handle", word(at)),
                place,
                tirx.Cast("int32", tirx.truncdiv(words, int64(2))),
                address(result),
            )
            with code.when(failed != int32(0)):
                code.emit(tirx.BufferStore(data, int64(1), [int64(1)]))
    code.emit(tirx.Evaluate(tirx.call_extern("void", "GOMP_loop_end_nowait")))
    memory = Var("memory", data.data.ty)
    body = tirx.SeqStmt([tirx.DeclBuffer(data, data=memory), code.body()])
    return PrimFunc([memory], body).with_attr("global_symbol", _NAME)
