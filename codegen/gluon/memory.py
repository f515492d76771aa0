"""What printers of Gluon share: parameters, matrices that TMA moves blocks of, shared memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .. import tiled
from ..buffers import BufferId, BufferKind
from ..config import KernelConfig
from ..expressions import Names, identifier
from ..interface import Buffer, Parameter, Role, Signature
from ..plan import Kernel, Loop
from ..tile import TIMES, Axis
from .expressions import GluonExpressions

RESERVED = (
    *("gl", "tma", "mbarrier", "gluon", "pid", "n", "h", "part", "step", "steps", "chunk"),
    *("chunks", "item", "items", "turn", "index", "add", "shift"),
    *("power", "time_sums", "time_sums_of_parts", "halves", "decayed_dot", "decayed_apply"),
    *("within", "room", "scores", "CHANNELS"),
    *("sums", "sums_beside", "decay_between", "unit_lower_inverse", "put", "leave", "cut"),
    *("present", "batch", "at", "row", "there", "before", "length", "EVEN", "PACKED", "SEQUENCES"),
    *("cu_seqlens", "chunk_offsets", "chunk_table"),
    *("slot", "oi", "oj", "ok", "ov", "K", "V", "C", "BK", "BV", "HV", "NV", "TOKENS", "STAGES"),
    *("STATE", "ROWS", "SCORES", "KEYS", "VALUES", "LANES", "LINE", "COLUMNS", "VECTOR"),
    *("ready", "empty", "rows", "columns", "first", "stride"),
    *("STATE_FACTOR", "ROWS_FACTOR", "SCORES_FACTOR", "barrier", "async_load", "async_store"),
)
CONSTANTS = ("HV", "K", "V", "C", "BK", "BV", "NV", "STAGES", "PACKED", "EVEN")
BARRIER = "barrier()"
SIZE = {Axis.I: "C", Axis.J: "C", Axis.K: "BK", Axis.V: "BV"}
MOST_SHARED = 227 * 1024  # bytes that a program may have
SHARED_OF_TWO = 113 * 1024  # if a multiprocessor has two, each of which takes 1 KB more


def sent(stage: str, send: str, group: str | None = None, put: str = "") -> list[str]:
    """Lines by which a tile leaves: `stage` has it in shared memory, and `send` takes it away.

    `group`: of a gradient, the value heads that share a head of it; of several, `put` stores it.
    """
    beside = ["fence_async_shared()", BARRIER]
    if group is None:
        return [stage, *beside, send]
    head = f"if {group} == 1:"
    return [head, f"    {stage}", "else:", f"    {put}", *beside, head, f"    {send}"]


def constants_of(own: tiled.TiledKernel) -> tuple[tuple[str, int], ...]:
    """The sizes that a kernel is compiled for: channels, rows, and their tiles."""
    sizes = {"K": own.dims.K, "V": own.dims.V, "C": own.chunk}
    sizes |= {"BK": own.extents[Axis.K], "BV": own.extents[Axis.V], "NV": own.v_parts}
    return tuple(sizes.items())


@dataclass(frozen=True, slots=True)
class GluonKernel:
    """A printed kernel.

    Attributes:
        blocks: rows and columns of the blocks that TMA moves, by the parameter that is a
            descriptor: of an operand, its rows of tokens; of a buffer, all axes but its last.
        shared: bytes of shared memory, of scans but for barriers; of others at most.
        constants, stores, v_programs: as of a `TritonKernel`.
        functions: of the library, that it calls.
        is_persistent: whether programs take one chunk and head after the other, until none is left.
    """

    name: str
    loop: Loop
    source: str
    parameters: tuple[Parameter, ...]
    blocks: tuple[tuple[str, tuple[int, int]], ...]
    shared: int
    v_programs: int
    constants: tuple[tuple[str, int], ...]
    config: KernelConfig
    stores: tuple[Buffer, ...]
    segments: bool = False
    functions: frozenset[str] = frozenset()
    is_persistent: bool = False

    @property
    def _resident(self) -> int:
        """Programs that a multiprocessor has registers and shared memory for."""
        return 2 if self.config.warps == 4 and self.shared <= SHARED_OF_TWO else 1

    @property
    def persistent(self) -> int:
        """Programs of a multiprocessor, if they are persistent; else 0."""
        return self._resident if self.is_persistent else 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options; registers for two programs where shared memory has room for them."""
        capped = {"maxnreg": 128} if self._resident == 2 else {}
        return {**self.config.options(self.config.stages), **capped}


class GluonMemory(GluonExpressions):
    """Parameters and allocations, gathered while a kernel is printed."""

    def __init__(
        self, own: tiled.TiledKernel, kernel: Kernel, signature: Signature, config: KernelConfig
    ) -> None:
        super().__init__(own, Names(RESERVED))
        self._kernel, self._signature, self._config = kernel, signature, config
        self._blocks: dict[str, tuple[int, int]] = {}
        self._name_leaves(kernel)
        self._loading: dict[str, None] = {}  # arguments of the partitions
        self._computing: dict[str, None] = {}
        self._memory: list[str] = []  # allocations

    def _strides(self, name: str, s: tiled.Load) -> tuple[str, str, str, str]:
        channels = next((a for a in s.value.axes if a not in TIMES), None)
        of = str(s.of)
        return (
            self._parameter(f"{name}_sb", Role.STRIDE_BATCH, of, channels),
            self._parameter(f"{name}_st", Role.STRIDE_TOKEN, of, channels),
            self._parameter(f"{name}_sh", Role.STRIDE_HEAD, of, channels),
            self._parameter(f"{name}_group", Role.GROUP, of),
        )

    def _whole(self, axis: Axis) -> str:
        """The entries of a head's row of a buffer along `axis`."""
        return "C" if axis in TIMES else axis.value.upper()

    def _allocate(self, name: str, shape: str, dtype: str = "gl.bfloat16") -> None:
        layout = f"gl.NVMMASharedLayout.get_default_for({shape}, {dtype})"
        self._memory.append(f"{name} = gl.allocate_shared_memory({dtype}, {shape}, {layout})")
        self._computing[name] = None

    def _pointer_to(self, of: BufferId) -> str:
        """The pointer to a buffer that has a descriptor too."""
        key = Role.BUFFER, str(of)
        if key not in self.parameters:
            name = self.names.fresh(f"{identifier(str(of))}_ptr")
            self.parameters[key] = Parameter(name, Role.BUFFER, of)
        return self.parameters[key].name

    def _shared_heads(self, of: BufferId) -> str | None:
        """The number of value heads that share a head of the gradient `of`; None for others.

        Where several do, launches add their gradients up in float32, which TMA does not write here.
        """
        if of.kind is not BufferKind.GRADIENT:
            return None
        name = self._parameter(f"{identifier(of.of)}_group", Role.GROUP, of.of)
        self._computing[name] = None
        return name

    def _sent(
        self, of: BufferId, place: str, staged: str, text: str, at: tuple[str, ...]
    ) -> list[str]:
        """Lines that send a tile of tokens to its buffer.

        Args:
            place: the shared memory through which TMA sends it, `staged`, as its registers lie.
            text: its registers.
            at: the row and the column of its first entry, the columns of the buffer, the layout in
                which rows of tokens lie, their number of channels; then the axis of tokens, the
                layout and the extents of its registers.
        """
        desc = self._parameter(f"{identifier(str(of))}_desc", Role.BUFFER, of)
        pointer = self._pointer_to(of)
        row, column, columns, layout, width, *lies = at
        self._computing |= dict.fromkeys((desc, pointer, "EVEN"))
        self.called |= {"leave", "put"}
        options = f"EVEN, {layout}, C, {width}"
        first = f"{pointer} + ({row}).to(gl.int64) * ({columns}) + {column}"
        return sent(
            f"{staged}.store(({text}).to(gl.bfloat16))",
            f"leave({desc}, {pointer}, {row}, {column}, {columns}, {place}, rows, {options})",
            self._shared_heads(of),
            f"put({first}, {text}, {columns}, rows, {', '.join(lies)})",
        )

    def _constants(self, names: Iterable[str]) -> list[str]:
        """Arguments of a partition; those of a model or of the printer are constants of it."""
        constant = {p.name for p in self.parameters.values() if p.role is Role.GROUP}
        constant |= set(CONSTANTS)
        return [f"{n}: gl.constexpr" if n in constant else n for n in names]

    def _entry_head(self, given: str = "TOKENS, chunks, SEQUENCES") -> str:
        names = self._constants(p.name for p in self.parameters.values())
        sizes = ", ".join(f"{n}: gl.constexpr" for n in CONSTANTS)
        numbers = ", ".join(f'"{n}"' for n in given.split(", "))
        return (
            f"@gluon.jit(do_not_specialize=[{numbers}])\n"
            f"def {self._kernel.name}(\n    {', '.join(names)},\n"
            f"    cu_seqlens, chunk_offsets, chunk_table, {given}, {sizes},\n):\n"
        )
