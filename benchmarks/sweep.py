"""Times every kernel of a recurrence under many configurations: what the default rules come from.

    python -m benchmarks.sweep gated_delta_rule --shape F --json out/sweep.json

Kernels are compiled in parallel processes first (each a run on a few tokens), then timed one
configuration after the other by the device's own clock. Until there is a tuner, people read the
table; results are not checked here (tests/gpu does).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from chunkwise.codegen.config import Config, Dims, KernelConfig
from chunkwise.codegen.differentiate import GRADIENT
from chunkwise.codegen.emit import chunk_body
from chunkwise.codegen.fit import H100_SHARED
from chunkwise.codegen.plan import backward_plans, forward_plans
from chunkwise.dsl.library import by_name
from chunkwise.runtime import call as calls
from chunkwise.runtime import triton_engine
from chunkwise.runtime.launch import Launch
from torch.profiler import ProfilerActivity, profile

from .registry import CASES, SHAPES, Shape, draw

TILES = (
    (32, 4, 2), (32, 4, 3), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 8, 2)
)  # fmt: skip
KEY_TILES = ((16, 2), (32, 2), (32, 4), (64, 2), (64, 4))
REPEATS = 5


def candidates(name: str, dims: Dims, plans: bool) -> Iterator[tuple[str, Config]]:
    """Labelled configurations: the default, one change for all kernels each, and every plan."""
    form = by_name(name).normal_form()
    default = triton_engine.configuration(form, dims, torch.bfloat16, H100_SHARED)
    yield "default", default
    for (v_tile, warps, stages), chunk in itertools.product(TILES, (32, 64)):
        kernel = KernelConfig(v_tile, warps, stages)
        label = f"C={chunk} BV={v_tile} warps={warps} stages={stages}"
        yield label, replace(default, chunk=chunk, default=kernel, kernels=())
    for (k_tile, warps), chunk in itertools.product(KEY_TILES, (32, 64)):
        kernel = KernelConfig(64, warps, 1, k_tile)
        label = f"C={chunk} BK={k_tile} warps={warps}"
        yield label, replace(default, chunk=chunk, default=kernel, kernels=())
    if plans:
        body = chunk_body(form)
        for forward, backward in itertools.zip_longest(forward_plans(body), backward_plans(body)):
            chosen = replace(
                default, forward=forward or default.forward, backward=backward or default.backward
            )
            yield f"plan {chosen.forward.label} / {chosen.backward.label}", chosen


def times(name: str, shape: Shape, config: Config) -> dict[str, float]:
    """Microseconds of each kernel of a forward and a backward."""
    device = torch.device("cuda")
    operands = draw(CASES[name], shape, torch.bfloat16, device, 0)
    call = calls.bind(by_name(name), tuple(x.detach() for x in operands.values()), {})
    dtypes = tuple((n, x.dtype) for n, x in call.operands.items())
    compiled = triton_engine.compile_with(
        call.form, Dims(call.K, call.V), call.dtype, dtypes, config
    )
    do = torch.randn_like(operands["v"])
    states = [s.name for s in call.form.states]
    nothing = dict.fromkeys([*states, *(GRADIENT + s for s in states)])

    def both() -> None:
        Launch(call, config, {}).run(compiled.forward, nothing)
        Launch(call, config, {GRADIENT + "o": do}).run(compiled.backward, nothing)

    both()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPEATS):
            both()
        torch.cuda.synchronize()
    return {
        e.key: e.device_time_total / e.count
        for e in recorded.key_averages()
        if e.key.startswith(("forward_", "backward_"))
    }


def _warm(name: str, shape: Shape, worker: int, workers: int, plans: bool) -> None:
    short = replace(shape, B=1, T=min(shape.T, 256))
    labelled = list(candidates(name, Dims(shape.D, shape.D), plans))
    for _, config in labelled[worker::workers]:
        try:
            times(name, short, config)
        except RuntimeError as error:  # too much shared memory: the timing run will say so
            print(error, file=sys.stderr)


def main() -> None:
    """Print a table, best first for each kernel, and write everything as JSON."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("name", choices=list(CASES))
    p.add_argument("--shape", choices=list(SHAPES), default="F")
    p.add_argument("--plans", action="store_true", help="also every plan, with default tiles")
    p.add_argument("--json", type=Path)
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    p.add_argument("--warm", type=int, default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    shape = SHAPES[a.shape]
    if a.warm is not None:
        _warm(a.name, shape, a.warm, a.workers, a.plans)
        return
    again = [sys.executable, "-m", "benchmarks.sweep", *sys.argv[1:]]
    running = [
        subprocess.Popen([*again, "--workers", str(a.workers), "--warm", str(n)])
        for n in range(a.workers)
    ]
    for process in running:
        process.wait()
    rows: dict[str, dict[str, float]] = {}
    for label, config in candidates(a.name, Dims(shape.D, shape.D), a.plans):
        try:
            rows[label] = times(a.name, shape, config)
        except RuntimeError as error:
            print(f"{label}: {str(error).splitlines()[0]}")
    for kernel in sorted({k for row in rows.values() for k in row}):
        best = sorted((row[kernel], label) for label, row in rows.items() if kernel in row)
        print(kernel, "; ".join(f"{t:.0f} us {label}" for t, label in best[:4]))
    if a.json is not None:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
