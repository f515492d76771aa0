"""Runs a short forward and backward of each class of recurrence, for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize kda
compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize --segments kda

python -m benchmarks.sanitize --layouts

runs calls whose tensors have every layout in memory (tests/layout_calls.py) and checks their
results. First, several processes run the calls with `--plain`, which compiles the kernels. Then one
process runs them under memcheck, with every tensor in an allocation of its own. The output is a
line per recurrence and the number of errors.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import chunkwise as cw
import torch
import triton
from chunkwise.autotune.inputs import Family, draw
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import transition_of
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.runtime.triton import engine as triton_engine

from tests import classes, net
from tests.harness import Sizes
from tests.layout_calls import PLAIN, TURNS, check_call, check_steps
from tests.tolerances import BY_DTYPE, FLOAT32_HARD

# one per class: no decay, two states, a scalar gate, a vector gate; solves under each of them; a
# correction that reads the undecayed state, a general low rank, several micro-steps
CLASSES = (*classes.CLASSES, "gated_delta_product")

# sequences that end within a chunk; channels that are no whole tile, nor (float32) a whole vector
PACKED = Sizes(H=2, HV=4, K=20, V=37, initial=True, dtype=torch.float32).packed(0, 65, 1, 34)
DENSE = Sizes(
    T=70, H=2, HV=2, K=40, V=24, initial=True, dtype=torch.bfloat16, gate_dtype=torch.float32
)
# shorter calls for Triton's interpreter, whose chunks have 16 tokens
SHORT = replace(PACKED, K=5, V=17).packed(0, 17, 1, 5)

_LINES = 200  # lines of the sanitizer's report that are printed at most


def main() -> int:
    """Run the command line; returns 0 if there are no errors."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=CLASSES)
    parser.add_argument("--segments", action="store_true", help="scan in segments of one chunk")
    parser.add_argument("--layouts", action="store_true", help="every layout, results compared")
    parser.add_argument("--plain", action="store_true", help="these calls without the sanitizer")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile (0: none)")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="its path")
    options = parser.parse_args()
    if not options.layouts:
        ragged(options.names, segments=options.segments)
        return 0
    if options.plain:
        return layouts(options.names, segments=options.segments)
    return memcheck(options)


def ragged(names: Sequence[str], *, segments: bool) -> None:
    """Run the named recurrences once."""
    for name in names:
        d = getattr(cw.library, name).declaration
        micro = d.default_micro
        # ends of sequences within a chunk, and tiles that are wider than the operand
        call = draw(
            d, d.normal_form(micro), Family.RAGGED, Dims(48, 48), torch.bfloat16,
            torch.device("cuda"), tokens=130, micro=micro,
        )  # fmt: skip
        config = segment = None
        if segments:  # the engine would not scan such short calls in segments
            dims = Dims(call.K, call.V)
            config = triton_engine.configuration(call.form, dims, call.dtype)
            segment = 64 if transition_of(call.form, dims) else 0
        o, finals = triton_engine.ENGINE.forward(call, config, segment=segment)
        dfinals = tuple(map(torch.randn_like, finals))
        triton_engine.ENGINE.backward(call, torch.randn_like(o), dfinals, config, segment=segment)
        triton_engine.ENGINE.forward_by_token(call)
        torch.cuda.synchronize()
        print(f"{name}: ran")


def layouts(names: Sequence[str], *, segments: bool) -> int:
    """Run every layout of the named recurrences and compare results; 1 if any are wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = [*((PACKED, turn) for turn in range(TURNS)), (DENSE, 0), (DENSE, 3)]
    # the second of two equal calls with aligned tensors repeats the launches of the first
    calls += [(DENSE, PLAIN), (DENSE, PLAIN)]
    if triton.knobs.runtime.interpret:
        device, calls = "cpu", [(SHORT, 2), (SHORT, 3)]
        net.prepare("triton")
    elif segments:
        vars(triton_engine)["segment_of"] = _one_chunk
    wrong = 0
    for name in names:
        op: cw.Recurrence = getattr(cw.library, name)
        complaints = []
        steps = [(replace(calls[0][0], T=2, B=2, lengths=None), turn) for turn in (0, 4)]
        for check, many in ((check_call, calls), (check_steps, steps)):
            for sizes, turn in many:
                limit = BY_DTYPE[sizes.dtype] if sizes.dtype.itemsize == 2 else FLOAT32_HARD
                try:
                    check(op, replace(sizes, device=device), turn, "triton", limit)
                except AssertionError as difference:
                    said = str(difference).replace("\n", ", ")
                    complaints.append(f"{check.__name__}, turn {turn}: {said}")
        said = "; ".join(complaints) or f"{len(calls)} calls and {2 * len(steps)} steps are right"
        print(f"{name}: {said}", flush=True)
        wrong += len(complaints)
    print(f"{wrong} wrong results", flush=True)
    return int(wrong > 0)


def _one_chunk(form: NormalForm, dims: Dims, *sizes: object) -> int:
    return 64 if transition_of(form, dims) else 0


def memcheck(options: argparse.Namespace) -> int:
    """Compile in several processes, then run under memcheck in one; 1 if there are errors."""
    command = [sys.executable, "-m", "benchmarks.sanitize", "--layouts", "--plain"]
    command += ["--segments"] if options.segments else []
    jobs = min(options.jobs, len(options.names))
    share = [options.names[n::jobs] for n in range(jobs)]
    compiling = [subprocess.Popen([*command, *s], stdout=subprocess.PIPE, text=True) for s in share]
    errors = 0
    for process in compiling:
        said, _ = process.communicate()
        errors += process.returncode != 0
        if process.returncode:
            print(f"without the sanitizer:\n{said}", flush=True)
    sanitizer = [options.sanitizer, "--tool", "memcheck", "--padding", "4096"]
    sanitizer += ["--target-processes", "application-only"]
    # memory beyond a tensor must not belong to another tensor
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = subprocess.Popen(
        [*sanitizer, *command, *options.names], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert checked.stdout is not None
    report = []
    for line in checked.stdout:
        if line.startswith("========="):
            report.append(line)
        else:
            print(line, end="", flush=True)
    summary = re.search(r"ERROR SUMMARY: (\d+) errors?", "".join(report))
    found = int(summary[1]) if summary else 1
    if found:
        print("".join(report[:_LINES]), flush=True)
    errors += found + (checked.wait() != 0)
    print(f"{errors} errors (memcheck: {summary[0] if summary else 'no summary'})")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
