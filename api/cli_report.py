"""The command `chunkwise report`: a page of HTML on one recurrence."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .cli_arguments import add_dims, add_dtype, count
from .cli_command import Command, UsageError, add_target, find, write
from .codegen.config import Dims
from .codegen.interface import Dtype


def _report(arguments: argparse.Namespace) -> int:
    from . import reporting  # the proof, the audit and their libraries
    from .report.page import page

    declared = find(arguments.target).declaration
    output: Path = arguments.output or Path()
    if output.is_dir():
        output /= f"{declared.name}.html"
    if not output.parent.is_dir():
        raise UsageError(f"no folder {output.parent}")
    options = reporting.Options(arguments.dims, arguments.dtype, arguments.quick, arguments.jobs)
    sections = list(reporting.sections(declared, options))
    write(output, page(declared, sections, reporting.made()))
    print(f"{output}: {len(sections)} sections, {output.stat().st_size / 1024:.0f} KiB")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write here (default: NAME.html)"
    )
    add_dims(parser, Dims(128, 128), " (of the plan)")
    add_dtype(parser, Dtype.BFLOAT16)
    parser.add_argument(
        "--quick", action="store_true", help="nothing compiled for GPUs or timed; small proofs"
    )
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, help="compilations at a time"
    )


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
