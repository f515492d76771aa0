"""Prints the launchers of an exported package: buffers, grids and arguments of one recurrence.

What `schedule` works out for a call is written out here for all calls, sizes by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...codegen.buffers import OUTPUT, BufferId, BufferKind, gradient
from ...codegen.differentiate import GRADIENT
from ...codegen.expressions import Names
from ...codegen.interface import Buffer, Role
from ...codegen.plan import Loop
from ...codegen.triton.kernel import TritonKernel
from ...dsl.ir import Kind, Per
from ..sizes import state_letters
from .contents import RESERVED, Package, Served
from .text import WIDTH, filled, indented, module, wrapped

_CHUNKS = '''
def _chunks(batch, tokens, heads, cu_seqlens):
    """How many sequences and chunks there are, and the arguments that all kernels share."""
    packed = cu_seqlens is not None
    chunk_offsets = chunk_table = None
    sequences, chunks = batch, batch * -(-tokens // C)
    if packed:
        chunk_offsets, chunk_table = support.chunk_table(cu_seqlens, tokens, C)
        sequences, chunks = cu_seqlens.shape[0] - 1, chunk_table.shape[0]
    shared = {
        "cu_seqlens": cu_seqlens,
        "chunk_offsets": chunk_offsets,
        "chunk_table": chunk_table,
        "TOKENS": tokens,
        "chunks": -(-tokens // C),  # of a sequence that is not packed
        "HV": heads,
        "K": K,
        "V": V,
        "C": C,
        "PACKED": packed,
    }
    return sequences, chunks, shared
'''
_STRIDES = {Role.STRIDE_BATCH: 0, Role.STRIDE_TOKEN: 1, Role.STRIDE_HEAD: 2}
# variables for sizes; others are called like their letters
_SIZES = {"B": "batch", "N": "sequences", "T": "tokens", "HV": "heads"}


def print_launchers(package: Package, served: Served) -> str:
    """The module that launches the kernels of `served`: `forward` and `backward`."""
    dims = served.dims
    what = (
        f"Launches the kernels for K={dims.K}, V={dims.V}, {served.dtype.value}: "
        f"chunks of {served.config.chunk} tokens."
    )
    imports = [
        *package.header(what),
        "",
        "from __future__ import annotations",
        "",
        "import torch",
        "",
        f"from . import kernels_{served.suffix} as kernels",
        "from . import support",
    ]
    constants = [f"K, V = {dims.K}, {dims.V}  # channels", f"C = {served.config.chunk}  # tokens"]
    return module(
        [*imports, "", *constants],
        [_CHUNKS],
        _Direction(package, served, backward=False).lines(),
        _Direction(package, served, backward=True).lines(),
    )


class _Direction:
    """One function, `forward` or `backward`, as lines."""

    def __init__(self, package: Package, served: Served, *, backward: bool) -> None:
        self._package, self._served, self._backward = package, served, backward
        self._kernels = served.emitted.backward if backward else served.emitted.forward
        self._operands = {o.name: o for o in package.form.operands}
        self._names = Names(RESERVED)
        self._known = {
            name: self._names.fresh(name)
            for name in (*package.operands, *package.states, *package.params)
        }
        self._cotangents = {
            GRADIENT + name: self._names.fresh(GRADIENT + name)
            for name in ("o", *package.states)
            if backward
        }
        self._buffers: dict[BufferId, str] = {}
        self._finals: dict[str, str] = {}

    def lines(self) -> list[str]:
        """The function."""
        launches = [line for kernel in self._kernels for line in self._launch(kernel)]
        body = [
            *self._prepared(),
            "sequences, chunks, shared = _chunks(batch, tokens, heads, cu_seqlens)",
            f"device = {self._lead}.device",
            "",
            f"with torch.cuda.device_of({self._lead}):",
            *indented(launches),
            *self._returned(),
        ]
        name = "backward" if self._backward else "forward"
        states = [self._known[s] for s in self._package.states]
        given = [self._known[o] for o in self._operands]
        params = [self._known[p] for p in self._package.params]
        arguments = [*given, *states, "cu_seqlens", *params, *self._cotangents.values()]
        return [
            *wrapped(f"def {name}(", arguments, "):"),
            *indented([self._docstring(), *body]),
        ]

    @property
    def _lead(self) -> str:
        return self._known[self._package.lead]

    def _docstring(self) -> str:
        if self._backward:
            return '"""Gradients of the operands, then of the initial states (None without one)."""'
        return '"""The output `[B,T,HV,V]`, then the final states, float32."""'

    # ---- what comes before the launches ---------------------------------------------------------

    def _prepared(self) -> Iterator[str]:
        """Operands as kernels take them: float32 but for the narrow ones, channels side by side."""
        for name, o in self._operands.items():
            x = self._known[name]
            wide = "" if name in self._package.narrow else ".float()"
            if o.per is Per.HEAD:
                yield f"{x} = {x}{wide}.contiguous()"
            elif o.kind is not Kind.SCALAR:
                yield f"{x} = support.rows({x}{wide})"
            elif wide:
                yield f"{x} = {x}{wide}"
        for state in self._package.states:
            s = self._known[state]
            yield f"{s} = None if {s} is None else {s}.contiguous()"
        sizes = ", ".join(self._package.size(letter, self._known) for letter in ("B", "T", "HV"))
        yield f"batch, tokens, heads = {sizes}"
        n = self._package.rows_per_token
        if n > 1 or any(o.micro for o in self._operands.values()):
            yield from self._refined(n)

    def _refined(self, n: int) -> Iterator[str]:
        yield f"# kernels see rows: a token has {n}, one per micro-step"
        for name, o in self._operands.items():
            x = self._known[name]
            if o.micro:
                yield f"{x} = support.entries({x}, {n}).flatten(1, 2)"
            elif n > 1 and o.per is Per.TOKEN:
                yield f"{x} = {x}.repeat_interleave({n}, dim=1)"
        if n == 1:
            return
        yield f"tokens = {n} * tokens"
        yield f"cu_seqlens = None if cu_seqlens is None else {n} * cu_seqlens"
        if self._backward:
            d_o = self._cotangents[GRADIENT + "o"]
            yield f"{d_o} = torch.nn.functional.pad({d_o}.unsqueeze(2), (0, 0, 0, 0, {n - 1}, 0))"
            yield f"{d_o} = {d_o}.flatten(1, 2)  # a token's output is that of its last row"

    # ---- launches -------------------------------------------------------------------------------

    def _launch(self, kernel: TritonKernel) -> Iterator[str]:
        yield f"# {kernel.loop.value}"
        for buffer in kernel.stores:
            if buffer.name not in self._buffers:
                yield self._allocate(buffer)
        for p in kernel.parameters:
            if p.role is Role.FINAL and p.of not in self._finals:
                yield from self._final(str(p.of))
        programs = "chunks" if kernel.loop is Loop.PARALLEL else "sequences"
        tiles = f" * {kernel.v_programs}" if kernel.v_programs > 1 else ""
        yield "support.launch("
        yield f"    kernels.{kernel.name}, {programs} * heads{tiles}, {kernel.config.stages},"
        for group in self._arguments(kernel):
            yield from indented(filled(group, width=WIDTH - 4))
        yield ")"
        yield ""

    def _allocate(self, buffer: Buffer) -> str:
        variable = self._buffers[buffer.name] = self._names.fresh(str(buffer.name))
        gradient = buffer.name.kind is BufferKind.GRADIENT and not buffer.is_partial
        operand = self._operands[buffer.name.of] if gradient else None
        if operand is not None and operand.kind is Kind.KEY:  # per value head, to be added up
            return f"{variable} = support.key_gradient({self._known[operand.name]}, heads)"
        make = "zeros" if buffer.is_partial else "empty"
        shape = ", ".join(_SIZES.get(a, a) for a in buffer.shape)
        dtype = buffer.dtype.value
        return f"{variable} = torch.{make}(({shape}), dtype=torch.{dtype}, device=device)"

    def _final(self, carry: str) -> Iterator[str]:
        """Where a scan leaves its last value; None where nobody asks for it."""
        state = carry.removeprefix(GRADIENT) if carry not in self._package.states else carry
        if self._backward and carry in self._package.states:
            self._finals[carry] = "None"  # the states again, on the way to the gradients
            return
        variable = self._names.fresh(f"{carry}_first" if self._backward else f"{carry}_last")
        self._finals[carry] = variable
        (declared,) = (s for s in self._package.form.states if s.name == state)
        shape = ", ".join(_SIZES.get(a, a) for a in state_letters(declared))
        make = f"torch.empty(({shape}), dtype=torch.float32, device=device)"
        if self._backward:
            yield f"{variable} = None"
            yield f"if {self._known[state]} is not None:"
            yield f"    {variable} = {make}"
        else:
            yield f"{variable} = {make}"

    def _arguments(self, kernel: TritonKernel) -> Iterator[list[str]]:
        """Keyword arguments, those of one operand on a line of their own."""
        of_operands: dict[str, list[str]] = {}
        others: list[str] = []
        for p in kernel.parameters:
            if p.role in _STRIDES or p.role in (Role.OPERAND, Role.GROUP):
                of = str(p.of)
                x = self._cotangents.get(of) or self._known[of]
                text = x
                if p.role in _STRIDES:
                    text = f"{x}.stride({_STRIDES[p.role]})"
                elif p.role is Role.GROUP:
                    text = self._group(of, x)
                of_operands.setdefault(of, []).append(f"{p.name}={text}")
            else:
                others.append(f"{p.name}={self._argument(p.role, p.of)}")
        yield from of_operands.values()
        if others:
            yield others
        tiles = dict(kernel.constants)
        launch = [f"{name}={tiles[name]}" for name in ("BK", "BV", "NV")]
        yield [*launch, f"num_warps={kernel.config.warps}", "**shared"]

    def _group(self, name: str, x: str) -> str:
        operand = self._operands.get(name)
        grouped = operand is not None and operand.kind is Kind.KEY
        return f"heads // {x}.shape[2]" if grouped else "1"

    def _argument(self, role: Role, of: BufferId | str) -> str:
        if isinstance(of, BufferId):
            return self._buffers[of]
        if role is Role.FINAL:
            return self._finals[of]
        if role is Role.INITIAL:
            return self._cotangents.get(of) or self._known[of]
        assert role is Role.PARAM
        return self._known[of]

    # ---- results --------------------------------------------------------------------------------

    def _returned(self) -> Iterable[str]:
        if self._backward:
            return self._gradients()
        n = self._package.rows_per_token
        o = self._buffers[OUTPUT]
        text = o if n == 1 else f"{o}[:, {n - 1}::{n}].contiguous()"
        finals = [self._finals[s] for s in self._package.states]
        return wrapped("return (", [text, *finals], ")")

    def _gradients(self) -> Iterator[str]:
        n = self._package.rows_per_token
        gradients = []
        for o in self._operands.values():
            x, buffer = self._known[o.name], self._buffers.get(gradient(o.name))
            d = buffer or self._names.fresh(f"{GRADIENT}{o.name}")
            per_head = o.per is Per.HEAD
            if buffer is None:  # nothing depends on it
                yield f"{d} = torch.zeros_like({x})"
            else:
                own = f"{buffer}, {x}.shape, {x}.dtype, heads, per_head={per_head}"
                yield f"{d} = support.own_gradient({own})"
            if o.micro:
                d = f"support.entries({d}.unflatten(1, (-1, {n})), {self._package.micro})"
            elif n > 1 and not per_head:
                d = f"{d}.unflatten(1, (-1, {n})).sum(2)"
            gradients.append(d)
        finals = [self._finals.get(GRADIENT + s, "None") for s in self._package.states]
        yield from wrapped("return [", [*gradients, *finals], "]")
