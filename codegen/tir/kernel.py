"""TileIR as TIR for a CPU: one function per Kernel, over a range of work items.

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
from ..chunk import Carried
from ..config import Dims
from ..expressions import unaliased
from ..interface import Buffer as Stored
from ..interface import Parameter, Role, Signature, stored
from ..plan import Kernel, Loop, sums_over
from ..tile import Axis, Tile, TileOp
from .code import Code, Index, int32, int64
from .config import TvmConfig
from .decayed import rooms
from .frame import LINE, Ahead, Frame, Rows, Shapes, allocate, placed
from .products import transpose
from .schedule import Action, Region, Step, schedule
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
        self._kernel = kernel
        self._private = private
        self._signature = signature
        self._one_token = one_token
        self._v_tile = _v_tile(kernel, signature.dims.V, config.v_tile)
        dims = Dims(signature.dims.K, self._v_tile)
        self._shapes = Shapes(config.chunk, dims, config)
        self._schedule = schedule(kernel)
        starts = [c.start for c in kernel.carried]
        self._places, self._size = allocate(self._schedule, starts, self._shapes)
        for region, numbers in rooms(self._schedule, self._shapes).items():
            self._places[region] = placed(region, self._size, self._shapes)
            self._size += -(-numbers // LINE) * LINE
        self._outside: dict[Region, Rows] = {}
        names = dict.fromkeys(str(t.attrs[0]) for t in kernel.order if t.op is TileOp.PARAM)
        self._numbers = {n: Var(f"number_{n}", "float32") for n in names}
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
        transfers = Transfers(
            self._signature,
            self._shapes.chunk,
            entry,
            self._heads,
            self._private,
            has_time=not self._one_token,
        )
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
            loop=kernel.loop,
            function=function.with_attr("tirx.noalias", True),
            parts=tuple(code.parts),
            parameters=tuple(transfers.tensors),
            tensors=tuple(_shown(x.declared) for x in transfers.tensors.values()),
            numbers=tuple(self._numbers),
            v_programs=self._signature.dims.V // self._v_tile,
            chunk=self._shapes.chunk,
            scratch=self._size,
            stores=stored(kernel, self._signature, STORAGE),
            private=self._private,
        )

    def _item(self, item: Index) -> None:
        code = self._code
        tiles = self._signature.dims.V // self._v_tile
        rest = item
        value: Expr = int64(0)
        if tiles > 1:
            value = code.bind("value", tirx.truncmod(item, int64(tiles)) * self._v_tile)
            rest = code.bind("rest", tirx.truncdiv(item, int64(tiles)))
        head = code.bind("head", tirx.truncmod(rest, self._heads))
        number_ = code.bind("number", tirx.truncdiv(rest, self._heads))
        if self._kernel.loop is Loop.PARALLEL:
            sequence = code.bind("sequence", self._table(1, number_, 0))
            chunk = code.bind("chunk", self._table(1, number_, 1))
            self._chunk(sequence, head, value, chunk)
            return
        work = self._work(number_, head, value, int64(0))
        frame = self._frame(int32(0), int32(0), {})
        moved = [c for c in self._kernel.carried if not self._stays(c)]
        for c in self._kernel.carried:
            if c not in moved:  # read and written where the call has them
                ends = (Role.INITIAL, c.start), (Role.FINAL, unaliased(c.end))
                for role, t in ends:
                    rows = self._transfers.state(role, c.start, work, number_)
                    self._outside[Region(t)] = rows
        for c in moved:
            self._transfers.first_carry(frame, c.start, work, number_)
        if self._one_token:
            self._chunk(number_, head, value, int64(0))
        else:
            length = code.bind("length", self._table(0, number_, 2))
            size = int64(self._shapes.chunk)
            count = code.bind("count", tirx.truncdiv(length + (size - 1), size))
            with code.loop(int64(0), count, "turn", "int64") as turn:
                reverse = self._kernel.loop is Loop.REVERSE
                chunk = code.bind("chunk", count - 1 - turn) if reverse else turn
                self._chunk(number_, head, value, chunk)
        for c in moved:
            self._transfers.last_carry(frame, c.start, work, number_)

    def _stays(self, c: Carried) -> bool:
        """Whether a single token's carry needs no copy in scratch: rows are of whole vectors."""
        end = unaliased(c.end)
        computed = bool(end.args) and end in self._schedule.regions
        ends = [unaliased(x.end) for x in self._kernel.carried]
        whole = self._shapes.extent(c.start.axes[-1]) % self._shapes.lanes == 0
        return self._one_token and whole and computed and ends.count(end) == 1

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
            split=self._v_tile < self._signature.dims.V,
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
        ahead: dict[Tile, list[Ahead]] = {t: [] for t in self._schedule.products if _in_rows(t)}
        further = -1 if self._kernel.loop is Loop.REVERSE else 1
        done: list[Tile] = []
        for step in self._schedule.steps:
            t, asking, name = step.tile, done, step.name
            if step.action is Action.LOAD:
                name = self._kernel.buffers.get(t)
                rows = self._transfers.source(t, work, name)
                rows = replace(
                    rows, first=rows.first + rows.stride * (further * self._shapes.chunk)
                )
                asking = list(ahead)
            elif name is not None:
                rows = self._transfers.buffer(name, t, work)
            else:
                done += [t] if t in ahead else []
                continue
            if asking and _in_rows(t) and name not in self._private:
                asks = Ahead(rows, write=step.action is Action.STORE)
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
                    does.append(f"{step.action.name.lower()} {step.name or step.tile.hint or 'x'}")
                    self._step(frame, step, work)
        for c in self._kernel.carried:
            kept = (*self._schedule.in_place, c.start)
            if unaliased(c.end) not in kept and Region(c.start) not in self._outside:
                _assign(frame, c.start, c.end)

    def _step(self, frame: Frame, step: Step, work: WorkItem) -> None:
        if step.action is Action.LOAD:
            self._transfers.load(frame, step.tile, work, self._kernel.buffers.get(step.tile))
        elif step.name is not None:
            self._transfers.store(frame, step.tile, work, step.name)
        elif step.action is Action.TRANSPOSE:
            transpose(frame, step.tile)
        else:
            compute(frame, step.tile)


def _shown(x: Buffer) -> str:
    sizes = (str(n.value) if isinstance(n, tirx.IntImm) else n.name for n in x.shape)
    return f"[{','.join('*' if '_n' in n else n for n in sizes)}] {x.dtype}"


def _in_rows(t: Tile) -> bool:
    """Whether a tile is a row of channels for each token."""
    return len(t.axes) == 2 and [a in (Axis.I, Axis.J) for a in t.axes] == [True, False]


def _assign(frame: Frame, start: Tile, end: Tile) -> None:
    """The carry of the next chunk."""
    rows, along = (start.axes[0] if len(start.axes) == 2 else None), start.axes[-1]
    with (
        frame.code.loop(0, 1 if rows is None else frame.shapes.extent(rows), "r") as r,
        frame.code.loop(0, frame.shapes.vectors(along), "c") as c,
    ):
        point: dict[Axis, Index] = {} if rows is None else {rows: r}
        point[along] = int32(c) * frame.lanes
        frame.write(Region(start), point, Values(frame, along).at(end, point), frame.lanes)


def _v_tile(kernel: Kernel, V: int, wanted: int) -> int:
    """Channels of the value axis per item: all, unless no sum over them is taken."""
    tiles = kernel.order
    buffers = kernel.buffers
    sums = any(t not in buffers and sums_over(t, Axis.V) for t in tiles)
    along = any(Axis.V in t.axes for t in tiles)
    return V if sums or not along or wanted >= V or V % wanted else wanted
