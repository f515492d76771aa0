"""A serial scan as Gluon: one warp loads by TMA, warp groups of four compute, both chunk by chunk.

Loaded tiles go around in rings of STAGES slots in shared memory. Of each slot there are two
barriers: `ready`, where its bytes (and vectors) have arrived, and `empty`, where it may be written
again. The state lies [V, K] in registers, split along V over programs; products are asynchronous
and in the order of `schedule`. Results leave through shared memory by TMA too.

A program is one sequence, head and part of V, like the Triton printer's; parameters have the same
roles, but those that are loaded or stored by TMA are descriptors (`GluonKernel.blocks`). Where
chunks are not whole, zeros replace what was loaded beyond the end of a sequence, and only its rows
are stored.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .. import tiled
from ..buffers import BufferId
from ..config import Config, KernelConfig
from ..expressions import identifier, unaliased
from ..interface import Role, Signature, stored
from ..plan import Kernel, Loop
from ..tile import TIMES, Axes, Axis, Tile
from ..tiling import tile
from ..triton.kernel import STORAGE
from .chunks import print_chunks
from .expressions import laid_out, layout_of
from .memory import SIZE, GluonKernel, GluonMemory, constants_of, sent
from .refusal import of_stores, refusal, refusal_of_chunks, too_large
from .schedule import Await, Issue, Schedule, subtracted

_WHOLE = 4096  # values: all of them


def print_gluon(kernel: Kernel, signature: Signature, config: Config) -> GluonKernel | str:
    """`kernel` as Gluon, or why it cannot be."""
    own, decided = config.of(kernel.name), _tiled(kernel, signature, config)
    why = refusal_of(kernel, signature, config)
    if why is not None:
        return why
    if kernel.loop is Loop.PARALLEL:
        return too_large(print_chunks(decided, kernel, signature, own))
    return _Printer(decided, kernel, signature, own).print()


def refusal_of(kernel: Kernel, signature: Signature, config: Config) -> str | None:
    """Why `kernel` cannot be Gluon, whatever shared memory it would take; None if it can."""
    own, decided = config.of(kernel.name), _tiled(kernel, signature, config)
    buffers, in_chunks = stored(kernel, signature, STORAGE), kernel.loop is Loop.PARALLEL
    why = (refusal_of_chunks if in_chunks else refusal)(decided, signature, own)
    return why or of_stores(buffers, matrices=in_chunks)


def _tiled(kernel: Kernel, signature: Signature, config: Config) -> tiled.TiledKernel:
    """One that is parallel over chunks takes all of V."""
    tiles = config.tiles(kernel.name)
    if kernel.loop is Loop.PARALLEL:
        tiles = replace(tiles, v=_WHOLE, k=None)
    return tile(kernel, signature, tiles)


class _Printer(GluonMemory):
    """Prints the two partitions and the kernel that starts them."""

    def __init__(
        self, own: tiled.TiledKernel, kernel: Kernel, signature: Signature, config: KernelConfig
    ) -> None:
        super().__init__(own, kernel, signature, config)
        self._inside = subtracted(own.inside)
        self._made = {
            s.value: s for s in self._inside if isinstance(s, tiled.Compute | tiled.Product)
        }
        self._schedule = Schedule(self._inside)
        self.uses = self._schedule.uses
        self._before: list[str] = []  # of the kernel: where rows and columns of each operand begin
        self._vectors: list[str] = []  # of the loading partition: before it waits for a slot
        self._copies: list[str] = []
        self._puts: list[str] = []
        self._put_bytes = 0  # of vectors, a chunk
        self._indices: dict[Axis, None] = {}  # along which they lie
        self._bytes = 0  # that TMA brings a chunk
        self._staging = 0  # bytes of shared memory beside the rings
        self._numbers: list[str] = []  # a chunk's numbers
        self._tiles: list[str] = []  # rings of what TMA brings

    # ---- what the loading partition does -------------------------------------------------------

    def _load(self, s: tiled.Load) -> None:
        name, axes = self.known[s.value], s.value.axes
        if len(axes) == 2:
            del self.known[s.value]
            self.rings[s.value] = name
            self._load_tile(name, s)
        elif axes:
            del self.known[s.value]
            self.rings[s.value] = name
            self._load_vector(name, s)
        else:
            self._load_number(name, s)

    def _load_tile(self, name: str, s: tiled.Load) -> None:
        second = laid_out(s.value.axes)[1]
        size = self.tiled.extents[second]
        if isinstance(s.of, BufferId):
            desc = self._parameter(f"{name}_desc", Role.BUFFER, s.of)
            row, column = "row", f"h * {self._whole(second)}"
        else:
            desc = self._parameter(f"{name}_desc", Role.OPERAND, s.of)
            batch, tokens, heads, group = self._strides(name, s)
            row = f"(batch * ({batch} // {tokens})).to(gl.int32) + at"
            column = f"h // {group} * {heads}"
        if second is Axis.V:
            column += " + part * BV"
        self._blocks[desc] = (self.tiled.chunk, size)
        first, start = self.names.fresh(f"{name}_row"), self.names.fresh(f"{name}_column")
        self._before += [f"{first} = {row}", f"{start} = {column}"]
        self._memory.append(
            f"{name} = gl.allocate_shared_memory("
            f"gl.bfloat16, [STAGES, C, {SIZE[second]}], {desc}.layout)"
        )
        at = f"[{first} + chunk * C, {start}]"
        self._copies.append(f"async_load({desc}, {at}, ready.index(slot), {name}.index(slot))")
        self._tiles.append(name)
        self._bytes += 2 * self.tiled.chunk * size
        self._loading |= dict.fromkeys((desc, first, start, name))
        self._computing[name] = None

    def _load_vector(self, name: str, s: tiled.Load) -> None:
        (axis,) = s.value.axes
        at, length = "(chunk * C + oi).to(gl.int64) * ", self.tiled.chunk
        if isinstance(s.of, BufferId):
            pointer = self._parameter(f"{name}_ptr", Role.BUFFER, s.of)
            base, stride = f"{pointer} + (row.to(gl.int64) * HV + h)", "HV"
            if axis not in TIMES:  # a chunk's vector of channels
                base, stride = f"{pointer} + (before.to(gl.int64) * HV + h) * K", "K"
                at, length = "chunk * (HV * K) + ok", self.tiled.extents[axis]
        else:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            batch, stride, heads, group = self._strides(name, s)
            base = f"{pointer} + batch.to(gl.int64) * {batch} + at.to(gl.int64) * {stride}"
            base += f" + h // {group} * {heads}"
        first, ahead = self.names.fresh(f"{name}_base"), self.names.fresh(f"{name}_next")
        self._before.append(f"{first} = {base}")
        shape = f"[STAGES, {SIZE[axis]}]"
        self._memory.append(f"{name} = gl.allocate_shared_memory(gl.float32, {shape}, VECTOR)")
        at += stride * (axis in TIMES)
        mask = ", mask=there, other=0.0" * (axis in TIMES)
        self._vectors.append(f"{ahead} = gl.load({first} + {at}{mask}).to(gl.float32)")
        self._puts.append(f"{name}.index(slot).store({ahead})")
        self._put_bytes += 4 * length
        self._indices[axis] = None
        self._loading |= dict.fromkeys((first, stride, name))
        if axis not in TIMES:
            self._loading |= dict.fromkeys(("K", SIZE[axis]))
        self._computing[name] = None

    def _load_number(self, name: str, s: tiled.Load) -> None:
        """A number of a chunk, head or call, which every thread of the computing warps loads."""
        if s.source is tiled.Source.NUMBER:
            self._computing[self._parameter(name, Role.PARAM, s.of)] = None
            return
        if isinstance(s.of, BufferId):
            pointer = self._parameter(f"{name}_ptr", Role.BUFFER, s.of)
            at = f"{pointer} + ((before + chunk).to(gl.int64) * HV + h)"
            self._numbers.append(f"{name} = gl.load({at})")
        else:
            pointer = self._parameter(f"{name}_ptr", Role.OPERAND, s.of)
            self.lines.append(f"{name} = gl.load({pointer} + h).to(gl.float32)")
        self._computing[pointer] = None

    # ---- what the computing partition does -----------------------------------------------------

    def _begin(self, s: tiled.Begin) -> list[str]:
        name = self.known[s.value]
        lines = [f"{name} = gl.zeros((BV, BK), gl.float32, STATE)"]
        if s.from_call:
            pointer = self._parameter(f"{name}_first", Role.INITIAL, str(s.value.attrs[0]))
            self._computing[pointer] = None
            load = f"{name} += gl.load({self._state(pointer)}).to(gl.float32)"
            lines += [f"if {pointer} is not None:", f"    {load}"]
        return lines

    def _finish(self, s: tiled.Finish) -> list[str]:
        name = self.known[s.value]
        pointer = self._parameter(f"{name}_last", Role.FINAL, str(s.value.attrs[0]))
        self._computing[pointer] = None
        return [f"if {pointer} is not None:", f"    gl.store({self._state(pointer)}, {name})"]

    def _state(self, pointer: str) -> str:
        keys, values = "ok[None, :]", "ov[:, None]"
        at = f"{values} * K + {keys}" if self.tiled.transposed else f"{keys} * V + {values}"
        return f"{pointer} + (n.to(gl.int64) * HV + h) * K * V + ({at})"

    def _issue(self, event: Issue) -> None:
        s = event.product
        used = [s.left.value, s.right.value, *([] if s.start is None else [s.start.value])]
        for x in used:
            self.prepare(x, self._made)
        rows, layout = self.laid(s.value.axes)[0], layout_of(s.value.axes)
        self._stage(s.right.value)
        left, right = self.left(s.left, rows, layout), self.right(s.right, s.over)
        start, known = f"gl.zeros(({self._shape(s.value.axes)}), gl.float32, {layout})", ""
        if s.start is None:
            known = ", use_acc=False"
        else:
            start = self.text(s.start.value)
        name = self.names.fresh(s.value.hint or "x")
        self.lines.append(f"{name} = warpgroup_mma({left}, {right}, {start}{known}, is_async=True)")
        self.known[s.value] = name

    def _shape(self, axes: Axes) -> str:
        return ", ".join(SIZE[a] for a in self.laid(axes))

    def _stage(self, x: Tile) -> None:
        """Put scores, which a product takes, in shared memory."""
        x = unaliased(x)
        if x in self.rings or x in self.staged:
            return
        name = self.staged[x] = self.names.fresh(f"{x.hint or 'x'}_shared")
        self._allocate(name, "[C, C]")
        self._staging += 2 * self.tiled.chunk**2
        self.lines.append(f"{name}.store(({self.text(x)}).to(gl.bfloat16))")
        self.lines += ["fence_async_shared()", "barrier()"]

    def _await(self, event: Await) -> None:
        names = [self.known[x] for x in event.values]
        waited = f"warpgroup_mma_wait({event.outstanding}, deps=({', '.join(names)},))"
        self.lines.append(f"{', '.join(names)} = {waited}")

    def _store(self, s: tiled.Store) -> list[str]:
        """Lines that send a tile to its buffer: in shared memory first, as memory has it."""
        desc = self._parameter(f"{identifier(str(s.buffer))}_desc", Role.BUFFER, s.buffer)
        name = self.names.fresh(f"{identifier(str(s.buffer))}_shared")
        text, of_state = self.text(s.use.value), Axis.K in s.axes
        keys, values = self.tiled.extents[Axis.K], self.tiled.extents[Axis.V]
        self._blocks[desc] = (values, keys) if of_state else (self.tiled.chunk, values)
        self._allocate(name, "[BV, BK]" if of_state else "[C, BV]")
        self._staging += 2 * math.prod(self._blocks[desc])
        self._computing[desc] = None
        if of_state:
            at = "[((before + chunk) * HV + h) * V + part * BV, 0]"
            stage = f"{name}.store(({text}).to(gl.bfloat16))"
            return sent(stage, f"async_store({desc}, {at}, {name})")
        place = ("row + chunk * C", "h * V + part * BV", "HV * V", "TILES", "BV")
        lies = ("1", "ROWS", "BV", "C")
        staged = f"{name}.permute((1, 0))"
        return self._sent(s.buffer, name, staged, text, (*place, *lies))

    def _step(self) -> list[str]:
        """One chunk."""
        stores = [s for s in self._inside if isinstance(s, tiled.Store)]
        of_states = [s for s in stores if Axis.K in s.axes]
        lines = [line for s in of_states for line in self._store(s)]
        lines.append("mbarrier.wait(ready.index(slot), (step // STAGES) & 1)")
        if self._tiles:
            self.called.add("cut")
            cuts = (f"    cut({name}.index(slot), rows, TILES, C)" for name in self._tiles)
            lines += ["if not EVEN:", *cuts]
        for event in self._schedule.events:
            if isinstance(event, Issue):
                self._issue(event)
            else:
                self._await(event)
        (advance,) = (s for s in self._inside if isinstance(s, tiled.Advance))
        ((start, end),) = advance.ends
        results = [s for s in stores if s not in of_states]
        for x in (*(s.use.value for s in results), end.value):
            self.prepare(x, self._made)
        lines += self.flush()
        # from here on nothing of the slot is read, nor what the last step sent away
        lines += ["tma.store_wait(0)", "barrier()", "mbarrier.arrive(empty.index(slot), count=1)"]
        lines += [line for s in results for line in self._store(s)]
        return [*lines, f"{self.known[start]} = {self.text(end.value)}"]

    # ---- the three functions -------------------------------------------------------------------

    def print(self) -> GluonKernel:
        own, kernel = self.tiled, self._kernel
        loads = [s for s in (*own.before, *self._inside) if isinstance(s, tiled.Load)]
        for s in loads:
            self._load(s)
        heads = self.flush()
        (begin,) = (s for s in own.before if isinstance(s, tiled.Begin))
        first, step = self._begin(begin), self._step()
        finishes = (s for s in own.after if isinstance(s, tiled.Finish))
        last = [line for s in finishes for line in self._finish(s)]
        computing = self._compute([*heads, *first], step, last)
        source = "\n\n".join((self._load_partition(), computing, self._entry()))
        return GluonKernel(
            name=kernel.name,
            loop=kernel.loop,
            source=source,
            parameters=tuple(self.parameters.values()),
            blocks=tuple(self._blocks.items()),
            shared=self._config.stages * (self._bytes + self._put_bytes) + self._staging,
            v_programs=own.v_parts,
            constants=constants_of(own),
            config=self._config,
            stores=stored(kernel, self._signature, STORAGE),
            functions=frozenset(self.called),
        )

    def _loop(self) -> list[str]:
        reverse = self._kernel.loop is Loop.REVERSE
        chunk = "steps - 1 - step" if reverse else "step"
        rows = "rows = gl.minimum(length - chunk * C, C)"
        return [f"chunk = {chunk}", "slot = step % STAGES", rows]

    def _load_partition(self) -> str:
        given = ("ready", "empty", "steps", "length", "C", "HV", "STAGES", "EVEN")
        self._loading |= dict.fromkeys(given)
        names = self._constants(self._loading)
        body = [f"def {self._kernel.name}_load({', '.join(names)}):"]
        body.append('    """Keeps the rings full."""')
        if self._vectors:
            body.append("    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])")
            for axis in self._indices:
                index = "oi" if axis in TIMES else "ok"
                body.append(f"    {index} = gl.arange(0, {SIZE[axis]}, LANES)")
        put = [*self._puts, "barrier()", "mbarrier.arrive(ready.index(slot), count=1)"]
        step = [
            *self._loop(),
            *["there = oi >= 0 if EVEN else oi < rows"] * any(a in TIMES for a in self._indices),
            *self._vectors,  # on their way while the slot is still read
            "mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)",
            f"mbarrier.expect(ready.index(slot), {self._bytes})",
            *self._copies,
            *(put if self._vectors else []),
        ]
        body += ["    for step in range(steps):", *(f"        {line}" for line in step)]
        return "@gluon.jit\n" + "\n".join(body)

    def _compute(self, before: list[str], step: list[str], after: list[str]) -> str:
        warps = self._config.warps
        groups = warps // 4
        self._computing |= dict.fromkeys(("ready", "empty", "n", "h", "part", "steps", "row"))
        self._computing |= dict.fromkeys(("before", "length", "EVEN"))
        self._computing |= dict.fromkeys(("HV", "K", "V", "C", "BK", "BV", "STAGES"))
        names = self._constants(self._computing)
        mma = "gl.NVMMADistributedLayout([3, 0], {}, [16, {}, 16])"
        lines = [
            f"STATE: gl.constexpr = {mma.format([warps, 1], 'BK')}",
            f"ROWS: gl.constexpr = {mma.format([warps, 1], 'C')}",
            f"SCORES: gl.constexpr = {mma.format([4, groups], f'C // {groups}')}",
            "STATE_FACTOR: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)",
            f"TILES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [{warps}, 1], [1, 0])",
            "ROWS_FACTOR: gl.constexpr = gl.DotOperandLayout(0, ROWS, 2)",
            "oi = gl.arange(0, C, gl.SliceLayout(1, SCORES))",
            "oj = gl.arange(0, C, gl.SliceLayout(0, SCORES))",
            "ok = gl.arange(0, BK, gl.SliceLayout(0, STATE))",
            "ov = part * BV + gl.arange(0, BV, gl.SliceLayout(1, STATE))",
            *before,
            "for step in range(steps):",
            *(f"    {line}" for line in (*self._loop(), *self._numbers, *step)),
            "tma.store_wait(0)",
            *after,
        ]
        head = f"def {self._kernel.name}_compute({', '.join(names)}):"
        text = "\n".join(f"    {line}" for line in lines)
        return f'@gluon.jit\n{head}\n    """Carries the state along."""\n{text}'

    def _entry(self) -> str:
        warps = 2 if self._vectors else 1
        stores = ", ".join(str(n) for n, _ in self._kernel.stores) or "nothing"
        computing, loading = ", ".join(self._computing), ", ".join(self._loading)
        lines = [
            f'"""{self._kernel.loop.value}; stores {stores}."""',
            "VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])",
            "pid = gl.program_id(0)",
            "part = pid % NV",
            "h = pid // NV % HV",
            "n = pid // NV // HV  # the sequence",
            "if PACKED:",
            "    batch = n * 0",
            "    at = gl.load(cu_seqlens + n).to(gl.int32)",
            "    length = gl.load(cu_seqlens + n + 1).to(gl.int32) - at",
            "    before = gl.load(chunk_offsets + n).to(gl.int32)  # chunks of other sequences",
            "    steps = (length + C - 1) // C",
            "else:",
            "    batch = n",
            "    at = n * 0",
            "    length = TOKENS",
            "    before = n * chunks",
            "    steps = chunks",
            "row = batch * TOKENS + at",
            *self._before,
            *self._memory,
            "ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "for slot in gl.static_range(STAGES):",
            f"    mbarrier.init(ready.index(slot), count={warps})",
            "    mbarrier.init(empty.index(slot), count=1)",
            "gl.warp_specialize([",
            f"    ({self._kernel.name}_compute, ({computing})),",
            f"    ({self._kernel.name}_load, ({loading})),",
            f"], [1], [{40 if self._vectors else 24}])",
        ]
        return self._entry_head() + "\n".join(f"    {line}" for line in lines)
