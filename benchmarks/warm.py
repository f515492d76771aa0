"""Compiles ahead: runs each side's first call in a process of its own, many at a time.

Autotuners run each of their configurations once and do not time it, because processes that share a
GPU would disturb one another. The compiled kernels land in Triton's cache on disk. The timing run
then tunes undisturbed and has nothing left to compile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from chunkwise.cli_arguments import add_dtype
from chunkwise.codegen.interface import Dtype

SIDES = ("ours", "peer")


def warm_all(
    recurrences: Sequence[str], shapes: Sequence[str], sides: Sequence[str], dtype: str, jobs: int
) -> float:
    """Compile in `jobs` processes, print failures to stderr, and return the seconds taken."""
    started = time.perf_counter()
    # nothing is measured here, so that the results of tuning must not be cached
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}

    def warm(task: tuple[str, str, str]) -> None:
        name, shape, side = task
        command = [sys.executable, "-m", "benchmarks.warm", name, shape, side, "--dtype", dtype]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"warm-up of {name} {shape} {side}: {last}", file=sys.stderr)

    tasks = [(r, s, side) for s in shapes for r in recurrences for side in sides]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(warm, tasks))
    return time.perf_counter() - started


def _run_once(call: Callable[[], object], quantiles: Iterable[float] = (), **_: object) -> object:
    call()
    return [1.0 for _ in quantiles] or 1.0


def _compile_only() -> None:
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = property(lambda self: _run_once)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recurrence")
    parser.add_argument("shape")
    parser.add_argument("side", choices=SIDES)
    add_dtype(parser, Dtype.BFLOAT16)
    args = parser.parse_args(argv)
    _compile_only()

    import chunkwise

    from . import measure, peers
    from .registry import CASES, SHAPES, cu_seqlens, draw

    device = torch.device("cuda")
    case, shape = CASES[args.recurrence], SHAPES[args.shape]
    operands = draw(case, shape, getattr(torch, args.dtype.value), device)
    packed = cu_seqlens(shape, device)
    values = tuple(operands.values())
    leaves = [x for x in values if x.requires_grad]

    def call() -> torch.Tensor:
        if args.side == "peer":
            if case.peer is None:
                raise SystemExit(f"{case.name} has no peer")
            return case.peer(*values, cu_seqlens=packed)
        op = getattr(chunkwise.library, case.name)
        o: torch.Tensor = op(*values, cu_seqlens=packed)[0]
        return o

    if args.side == "peer" and case.peer_backward_refused:
        peers.lift_refusal()
    do = torch.randn_like(operands["v"])
    measure.first_call(measure.forward_backward(call, leaves, do), device)
    # without gradients a side may choose other kernels
    measure.first_call(measure.forward(call), device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
