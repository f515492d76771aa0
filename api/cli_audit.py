"""The command `chunkwise audit`: compile every kernel for every target and report which fit."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from . import library
from .cli_arguments import add_dims_list, dtype
from .cli_command import TARGET, Command, UsageError, unknown_name, write
from .cli_emit import add_targets, targets, triton_compiler
from .codegen.config import Dims
from .codegen.interface import Dtype


def _audit(arguments: argparse.Namespace) -> int:
    with triton_compiler():
        from .audit import Audit, all_subjects, as_json, fits, quick_subjects, report
    for name in arguments.names:
        if name not in library.names():
            raise UsageError(unknown_name(name))
    if arguments.quick:
        subjects = quick_subjects()
        if arguments.names:
            subjects = [s for s in subjects if s.form.name in arguments.names]
    else:
        subjects = all_subjects(
            arguments.names,
            arguments.dims or [Dims(128, 128)],
            arguments.dtype or [Dtype.BFLOAT16, Dtype.FLOAT32],
            list(targets(arguments.for_target).values()),
        )
    started = time.perf_counter()
    audit, interrupted = Audit(subjects), False
    try:
        audit.run(arguments.jobs)
    except KeyboardInterrupt:
        interrupted = True
    found = audit.found()
    print(report(found))
    print(f"in {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.json:
        text = json.dumps([as_json(s, o) for s, o in found.items()], indent=1)
        write(arguments.json, text + "\n")
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(map(fits, found.values())) else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar=TARGET, help="recurrences of the library (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="one recurrence per class, bf16")
    add_dims_list(parser)
    parser.add_argument(
        "--dtype",
        type=dtype,
        action="append",
        metavar="DTYPE",
        help="as for emit, repeatable; default: bfloat16 and float32",
    )
    add_targets(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers here")


AUDIT = Command(
    "audit",
    "Compile every kernel for every target, without a GPU, and report which do not fit.",
    (
        "chunkwise audit --quick",
        "chunkwise audit kda --dtype bf16 --target sm90 --json audit.json",
    ),
    _arguments,
    _audit,
)
