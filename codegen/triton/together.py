"""Scans that need nothing of one another, as one kernel: programs of all of them run at once.

A scan has few programs, each of which mostly waits. Several scans in one launch hide one another's
waiting, and those that read the same operands in the same order meet in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..config import Config, Printer
from ..interface import Parameter, Role, Signature
from ..plan import Kernel, Loop
from ..scans import OTHER
from .kernel import STAGES, TritonKernel, print_triton

_OF_CALL = ("cu_seqlens", "chunk_offsets", "chunk_table", "TOKENS", "chunks", "HV")
TOGETHER = "_together"  # suffix of the name of a kernel that runs several scans at once


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
    alike &= Printer.GLUON not in (mine.printer, theirs.printer)
    return scans and alike and not (stored & set(kernel.buffers.values()) or left & own)


def _printed(group: Sequence[Kernel], signature: Signature, config: Config) -> TritonKernel:
    if len(group) == 1:
        return print_triton(group[0], signature, config)
    scans = [print_triton(k, signature, config, called=True) for k in group]
    first, parameters, calls, parts = scans[0], _Parameters(), [], 0
    for kernel, scan in zip(group, scans, strict=True):
        exchanged = kernel.transposed is not group[0].transposed
        names = [parameters.name(p, exchanged=exchanged) for p in scan.parameters]
        program = f"row * {scan.v_programs} + part" + (f" - {parts}" if parts else "")
        sizes = (str(n) for _, n in scan.constants)
        parts += scan.v_programs
        arguments = ", ".join([program, *names, *_OF_CALL, *sizes, "PACKED", "EVEN", STAGES])
        calls.append((parts, f"{scan.name}({arguments})"))
    given = {n: size for n, size in first.constants if n in ("K", "V", "C")}
    name = first.name + TOGETHER
    entry = _entry(name, parameters.all, calls, ", ".join(s.name for s in scans))
    return replace(
        first,
        name=name,
        source="\n\n".join([*(s.source for s in scans), entry]),
        parameters=parameters.all,
        v_programs=parts,
        constants=(*given.items(), ("NV", parts)),
        stores=tuple(b for s in scans for b in s.stores),
        functions=frozenset[str]().union(*(s.functions for s in scans)),
        calls=tuple(s.name for s in scans),
    )


def _entry(
    name: str, parameters: tuple[Parameter, ...], calls: Sequence[tuple[int, str]], what: str
) -> str:
    """The kernel that calls one of several scans; with each call, where its parts of NV end."""
    names = ", ".join(p.name + ": tl.constexpr" * (p.role is Role.GROUP) for p in parameters)
    branches = [
        f"    {'elif' if n else 'if'} part < {end}:\n        {call}\n"
        for n, (end, call) in enumerate(calls[:-1])
    ]
    return (
        '@triton.jit(do_not_specialize=["TOKENS", "chunks"])\n'
        f"def {name}(\n"
        f"    {names},\n"
        "    cu_seqlens, chunk_offsets, chunk_table, TOKENS, chunks, HV: tl.constexpr,\n"
        "    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, NV: tl.constexpr,\n"
        f"    PACKED: tl.constexpr, EVEN: tl.constexpr, {STAGES}: tl.constexpr,\n"
        "):\n"
        f'    """Scans at once: {what}."""\n'
        "    pid = tl.program_id(0)\n"
        "    part = pid % NV\n"
        "    row = pid // NV\n"
        f"{''.join(branches)}"
        "    else:\n"
        f"        {calls[-1][1]}\n"
    )


class _Parameters:
    """The parameters of several kernels: one of each kind and name of what is passed."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, object], Parameter] = {}

    @property
    def all(self) -> tuple[Parameter, ...]:
        return tuple(self._found.values())

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
                channels = OTHER[channels]
            self._found[p.role, p.of] = replace(p, name=name, channels=channels)
        return self._found[p.role, p.of].name
