"""The command `chunkwise report`: a page of HTML on one recurrence."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_command import Command, UsageError, add_target, find
from .cli_emit import dims
from .codegen.config import Dims
from .codegen.interface import Dtype
from .dsl.declaration import Declaration
from .dsl.errors import ChunkwiseError, NotLowered
from .dsl.normal_form import NormalForm
from .report import facts, page
from .report.pictures import plan_costs
from .runtime.engine import chunk_refusal
from .runtime.tuned.machine import processor, version

if TYPE_CHECKING:
    from .codegen.triton.offline import Outcome

_TOKENS, _HEADS = 1024, 4  # of the call that is timed
_QUICK_TOKENS = 80  # of the sequences whose results are compared


def _report(arguments: argparse.Namespace) -> int:
    declared = find(arguments.target).declaration
    output: Path = arguments.output or Path(f"{declared.name}.html")
    if not output.parent.is_dir():
        raise UsageError(f"no folder {output.parent}")
    sections = list(_sections(declared, arguments))
    output.write_text(page.page(declared, sections, _made()), encoding="utf-8")
    print(f"{output}: {len(sections)} sections, {output.stat().st_size / 1024:.0f} KiB")
    return 0


def _sections(declared: Declaration, arguments: argparse.Namespace) -> Iterator[page.Section]:
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
    yield _proof(declared, quick=arguments.quick)
    if refused is None:
        costs = plan_costs(form, arguments.dims, Dtype(arguments.dtype))
        yield page.plan_section(form.name, costs)
        yield _resources(form, arguments)
        tuned = facts.tuned_rows(form)
        none = "" if len(tuned) > 1 else "Nothing was tuned: defaults serve."
        yield page.table_section("Tuned configurations", tuned, none)
    yield _agreement(declared, quick=arguments.quick)
    if refused is None and not arguments.quick:
        yield _speed(declared)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _proof(declared: Declaration, *, quick: bool) -> page.Section:
    from .codegen.prove import prove  # SymPy takes half a second to import

    _say("proving that the chunk form equals the step")
    start = time.perf_counter()
    try:
        proof = prove(declared, 2 if quick else 3)
    except NotLowered as refused:
        return page.table_section("Proof", (), f"Left out: {refused.headline}: {refused.why}")
    return page.proof_section(str(proof), time.perf_counter() - start)


def _resources(form: NormalForm, arguments: argparse.Namespace) -> page.Section:
    title = "Resources per target"
    if arguments.quick:
        return page.table_section(title, (), "Left out: --quick compiles nothing for GPUs.")
    if importlib.util.find_spec("triton") is None:
        return page.table_section(title, (), "Left out: Triton is not installed here.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return page.table_section(title, (), "Left out: TRITON_INTERPRET=1 replaces the compiler.")
    from .audit import Subject
    from .codegen.triton import offline
    from .codegen.triton.resources import Target

    columns = {}
    for target in Target:
        name = target.name.lower()
        subject = Subject(form, arguments.dims, Dtype(arguments.dtype), target, packed=False)
        jobs = {k: subject.job(k, subject.default) for k in subject.kernels(subject.default)}
        _say(f"compiling {len(jobs)} kernels for {name}")
        outcomes = offline.run_jobs({j.key: j for j in jobs.values()}, arguments.jobs)
        column = {kernel: _taken(outcomes[job.key]) for kernel, job in jobs.items()}
        columns[f"{name}, of {target.shared_limit // 1024} KiB"] = column
    kernels = dict.fromkeys(kernel for column in columns.values() for kernel in column)
    rows = [(k, *(column.get(k, "-") for column in columns.values())) for k in kernels]
    note = (
        f"Shared memory of a program, registers and spills of a thread; by default, "
        f"{arguments.dtype}, K={arguments.dims.K}, V={arguments.dims.V}, compiled without a GPU. "
        "Registers and spills are known for NVIDIA's GPUs."
    )
    return page.table_section(title, [("kernel", *columns), *rows], note)


def _taken(outcome: Outcome) -> str:
    r = outcome.resources
    if r is None:
        return outcome.error
    text = f"{r.shared / 1024:.0f} KiB"
    if r.registers is not None:
        text += f", {r.registers} registers"
    if r.spills:
        text += f", {r.spills} B spilled"
    return text if r.fits else f"does not fit: {text}"


def _agreement(declared: Declaration, *, quick: bool) -> page.Section:
    import torch

    size = Dims(16, 16) if quick else Dims(64, 64)
    tokens = _QUICK_TOKENS if quick else facts.TOKENS
    _say("comparing the engines with the token loop in float64")
    try:
        found = list(facts.agreement(declared, size, torch.float32, tokens))
    except NotLowered as refused:
        note = f"Left out: {refused.headline}: {refused.why}"
        return page.table_section("Agreement of engines", (), note)
    limits = (
        "Against the declared step, token by token in float64, on ordinary, hard and packed "
        f"inputs of {tokens} tokens; float32, K={size.K}, V={size.V}. `d q` is the gradient of q."
    )
    return page.agreement_section(found, limits)


def _speed(declared: Declaration) -> page.Section:
    import torch

    size = Dims(64, 64)
    _say("timing the engines that run here")
    try:
        found = list(facts.speed(declared, size, torch.float32, _TOKENS, _HEADS))
    except ChunkwiseError as refused:
        return page.table_section("Speed here", (), f"Left out: {refused.headline}")
    sizes = f"one sequence of {_TOKENS:,} tokens, {_HEADS} heads, K={size.K}, V={size.V}, float32"
    return page.speed_section(found, sizes)


def _made() -> str:
    packages = {name: version(name) for name in ("chunkwise", "torch", "triton", "apache-tvm")}
    versions = ", ".join(f"{n} {v}" for n, v in packages.items() if v is not None)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"Made by `chunkwise report` on {today}, on {processor()}: {versions}."


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write here (default: NAME.html)"
    )
    parser.add_argument(
        "--dims", type=dims, default=Dims(128, 128), help="of the plan: K=128,V=128"
    )
    parser.add_argument("--dtype", choices=[d.value for d in Dtype], default="bfloat16")
    parser.add_argument(
        "--quick", action="store_true", help="nothing compiled for GPUs or timed; small proofs"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")


REPORT = Command(
    "report",
    "Write a page of HTML on a recurrence: equations, proof, plan, resources, errors, speed.",
    (
        "chunkwise report gated_delta_rule",
        "chunkwise report my_rules.py:my_rule -o report.html --quick",
    ),
    _arguments,
    _report,
)
