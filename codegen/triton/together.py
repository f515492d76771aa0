"""Scans that need nothing of one another, as one kernel: programs of all of them run at once.

A scan has few programs, each of which mostly waits. Several scans in one launch hide one another's
waiting, and those that read the same operands in the same order meet in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..config import Config
from ..interface import Parameter, Role, Signature
from ..plan import Kernel, Loop
from ..tile import Axis
from .kernel import STAGES, TritonKernel, print_triton

_OTHER = {Axis.K: Axis.V, Axis.V: Axis.K}


def launches(
    kernels: Sequence[Kernel], signature: Signature, config: Config, *, together: bool
) -> Iterator[TritonKernel]:
    """`kernels` printed, in order; `together`: scans that can be one kernel are one."""
    group: list[Kernel] = []
    for kernel in kernels:
        if group and not (together and _joins(group, kernel, config)):
            yield _printed(group, signature, config)
            group = []
        group.append(kernel)
    if group:
        yield _printed(group, signature, config)


def _joins(group: Sequence[Kernel], kernel: Kernel, config: Config) -> bool:
    """Whether `kernel` needs nothing of `group`, and runs with as many warps and stages."""
    scans = all(k.loop is not Loop.PARALLEL and k.segments is None for k in (*group, kernel))
    stored = {name for k in group for name, _ in k.stores}
    left = {c.name for k in group if k.last for c in k.carried}
    own = {c.name for c in kernel.carried} if kernel.last else set()
    mine, theirs = config.of(kernel.name), config.of(group[0].name)
    alike = (mine.warps, mine.stages) == (theirs.warps, theirs.stages)
    return scans and alike and not (stored & set(kernel.buffers.values()) or left & own)


def _printed(group: Sequence[Kernel], signature: Signature, config: Config) -> TritonKernel:
    if len(group) == 1:
        return print_triton(group[0], signature, config)
    scans = [print_triton(k, signature, config, called=True) for k in group]
    first = scans[0]
    parameters, calls, before = _Parameters(), [], 0
    for kernel, scan in zip(group, scans, strict=True):
        exchanged = kernel.transposed is not group[0].transposed
        names = [parameters.name(p, exchanged=exchanged) for p in scan.parameters]
        sizes = [str(n) for _, n in scan.constants]
        program = f"row * {scan.v_programs} + part" + (f" - {before}" if before else "")
        tables = ["cu_seqlens", "chunk_offsets", "chunk_table", "TOKENS", "chunks", "HV"]
        arguments = ", ".join([program, *names, *tables, *sizes, "PACKED", "EVEN", STAGES])
        before += scan.v_programs
        calls.append((before, f"{scan.name}({arguments})"))
    lines = ["pid = tl.program_id(0)", "part = pid % NV", "row = pid // NV"]
    for n, (end, call) in enumerate(calls):
        last = "else:" if n == len(calls) - 1 else f"{'elif' if n else 'if'} part < {end}:"
        lines += [last, f"    {call}"]
    name = "_".join([first.name.partition("_")[0], "scans"])
    text = "\n".join(f"    {line}" for line in lines)
    head = ", ".join(
        p.name + ": tl.constexpr" * (p.role is Role.GROUP) for p in parameters.all
    )
    entry = (
        '@triton.jit(do_not_specialize=["TOKENS", "chunks"])\n'
        f"def {name}(\n"
        f"    {head},\n"
        "    cu_seqlens, chunk_offsets, chunk_table, TOKENS, chunks, HV: tl.constexpr,\n"
        "    K: tl.constexpr, V: tl.constexpr, NV: tl.constexpr, PACKED: tl.constexpr,\n"
        f"    EVEN: tl.constexpr, {STAGES}: tl.constexpr,\n"
        "):\n"
        f'    """{", ".join(s.name for s in scans)} at once."""\n'
        f"{text}\n"
    )
    sizes = dict(first.constants)
    return replace(
        first,
        name=name,
        source="\n\n".join([*(s.source for s in scans), entry]),
        parameters=tuple(parameters.all),
        v_programs=before,
        constants=(("K", sizes["K"]), ("V", sizes["V"]), ("NV", before)),
        stores=tuple(b for s in scans for b in s.stores),
        functions=frozenset().union(*(s.functions for s in scans)),
    )


class _Parameters:
    """The parameters of several kernels: one of each kind and name of what is passed."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, object], Parameter] = {}

    @property
    def all(self) -> list[Parameter]:
        return list(self._found.values())

    def name(self, p: Parameter, *, exchanged: bool) -> str:
        """The name of the parameter that is passed for `p`."""
        if (p.role, p.of) not in self._found:
            used = {x.name for x in self.all}
            name, count = p.name, 1
            while name in used:
                count += 1
                name = f"{p.name}_{count}"
            channels = p.channels
            if exchanged and channels is not None:
                channels = _OTHER[channels]
            self._found[p.role, p.of] = replace(p, name=name, channels=channels)
        return self._found[p.role, p.of].name
