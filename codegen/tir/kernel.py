"""Tiled kernels as TIR for a CPU: one function per kernel, over a range of work items.

A work item is a sequence (or, of a kernel parallel over chunks, a chunk), a value head and a part
of the value axis. The caller shares items among its own threads and passes each a piece of scratch:
the function allocates nothing, starts nothing, and needs no runtime of TVM's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import PrimType
from tvm.tirx import Buffer, Expr, PrimFunc, Var

from ..buffers import BufferId
from ..interface import Buffer as Stored
from ..interface import Parameter, Role, Signature, loaded, stored
from ..plan import Kernel, Loop
from ..tile import TIMES, Axes, Axis, Tile
from ..tiled import Advance, Begin, Finish, Load, Source, Store, Use
from ..tiling import tile
from .code import Code, Index, int32, int64
from .config import TvmConfig
from .decayed import rooms
from .frame import LINE, Ahead, Frame, Rows, Shapes, allocate, placed
from .products import transpose
from .schedule import Made, Region, Transpose, schedule
from .steps import compute
from .transfer import STORAGE, Transfers, WorkItem
from .values import Values

# columns of the tables of work, a row per sequence and per chunk, in int64
SEQUENCE = ("batch", "first token in it", "tokens", "first token of all", "first chunk of all")
CHUNK = ("sequence", "chunk within it")
_PART = 300  # statements in a function: LLVM takes time that grows with the square of them


@dataclass(frozen=True, slots=True, eq=False)
class TirKernel:
    """A printed kernel: the function, and the functions of parts of a chunk that it calls.

    Its arguments: the tensors of `parameters`; the tables `sequences` [N,5] and `chunks` [M,2];
    `scratch`, float32 [`scratch`]; `HV`; the floats of `numbers`; `begin` and `end`, items
    of (N or M) * HV * v_programs.
    """

    name: str
    loop: Loop
    function: PrimFunc
    parts: tuple[PrimFunc, ...]
    parameters: tuple[Parameter, ...]
    tensors: tuple[str, ...]  # their shapes and dtypes, for readers
    numbers: tuple[str, ...]
    v_programs: int
    chunk: int
    scratch: int
    stores: tuple[Stored, ...]
    private: frozenset[BufferId]


def print_tir(
    kernel: Kernel,
    signature: Signature,
    config: TvmConfig,
    private: frozenset[BufferId] = frozenset(),
    *,
    one_token: bool = False,
) -> TirKernel:
    """`kernel` as TIR for `signature`.

    `private`: buffers that hold one sequence and head at a time; the caller runs the kernels that
    read them before the next sequence or head. `one_token`: of a scan over tokens, the kernel for a
    single one: its tensors have no time axis, and it must be given first states.
    """
    return _Printer(kernel, signature, config, private, one_token).print()


def print_number(name: str, value: int) -> PrimFunc:
    """A function that returns a number, through which a library tells callers its constants."""
    returns = tirx.Return(tirx.IntImm("int64", value))
    function = PrimFunc([], returns, ret_type=PrimType("int64"))
    return function.with_attr("global_symbol", name)


class _Printer:
    def __init__(
        self,
        kernel: Kernel,
        signature: Signature,
        config: TvmConfig,
        private: frozenset[BufferId],
        one_token: bool,
    ) -> None:
        self._kernel = tile(kernel, signature, config.tiles)
        self._private = private
        self._signature = signature
        self._one_token = one_token
        self._stores = stored(kernel, signature, STORAGE)
        self._buffers = {b.name: b for b in (*self._stores, *loaded(kernel, signature, STORAGE))}
        statements = self._kernel.statements
        self._ends = [end for s in statements if isinstance(s, Advance) for end in s.ends]
        self._shapes = Shapes(self._kernel, config)
        self._schedule = schedule(self._kernel)
        self._places, self._size = allocate(self._schedule, self._shapes)
        for region, numbers in rooms(self._schedule, self._shapes).items():
            self._places[region] = placed(region, self._size, self._shapes)
            self._size += -(-numbers // LINE) * LINE
        self._outside: dict[Region, Rows] = {}
        loads = (s for s in statements if isinstance(s, Load) and s.source is Source.NUMBER)
        self._numbers = {str(s.of): Var(f"number_{s.of}", "float32") for s in loads}
        self._heads = Var("HV", "int64")
        self._scratch = tirx.decl_buffer(
            (int64(self._size),), "float32", "scratch", data_alignment=4, layout=None
        )
        rows = Var("N", "int64"), Var("M", "int64")
        self._tables = [
            tirx.decl_buffer((n, int64(len(of))), "int64", name, data_alignment=8, layout=None)
            for n, of, name in zip(rows, (SEQUENCE, CHUNK), ("sequences", "chunks"), strict=True)
        ]

    def print(self) -> TirKernel:
        """The kernel, statement by statement."""
        kernel, entry, code = self._kernel, Code(), Code()
        given = self._signature, self._buffers, kernel, entry, self._heads, self._private
        transfers = Transfers(*given, not self._one_token)
        begin, end = Var("begin", "int64"), Var("end", "int64")
        self._code, self._transfers = code, transfers
        self._flat_tables = [entry.flat(x) for x in self._tables]
        with code.loop(begin, end, "item", "int64") as item:
            self._item(item)
        entry.emit(code.body())
        declared = [x.declared for x in transfers.tensors.values()]
        arguments = [*declared, *self._tables, self._scratch, self._heads]
        arguments += [*self._numbers.values(), begin, end]
        function = PrimFunc(arguments, entry.body())
        function = function.with_attr("global_symbol", kernel.name)
        return TirKernel(
            name=kernel.name,
            loop=kernel.scan,
            function=function.with_attr("tirx.noalias", True),
            parts=tuple(code.parts),
            parameters=tuple(transfers.tensors),
            tensors=tuple(_shown(x.declared) for x in transfers.tensors.values()),
            numbers=tuple(self._numbers),
            v_programs=kernel.v_parts,
            chunk=self._shapes.chunk,
            scratch=self._size,
            stores=self._stores,
            private=self._private,
        )

    def _item(self, item: Index) -> None:
        code, kernel = self._code, self._kernel
        rest = item
        value: Expr = int64(0)
        if kernel.v_parts > 1:
            part = tirx.truncmod(item, int64(kernel.v_parts))
            value = code.bind("value", part * kernel.extents[Axis.V])
            rest = code.bind("rest", tirx.truncdiv(item, int64(kernel.v_parts)))
        head = code.bind("head", tirx.truncmod(rest, self._heads))
        number_ = code.bind("number", tirx.truncdiv(rest, self._heads))
        if kernel.scan is Loop.PARALLEL:
            sequence = code.bind("sequence", self._table(1, number_, 0))
            chunk = code.bind("chunk", self._table(1, number_, 1))
            self._chunk(sequence, head, value, chunk)
            return
        if not kernel.pooled:
            self._scan(number_, head, value, number_, number_)
            return
        first = code.bind("slot", self._transfers.slot("before", number_))
        last = code.bind("next", self._transfers.slot("after", number_))
        with code.when(tirx.all(first >= int64(0), last >= int64(0))):
            self._scan(number_, head, value, first, last)

    def _scan(self, number_: Expr, head: Expr, value: Expr, first: Expr, last: Expr) -> None:
        """A scan of a sequence, whose first and last states are the ones of those numbers."""
        code, kernel = self._code, self._kernel
        work = self._work(number_, head, value, int64(0))
        frame = self._frame(int32(0), int32(0), {})
        for start, use in self._ends:
            if self._stays(start, use.value):  # read and written where the call has them
                for role, t, at in ((Role.INITIAL, start, first), (Role.FINAL, use.value, last)):
                    self._outside[Region(t)] = self._transfers.state(role, start, work, at)
        for s in kernel.before:
            if isinstance(s, Load) and Region(s.value) in self._places:
                self._transfers.load(frame, s, work)
            elif isinstance(s, Begin) and Region(s.value) not in self._outside:
                self._transfers.begin(frame, s, work, first)
        if self._one_token:
            self._chunk(number_, head, value, int64(0))
        else:
            length = code.bind("length", self._table(0, number_, 2))
            size = int64(kernel.chunk)
            count = code.bind("count", tirx.truncdiv(length + (size - 1), size))
            with code.loop(int64(0), count, "turn", "int64") as turn:
                reverse = kernel.scan is Loop.REVERSE
                chunk = code.bind("chunk", count - 1 - turn) if reverse else turn
                self._chunk(number_, head, value, chunk)
        for s in kernel.after:
            if isinstance(s, Finish) and Region(s.value) not in self._outside:
                self._transfers.finish(frame, s, work, last)

    def _stays(self, start: Tile, end: Tile) -> bool:
        """Whether a single token's carry needs no copy in scratch: rows are of whole vectors."""
        computed = bool(end.args) and end in self._schedule.regions
        ends = [use.value for _, use in self._ends]
        whole = self._shapes.extent(start.axes[-1]) % self._shapes.lanes == 0
        # in a pool both may be one
        apart = not self._kernel.pooled or self._schedule.in_place.get(end) == start
        return self._one_token and apart and whole and computed and ends.count(end) == 1

    def _table(self, table: int, row: Expr, column: int) -> Expr:
        width = len((SEQUENCE, CHUNK)[table])
        return tirx.BufferLoad(self._flat_tables[table], [row * width + column])

    def _work(self, sequence: Expr, head: Expr, value: Expr, chunk: Expr) -> WorkItem:
        bind = self._code.bind
        start = bind("start", chunk * self._shapes.chunk)
        return WorkItem(
            heads=self._heads,
            head=head,
            batch=bind("batch", self._table(0, sequence, 0)),
            row=bind("row", self._table(0, sequence, 1) + start),
            flat=bind("flat", self._table(0, sequence, 3) + start),
            start=start,
            index=bind("index", self._table(0, sequence, 4) + chunk),
            chunk=chunk,
            value=value,
        )

    def _frame(self, valid: Expr, first: Expr, ahead: Mapping[Tile, Sequence[Ahead]]) -> Frame:
        return Frame(
            self._code, self._shapes, self._schedule, self._places, self._scratch, valid, first,
            self._numbers, ahead, self._outside,
        )  # fmt: skip

    def _ahead(self, work: WorkItem) -> dict[Tile, list[Ahead]]:
        """Rows that products prefetch: operands of the next chunk, and this chunk's results early.

        Products of a row per token share them evenly; a result's own or one before it asks for it.
        """
        products = [t for t in self._schedule.products if _in_rows(t.axes)]
        ahead: dict[Tile, list[Ahead]] = {t: [] for t in products}
        further = -1 if self._kernel.scan is Loop.REVERSE else 1
        done: list[Tile] = []
        for s in (step.statement for step in self._schedule.steps):
            if isinstance(s, Load):
                rows = self._transfers.source(s, work)
                first = rows.first + rows.stride * (further * self._shapes.chunk)
                rows = replace(rows, first=first)
                of, axes, asking = s.of, s.value.axes, products
            elif isinstance(s, Store):
                rows = self._transfers.buffer(s.buffer, s.axes, work)
                of, axes, asking = s.buffer, s.axes, done
            else:
                done += [s.value] if s.value in ahead else []
                continue
            if asking and _in_rows(axes) and of not in self._private:
                asks = Ahead(rows, write=isinstance(s, Store))
                ahead[min(asking, key=lambda x: len(ahead[x]))].append(asks)
        return ahead

    def _chunk(self, sequence: Expr, head: Expr, value: Expr, chunk: Expr) -> None:
        code, size = self._code, self._shapes.chunk
        work = self._work(sequence, head, value, chunk)
        left = code.bind("left", self._table(0, sequence, 2) - chunk * size)
        whole = tirx.Select(left < int64(size), left, int64(size))
        valid = code.bind("valid", tirx.Cast("int32", whole))
        first = code.bind("first", tirx.Cast("int32", chunk * size))
        frame = self._frame(valid, first, self._ahead(work))
        steps = deque(self._schedule.steps)
        while steps:
            with code.part(f"{self._kernel.name}_part{len(code.parts)}") as does:
                enough = code.emitted + _PART
                while steps and code.emitted < enough:
                    step = steps.popleft()
                    does.append(step.does)
                    self._statement(frame, step.statement, work)
        for start, use in self._ends:
            kept = (*self._schedule.in_place, start)
            if use.value not in kept and Region(start) not in self._outside:
                _assign(frame, start, use)

    def _statement(self, frame: Frame, s: Load | Made | Transpose | Store, work: WorkItem) -> None:
        if isinstance(s, Load):
            self._transfers.load(frame, s, work)
        elif isinstance(s, Store):
            self._transfers.store(frame, s, work)
        elif isinstance(s, Transpose):
            transpose(frame, s.value)
        else:
            compute(frame, s)


def _shown(x: Buffer) -> str:
    sizes = (str(n.value) if isinstance(n, tirx.IntImm) else n.name for n in x.shape)
    return f"[{','.join('*' if '_n' in n else n for n in sizes)}] {x.dtype}"


def _in_rows(axes: Axes) -> bool:
    """Whether a tile is a row of channels for each token."""
    return [a in TIMES for a in axes] == [True, False]


def _assign(frame: Frame, start: Tile, end: Use) -> None:
    """The carry of the next chunk."""
    for point in frame.points(start.axes):
        value = Values(frame, start.axes[-1]).at(end, point)
        frame.write(Region(start), point, value, frame.lanes)
