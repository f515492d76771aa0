"""Statements of TVM's TIR as they accumulate: loops, vectors, accumulators, typed loads and stores.

Everything is addressed flat and every vector is explicit, so that no pass of TVM has to vectorise,
flatten or unroll: the rest of its lowering takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from tvm import tirx
from tvm.tirx import Buffer, BufferType, Expr, PrimFunc, Stmt, Var

Index: TypeAlias = Expr | int


def int32(value: Index) -> Expr:
    """A number as an int32; an expression as it is."""
    return tirx.IntImm("int32", value) if isinstance(value, int) else value


def int64(value: Index) -> Expr:
    """A number or an int32 expression as an int64."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else tirx.Cast("int64", value)


def vector_type(dtype: str, lanes: int) -> str:
    """The name of the type of `lanes` numbers of `dtype`."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def number(value: float, lanes: int, dtype: str = "float32") -> Expr:
    """`value` in every lane."""
    make = tirx.FloatImm if dtype.startswith("float") else tirx.IntImm
    return broadcast(make(dtype, value), lanes)


def broadcast(x: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return x if lanes == 1 else tirx.Broadcast(x, lanes)


def ramp(start: Index, lanes: int) -> Expr:
    """start, start + 1, ... as int32."""
    start = int32(start)
    return start if lanes == 1 else tirx.Ramp(start, int32(1), lanes)


def multiply_add(x: Expr, y: Expr, z: Expr) -> Expr:
    """x y + z, rounded once where the CPU can."""
    return tirx.call_llvm_pure_intrin(str(z.ty.dtype), "llvm.fmuladd", x, y, z)


@dataclass(frozen=True, slots=True, eq=False)
class Accumulator:
    """A vector register that statements update."""

    buffer: Buffer

    def get(self) -> Expr:
        """Its value."""
        return tirx.BufferLoad(self.buffer, [int32(0)])

    def set(self, value: Expr) -> Stmt:
        """The statement that gives it a value."""
        return tirx.BufferStore(self.buffer, value, [int32(0)])


class Code:
    """A function's statements; a loop or a branch nests those emitted within it.

    `parts`: the functions of its own to which it moved some of them.
    """

    def __init__(self) -> None:
        self._open: list[list[Stmt]] = [[]]
        self.emitted = 0
        self.parts: list[PrimFunc] = []

    def emit(self, statement: Stmt) -> None:
        self.emitted += 1
        self._open[-1].append(statement)

    @contextmanager
    def part(self, name: str) -> Iterator[list[str]]:
        """Statements in a function of their own, which takes the values that they refer to.

        Yields a list for a description in words, which readers find in the function's attributes.
        """
        self._open.append([])
        does: list[str] = []
        yield does
        body = _sequence(self._open.pop())
        parameters, arguments = [], []
        for x in tirx.analysis.undefined_vars(body, []):
            if isinstance(x.ty, BufferType):
                parameters.append(Var(x.name, x.data.ty))
                arguments.append(x.data)
                body = tirx.SeqStmt([tirx.DeclBuffer(x, data=parameters[-1]), body])
            else:
                parameters.append(x)
                arguments.append(x)
        function = PrimFunc(parameters, body).with_attr("global_symbol", name)
        function = function.with_attr("does", ", ".join(does))
        self.parts.append(function.with_attr("tirx.noalias", True))
        self.emit(tirx.Evaluate(tirx.call_extern("void", name, *arguments)))

    def body(self) -> Stmt:
        """Everything emitted."""
        (statements,) = self._open
        return _sequence(statements)

    def bind(self, name: str, value: Expr) -> Expr:
        """A variable with that value: of an index; of numbers a register.

        TVM substitutes values that it knows into later expressions, to simplify them: a polynomial
        in a polynomial would become exponentially many terms.
        """
        if str(value.ty.dtype) not in ("int32", "int64"):
            return self.accumulator(value).get()
        var = Var(name, value.ty)
        self.emit(tirx.Bind(var, value))
        return var

    @contextmanager
    def loop(self, begin: Index, end: Index, name: str, dtype: str = "int32") -> Iterator[Index]:
        """A loop over [begin, end); one of a single known turn is not emitted as a loop."""
        if isinstance(begin, int) and isinstance(end, int):
            if end - begin == 1:
                yield begin
                return
            extent: Index = end - begin
        else:
            extent = end - begin
        var = Var(name, dtype)
        self._open.append([])
        yield var
        body = _sequence(self._open.pop())
        of_type = [tirx.IntImm(dtype, x) if isinstance(x, int) else x for x in (begin, extent)]
        self.emit(tirx.For(var, *of_type, tirx.ForKind.SERIAL, body))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Statements under a condition."""
        self._open.append([])
        yield
        body = _sequence(self._open.pop())
        self.emit(tirx.IfThenElse(condition, body, None))

    @contextmanager
    def whilst(self, condition: Expr) -> Iterator[None]:
        """Statements again and again while a condition holds."""
        self._open.append([])
        yield
        self.emit(tirx.While(condition, _sequence(self._open.pop())))

    def accumulator(self, value: Expr) -> Accumulator:
        """A register with a first value."""
        # scope "": on the stack, in registers after LLVM; "local" would become a call for memory
        buffer = tirx.decl_buffer((1,), value.ty.dtype, "acc", scope="", layout=None)
        self.emit(tirx.AllocBuffer(buffer))
        result = Accumulator(buffer)
        self.emit(result.set(value))
        return result

    def set(self, register: Accumulator, value: Expr) -> None:
        self.emit(register.set(value))

    def prefetch(self, buffer: Buffer, at: Expr, *, write: bool) -> None:
        """Ask for the line of cache that holds a number; no address is wrong."""
        address = tirx.address_of(tirx.BufferLoad(buffer, [at]))
        hints = [int32(int(write)), int32(3), int32(1)]  # to the nearest level; of data
        self.emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *hints)))

    def flat(self, buffer: Buffer) -> Buffer:
        """`buffer` as one row of numbers, which is how all are addressed here."""
        flat = tirx.decl_buffer(
            (int64(1 << 48),),
            buffer.dtype,
            f"{buffer.name}_flat",
            data=buffer.data,
            data_alignment=buffer.data_alignment,
            layout=None,
        )
        self.emit(tirx.DeclBuffer(flat, data=buffer.data))
        return flat

    def store(self, buffer: Buffer, at: Expr, value: Expr, lanes: int) -> None:
        """Numbers of float32 into memory, rounded to the buffer's dtype."""
        index = at if lanes == 1 else tirx.Ramp(at, tirx.const(1, at.ty.dtype), lanes)
        self.emit(tirx.BufferStore(buffer, _narrow(value, buffer.dtype, lanes), [index]))


def load(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """Numbers from memory, as float32 (integers as they are)."""
    index = at if lanes == 1 else tirx.Ramp(at, tirx.const(1, at.ty.dtype), lanes)
    return _widened(tirx.BufferLoad(buffer, [index]), buffer.dtype, lanes)


def _widened(x: Expr, dtype: str, lanes: int) -> Expr:
    if dtype == "float16":
        return tirx.Cast(vector_type("float32", lanes), x)
    if dtype == "bfloat16":  # by its bits: LLVM calls a function for each number
        bits = tirx.reinterpret(vector_type("uint16", lanes), x)
        wide = tirx.Cast(vector_type("uint32", lanes), bits)
        wide = tirx.shift_left(wide, number(16, lanes, "uint32"))
        return tirx.reinterpret(vector_type("float32", lanes), wide)
    return x


def _narrow(x: Expr, dtype: str, lanes: int) -> Expr:
    if dtype == "float16":
        return tirx.Cast(vector_type("float16", lanes), x)
    if dtype == "bfloat16":  # to nearest, ties to even
        bits = tirx.reinterpret(vector_type("uint32", lanes), x)
        sixteen, one = number(16, lanes, "uint32"), number(1, lanes, "uint32")
        odd = tirx.bitwise_and(tirx.shift_right(bits, sixteen), one)
        bits = tirx.shift_right(bits + (odd + number(0x7FFF, lanes, "uint32")), sixteen)
        low = tirx.Cast(vector_type("uint16", lanes), bits)
        return tirx.reinterpret(vector_type("bfloat16", lanes), low)
    return x


def _sequence(statements: list[Stmt]) -> Stmt:
    if len(statements) == 1:
        return statements[0]
    return tirx.SeqStmt(statements) if statements else tirx.Evaluate(int32(0))
