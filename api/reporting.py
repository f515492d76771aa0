"""Makes the sections of a report, those that prove, compile, run and time included."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .cli_command import UsageError
from .cli_emit import triton_compiler
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .codegen.prove import prove
from .dsl.declaration import Declaration
from .dsl.errors import ChunkwiseError, NotLowered
from .dsl.normal_form import NormalForm
from .report import facts, page
from .report.pictures import plan_costs
from .runtime.cannot_run import CannotRun
from .runtime.engine import chunk_refusal
from .runtime.tuned.machine import processor, version

if TYPE_CHECKING:
    from .codegen.triton.offline import Outcome

_TOKENS, _HEADS = 1024, 4  # of the call that is timed
_QUICK_TOKENS = 80  # of the sequences whose results are compared


@dataclass(frozen=True, slots=True)
class Options:
    """The dimensions and dtype of plan and resources; `quick`: nothing compiled for GPUs or timed.

    `jobs`: processes that compile.
    """

    dims: Dims
    dtype: Dtype
    quick: bool
    jobs: int


def sections(declared: Declaration, options: Options) -> Iterator[page.Section]:
    """Every section that applies, in order; those that take long show progress on stderr."""
    yield page.step_section(declared)
    yield page.table_section("Features", [("feature", ""), *facts.features(declared)])
    if declared.any_step:
        return
    form = declared.normal_form(declared.default_micro)
    yield page.form_section(form)
    refused = chunk_refusal(form)
    if refused is None:
        yield page.chunk_section(form)
    else:
        yield page.table_section("Chunk form", (), f"There is none: {refused}")
    yield _proof(declared, quick=options.quick)
    if refused is None:
        costs = plan_costs(form, options.dims, options.dtype)
        yield page.plan_section(form.name, costs)
        yield _resources(form, options)
        tuned = facts.tuned_rows(form)
        none = "" if len(tuned) > 1 else "Nothing was tuned: defaults serve."
        yield page.table_section("Tuned configurations", tuned, none)
    yield _agreement(declared, quick=options.quick)
    if refused is None and not options.quick:
        yield _speed(declared)


def _proof(declared: Declaration, *, quick: bool) -> page.Section:
    start = time.perf_counter()
    try:
        with Progress("proving that the chunk form equals the step"):
            proof = prove(declared, 2 if quick else 3)
    except NotLowered as refused:
        return page.table_section("Proof", (), f"Left out: {refused.reason}")
    return page.proof_section(str(proof), time.perf_counter() - start)


def _resources(form: NormalForm, options: Options) -> page.Section:
    title = "Resources per target"
    if options.quick:
        return page.table_section(title, (), "Left out: --quick compiles nothing for GPUs.")
    try:
        with triton_compiler():
            from .audit import Audit, Subject
            from .codegen.triton.resources import Target
    except UsageError as why:
        return page.table_section(title, (), f"Left out: {why}")
    audit = Audit(
        Subject(form, options.dims, options.dtype, target, packed=False) for target in Target
    )
    audit.run(options.jobs)
    columns = {
        f"{s.target.name.lower()}, of {s.target.shared_limit // 1024} KiB": {
            kernel: _taken(outcome) for kernel, outcome in outcomes.items()
        }
        for s, outcomes in audit.found().items()
    }
    kernels = dict.fromkeys(kernel for column in columns.values() for kernel in column)
    rows = [(k, *(column.get(k, "-") for column in columns.values())) for k in kernels]
    note = (
        f"Shared memory of a program, registers and spills of a thread; by default, "
        f"{options.dtype.value}, K={options.dims.K}, V={options.dims.V}, compiled without a GPU. "
        "Registers and spills are known for NVIDIA's GPUs."
    )
    return page.table_section(title, [("kernel", *columns), *rows], note)


def _taken(outcome: Outcome) -> str:
    from .codegen.triton.offline import verdict

    r = outcome.resources
    if r is None:
        return outcome.error
    text = f"{r.shared / 1024:.0f} KiB"
    if r.registers is not None:
        text += f", {r.registers} registers"
    if r.spills:
        text += f", {r.spills} B spilled"
    wrong = verdict(outcome)
    return f"{wrong}: {text}" if wrong else text


def _agreement(declared: Declaration, *, quick: bool) -> page.Section:
    size = Dims(16, 16) if quick else Dims(64, 64)
    tokens = _QUICK_TOKENS if quick else facts.TOKENS
    try:
        with Progress("comparing the engines with the token loop in float64"):
            found = list(facts.agreement(declared, size, torch.float32, tokens))
    except NotLowered as refused:
        return page.table_section("Agreement of engines", (), f"Left out: {refused.reason}")
    limits = (
        "Against the declared step, token by token in float64, on ordinary, hard and packed "
        f"inputs of {tokens} tokens; float32, K={size.K}, V={size.V}. “d q” is the gradient of q."
    )
    return page.agreement_section(found, limits)


def _speed(declared: Declaration) -> page.Section:
    size = Dims(64, 64)
    try:
        with Progress("timing the engines that run here"):
            found = list(facts.speed(declared, size, torch.float32, _TOKENS, _HEADS))
    except (ChunkwiseError, CannotRun) as refused:
        return page.table_section("Speed here", (), f"Left out: {refused}")
    sizes = f"one sequence of {_TOKENS:,} tokens, {_HEADS} heads, K={size.K}, V={size.V}, float32"
    return page.speed_section(found, sizes)


def made() -> str:
    """With which versions, when and on what a page was made."""
    packages = {name: version(name) for name in ("chunkwise", "torch", "triton", "apache-tvm")}
    versions = ", ".join(f"{n} {v}" for n, v in packages.items() if v is not None)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"Made by chunkwise report on {today}, on {processor()}: {versions}."
