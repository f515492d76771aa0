"""The command `chunkwise emit`: a recurrence, printed at any stage of the compiler."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_arguments import add_dims, add_dtype, count
from .cli_command import Command, UsageError, add_target, find, no_such, write
from .codegen.config import Config, Dims, KernelConfig, Precision
from .codegen.eager.kernel import print_eager
from .codegen.gluon import emit as gluon_emit
from .codegen.interface import Dtype, Signature
from .codegen.plan import Loop, Plan, Program
from .codegen.programs import (
    backward_program,
    chunk_adjoint,
    chunk_program,
    forward_program,
    transition_of,
)
from .codegen.text.mathematics import print_adjoint, print_chunk, print_program
from .codegen.text.table import table
from .codegen.token import token_program
from .codegen.triton.emit import emit, emit_token
from .codegen.triton.fit import H100_SHARED, untuned_config
from .codegen.triton.kernel import print_triton
from .dsl.explain import print_form, print_step
from .dsl.normal_form import NormalForm
from .dsl.step import Step
from .runtime.extras import how_to_install

if TYPE_CHECKING:
    from .codegen.triton.resources import Target

_EAGER_HEAD = """\
import torch
import torch.nn.functional as F
from chunkwise.codegen.eager.library import *  # decayed_dot, prefix_sum, unit_lower_inverse, ...
"""


@dataclass(frozen=True, slots=True)
class _Request:
    """A recurrence to print for given dimensions and dtype, under its default plan."""

    step: Step
    form: NormalForm
    dims: Dims
    dtype: Dtype
    kernel: str | None
    segments: bool

    @property
    def config(self) -> Config:
        """The configuration that the runtime chooses on an H100 if nothing was tuned."""
        return untuned_config(self.form, self.dims, self.dtype, H100_SHARED)

    @property
    def programs(self) -> dict[str, Program]:
        """The kernels of each direction, or only the requested one."""
        return self.under(self.config.forward, self.config.backward)

    def under(self, forward: Plan, backward: Plan) -> dict[str, Program]:
        """The kernels under other plans."""
        programs = {
            f"forward, plan {forward.label}": forward_program(
                self.form, forward, segments=self.segments
            ),
            f"backward, plan {backward.label}": backward_program(
                self.form, backward, segments=self.segments
            ),
        }
        if self.kernel is None:
            return programs
        names = [k.name for p in programs.values() for k in p.kernels]
        if self.kernel not in names:
            raise UsageError(no_such("kernel", self.kernel, names))
        chosen = {
            label: replace(p, kernels=tuple(k for k in p.kernels if k.name == self.kernel))
            for label, p in programs.items()
        }
        return {label: p for label, p in chosen.items() if p.kernels}


def _plan(request: _Request) -> str:
    return "\n\n".join(
        f"{label}\n\n{print_program(program)}" for label, program in request.programs.items()
    )


def _eager(request: _Request) -> str:
    programs = request.programs.values()
    sources = [print_eager(kernel).source for program in programs for kernel in program.kernels]
    return "\n\n".join([_EAGER_HEAD, *sources] if request.kernel is None else sources)


def _triton(request: _Request) -> str:
    signature = Signature(request.dims, request.dtype, (), Precision.TF32X3)
    if request.kernel is None:
        return emit(request.form, signature, request.config, segments=request.segments).source
    kernels = [k for program in request.programs.values() for k in program.kernels]
    return "\n\n".join(print_triton(k, signature, request.config).source for k in kernels)


def _gluon(request: _Request) -> str:
    """The kernels that Gluon can have, and why others have to be in Triton."""
    signature = Signature(request.dims, request.dtype, (), Precision.TF32X3)
    kernels = [k for program in request.programs.values() for k in program.kernels]
    chunks = {k.name: KernelConfig(64, 8, 3) for k in kernels if k.loop is Loop.PARALLEL}
    scans = KernelConfig(64, 4, 2)
    config = gluon_emit.in_gluon(request.form, request.config, scans, chunks=chunks)
    made = gluon_emit.emit(request.form, signature, config, segments=request.segments)
    if made is None:
        raise UsageError(f"{request.form.name} has no scan")
    printed = [k for k in made.kernels if request.kernel in (None, k.name)]
    stay = [f"# {n} stays in Triton: {w}" for n, w in made.refused if request.kernel in (None, n)]
    source = [k.source for k in printed] if request.kernel else [made.source] * bool(printed)
    return "\n\n".join([*source, *stay])


def _tir(request: _Request) -> str:
    """TVM's functions for a CPU with AVX2: each kernel, after the functions that it calls."""
    if importlib.util.find_spec("tvm") is None:
        raise UsageError(f"stage tir is printed by TVM: {how_to_install('tvm')}")
    from .codegen.tir.config import default_config as default_tvm
    from .codegen.tir.kernel import print_tir

    config = default_tvm(lanes=8)
    signature = Signature(request.dims, request.dtype, (), Precision.IEEE)
    programs = request.under(config.forward, config.backward).values()
    printed = [print_tir(k, signature, config) for p in programs for k in p.kernels]
    scripts = [str(f.script()) for k in printed for f in (*k.parts, k.function)]
    head, _, _ = scripts[0].partition("@T.prim_func")
    return head + "\n\n".join(script.removeprefix(head) for script in scripts)


def _token(request: _Request) -> str:
    """The token form, and the Triton kernel printed from it."""
    signature = Signature(request.dims, request.dtype, (), Precision.TF32X3)
    source = emit_token(request.step, signature).source
    return f"{print_chunk(token_program(request.step))}\n\n{source}"


_STAGES: dict[str, Callable[[_Request], str]] = {
    "step": lambda r: print_step(r.step),
    "normal": lambda r: print_form(r.form),
    "chunk": lambda r: print_chunk(chunk_program(r.form)),
    "token": _token,
    "adjoint": lambda r: print_adjoint(chunk_adjoint(r.form)),
    "plan": _plan,
    "eager": _eager,
    "triton": _triton,
    "gluon": _gluon,
    "tir": _tir,
}

_OF_KERNELS = ("plan", "eager", "triton", "gluon", "tir")


def _emit(arguments: argparse.Namespace) -> int:
    if arguments.stage is None and not arguments.resources:
        arguments.stage = "triton"
    if arguments.for_target and not arguments.resources:
        raise UsageError("--target applies to --resources; printed kernels are for every target")
    if arguments.kernel and arguments.stage not in _OF_KERNELS:
        raise UsageError(f"--kernel applies to the stages {', '.join(_OF_KERNELS)}")
    declared = find(arguments.target).declaration
    micro = arguments.micro or declared.default_micro
    if arguments.micro and not declared.has_micro:
        raise UsageError(f"--micro applies to tuple operands, and {declared.name} has none")
    request = _Request(
        declared.step(micro),
        declared.normal_form(micro),
        arguments.dims,
        arguments.dtype,
        arguments.kernel,
        arguments.segments,
    )
    if request.segments:
        if arguments.stage not in (None, "plan", "triton"):
            raise UsageError("--segments applies to plan, triton and --resources")
        if transition_of(request.form, request.dims) is None:
            raise UsageError(
                f"{request.form.name} is not scanned in segments at K={request.dims.K}: its states "
                "must fade, or be multiplied by matrices of at most 128 keys"
            )
    if arguments.stage is not None:
        text = _STAGES[arguments.stage](request).rstrip("\n")
        if arguments.output is None:
            print(text)
        else:
            write(arguments.output, text + "\n")
    return _resources(request, arguments) if arguments.resources else 0


@contextmanager
def triton_compiler() -> Iterator[None]:
    """Import modules that compile with Triton; a UsageError says why they cannot compile here."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it to compile")
    try:
        yield
    except ModuleNotFoundError as missing:
        raise UsageError(f"this needs {missing.name}, which is not installed") from missing


def targets(text: str | None) -> dict[str, Target]:
    """`sm90,gfx942` as targets by name; every target for None."""
    from .codegen.triton.resources import Target

    known = {t.name.lower(): t for t in Target}
    names = text.split(",") if text else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(no_such("target", unknown[0], known))
    return {name: known[name] for name in names}


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The --target and --jobs flags of commands that compile: `for_target` and `jobs`."""
    parser.add_argument(
        "--target", dest="for_target", metavar="T,T", help="sm80, sm90, sm100, sm120, gfx942"
    )
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, help="compilations at a time"
    )


_COUNTED = ("wgmma", "local", "barriers", "lines")  # of the machine code, where it can be read


def _resources(request: _Request, arguments: argparse.Namespace) -> int:
    """Compile the runtime's choice for each target, and print the resources of each kernel."""
    with triton_compiler():
        from .audit import Audit, Subject
        from .codegen.triton.offline import verdict
    audit = Audit(
        Subject(
            *(request.form, request.dims, request.dtype, target),
            packed=False,
            segments=request.segments,
        )
        for target in targets(arguments.for_target).values()
    )
    interrupted = False
    try:
        audit.run(arguments.jobs)
    except KeyboardInterrupt:
        interrupted = True
    rows: list[tuple[str, ...]] = [
        ("kernel", "target", "shared", "limit", "registers", "spills", *_COUNTED, "")
    ]
    found = [(s.target, n, o) for s, of in audit.found(partial=True).items() for n, o in of.items()]
    for target, kernel, outcome in found:
        name, limit = target.name.lower(), f"{target.shared_limit // 1024} KiB"
        r = outcome.resources
        if r is None:
            taken = ["-", limit, *["-"] * (2 + len(_COUNTED))]
        else:
            registers = "-" if r.registers is None else str(r.registers)
            spills = "-" if r.spills is None else f"{r.spills} B"
            counts = r.usage.instructions
            counted = ["-" if counts is None else str(getattr(counts, n)) for n in _COUNTED]
            taken = [f"{r.shared / 1024:.1f} KiB", limit, registers, spills, *counted]
        rows.append((kernel, name, *taken, verdict(outcome)))
    print("\n".join(table(rows)), flush=True)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(o.fits for _, _, o in found) else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--stage", choices=tuple(_STAGES), help="what to print (default: triton)")
    parser.add_argument(
        "--kernel",
        metavar="NAME",
        help="print only this kernel (stages plan, eager, triton, gluon, tir)",
    )
    parser.add_argument(
        "--segments",
        action="store_true",
        help="print the scans of long sequences with few heads (docs/explanation/architecture.md)",
    )
    add_dims(parser, Dims(128, 128))
    add_dtype(parser, Dtype.BFLOAT16)
    parser.add_argument("--micro", type=count, metavar="N", help="micro-steps of tuple operands")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the stage here")
    parser.add_argument(
        "--resources",
        action="store_true",
        help="compile without a GPU: shared memory, registers and spills of each kernel",
    )
    add_targets(parser)


EMIT = Command(
    "emit",
    "Print a recurrence at any stage of the compiler, or the resources of its kernels.",
    (
        "chunkwise emit gated_delta_rule --stage chunk",
        "chunkwise emit kda --dims K=128,V=64 --dtype fp16 -o kda_kernels.py",
        "chunkwise emit my_rules.py:my_rule --resources --target sm90,gfx942",
    ),
    _arguments,
    _emit,
)
