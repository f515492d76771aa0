"""The command `chunkwise audit`: compile every kernel for every target and report which fit."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from .cli_command import Command
from .cli_emit import add_targets, dims, targets, triton_compiler
from .codegen.config import Dims
from .codegen.interface import Dtype


def _audit(arguments: argparse.Namespace) -> int:
    with triton_compiler():
        from .audit import all_subjects, as_json, audit, quick_subjects, report
    if arguments.quick:
        subjects = quick_subjects()
        if arguments.names:
            subjects = [s for s in subjects if s.form.name in arguments.names]
    else:
        subjects = all_subjects(
            arguments.names,
            arguments.dims or [Dims(128, 128)],
            [Dtype(d) for d in arguments.dtype or ("bfloat16", "float32")],
            list(targets(arguments.for_target).values()),
        )
    started = time.perf_counter()
    searches = audit(subjects, arguments.jobs)
    print(report(searches))
    print(f"in {time.perf_counter() - started:.0f} s")
    if arguments.json:
        text = json.dumps([as_json(s) for s in searches], indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(s.passed for s in searches) else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="recurrences of the library (default: all)")
    parser.add_argument("--quick", action="store_true", help="one recurrence per class, bf16")
    parser.add_argument("--dims", type=dims, action="append", help="K=128,V=128 (repeatable)")
    parser.add_argument("--dtype", choices=[d.value for d in Dtype], action="append")
    add_targets(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers here")


AUDIT = Command(
    "audit",
    "Compile every kernel for every target, without a GPU, and report which do not fit.",
    (
        "chunkwise audit --quick",
        "chunkwise audit kda --dtype bfloat16 --target sm90 --json audit.json",
    ),
    _arguments,
    _audit,
)
