"""Compares the TVM engine with torch on a CPU: time of calls and steps, memory, compilation.

The torch side is the derived chunk form in torch operations, with the derived gradient, at each
chunk length, and with `--compile` also under torch.compile. The fastest torch variant is compared.
The sides take turns and use the same number of threads; a ratio compares medians of one process.
"of sgemm" is the rate of our kernels' matrix products relative to the machine's fastest large
matrix product.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import chunkwise as cw
import torch
from chunkwise.autotune.measure import CpuDevice
from chunkwise.codegen.config import Dims, EagerConfig, Precision
from chunkwise.codegen.gates import DECAYED
from chunkwise.codegen.interface import Dtype, Signature
from chunkwise.codegen.plan import Program
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.tile import Axis
from chunkwise.codegen.tiling import tile
from chunkwise.codegen.tir.config import TvmConfig
from chunkwise.codegen.tir.schedule import Solve, schedule, zero_above
from chunkwise.runtime.call import Call, bind, values_of
from chunkwise.runtime.engine import Engine
from chunkwise.runtime.engines import EngineName, load
from chunkwise.runtime.prepared import Request, Way
from chunkwise.runtime.tuned.artifact import Configuration
from chunkwise.runtime.tvm import engine as tvm_engine
from torch import Tensor

from . import machine, measure, report
from .registry import CASES, Shape, draw
from .run import _names

CHUNKS = (32, 64, 128)
CPU = torch.device("cpu")


def _call(name: str, shape: Shape) -> Call:
    operands = draw(CASES[name], shape, torch.float32, CPU)
    declaration = getattr(cw.library, name).declaration
    return bind(declaration, (), {n: x.detach() for n, x in operands.items()})


def _sides(
    call: Call, do: Tensor, *, backward: bool, compiled: Sequence[int]
) -> dict[str, measure.Side]:
    """The TVM engine first, then every torch formulation."""
    given = (do, *(None for _ in call.form.states))
    values, cotangents = values_of(call), values_of(call, given)

    def side(engine: Engine, config: Configuration | None) -> Callable[[], object]:
        # what a record of the call's layout runs: torch.compile is to see no more than that
        forward = engine.prepare(Request(call, Way.CHUNKS, config=config).bare())
        pull_back = engine.prepare(Request(call, Way.BACKWARD, given, config).bare())

        def run() -> object:
            return (forward(values), pull_back(cotangents)) if backward else forward(values)

        return run

    runs = {"tvm": side(load(EngineName.TVM), None)}
    for chunk in CHUNKS:
        runs[f"torch, chunks of {chunk}"] = side(load(EngineName.EAGER), EagerConfig(chunk))
    for chunk in compiled:
        run = torch.compile(side(load(EngineName.EAGER), EagerConfig(chunk)))
        runs[f"torch.compile, chunks of {chunk}"] = run
    return {name: measure.Side(torch.no_grad()(run), lambda: None) for name, run in runs.items()}


def _contest(
    name: str, shape: Shape, repeats: int, sgemm: float, compiled: Sequence[int]
) -> Iterator[dict[str, object]]:
    """Print the times of both directions; a row of medians and least times for each."""
    call = _call(name, shape)
    config = tvm_engine.configuration()
    forward_flops = flops(call, forward_program(call.form, config.forward), config)
    backward_flops = flops(call, backward_program(call.form, config.backward), config)
    do = torch.randn(call.output_shape)
    for label, backward in (("forward", False), ("forward+backward", True)):
        sides = _sides(call, do, backward=backward, compiled=compiled)
        runs, resets = [s.run for s in sides.values()], [s.reset for s in sides.values()]
        clock = CpuDevice()
        clock.rounds(runs, 2, resets)
        samples = clock.rounds(runs, repeats, resets)
        row: dict[str, object] = {"recurrence": name, "D": shape.D, "mode": label}
        for what, of in (("median", statistics.median), ("least", min)):
            times = [of(x) / 1e3 for x in samples]
            ours, (best, fastest) = times[0], min(zip(times[1:], list(sides)[1:], strict=True))
            rate = (forward_flops + backward * backward_flops) / (ours * 1e-3) / 1e9
            print(
                f"{name:<18} D{shape.D:<4} {label:<17} {what:<7} tvm {ours:8.2f} ms, "
                f"{rate / sgemm:4.0%} of sgemm   "
                f"torch {best:8.2f} ms ({fastest})   ratio {best / ours:5.1f}",
                flush=True,
            )
            if what == "median":
                row |= {"tvm_ms": ours, "torch_ms": best, "ratio": best / ours}
                row |= {"torch": fastest, "of_sgemm": rate / sgemm}
            else:
                row |= {"tvm_least_ms": ours, "torch_least_ms": best}
        yield row


def flops(call: Call, program: Program, config: TvmConfig) -> float:
    """FLOPs of the matrix products of one direction; triangular products and solves count half."""
    chunk = config.chunk
    sizes = {Axis.K: call.K, Axis.V: call.V, Axis.I: chunk, Axis.J: chunk}
    total = 0.0
    for kernel in program.kernels:
        signature = Signature(Dims(call.K, call.V), Dtype.FLOAT32, (), Precision.IEEE)
        plan = schedule(tile(kernel, signature, config.tiles))
        for t in plan.products:
            for s in plan.summed(t):
                halved = t in plan.half or zero_above(s.left.value)
                axes = {*s.left.axes, *s.right.axes}
                total += (1 if halved else 2) * math.prod(sizes[a] for a in axes)
        for t in plan.computed:
            if isinstance(plan.made[t], Solve) or t.op in DECAYED:
                total += chunk * chunk * sizes[t.args[-1].axes[-1]]
    return total * call.B * call.HV * -(-call.T // chunk)


def _steps(name: str, repeats: int) -> None:
    """Time one token of 8 heads: by the kernel, by the step in torch, by a hand-written step.

    A kernel with one channel shows the cost of the call itself.
    """

    def operands(D: int) -> dict[str, Tensor]:
        drawn = draw(CASES[name], Shape("step", 1, 1, 8, D), torch.float32, CPU)
        return {n: x.detach()[:, 0] if x.ndim > 1 else x.detach() for n, x in drawn.items()}

    op = getattr(cw.library, name)
    runs: list[Callable[[], object]] = []
    for D, engine in ((64, "tvm"), (1, "tvm"), (64, "reference")):
        token = operands(D)
        _, state = op.step(**token, engine="reference")
        runs.append(partial(op.step, **token, state=state, engine=engine))
    if name in _BY_HAND:
        token = operands(64)
        _, state = op.step(**token, engine="reference")
        runs.append(partial(_BY_HAND[name], state, **token))
    with torch.no_grad():
        # decoding repeats a step: many in a row, sides in turn
        sides = [measure.Side(partial(_often, run), lambda: None) for run in runs]
        times = measure.medians(sides, CPU, repeats)
    kernel, call, in_torch, *by_hand = (ms * 1e3 / _OFTEN for ms in times)
    print(
        f"{name:<18} one token, 8 heads, D64: kernel {kernel:.1f} µs, of which calling "
        f"{call:.1f}; step in torch {in_torch:.0f} µs, ratio {in_torch / kernel:.1f}"
        + "".join(f"; by hand {x:.0f} µs, ratio {x / kernel:.1f}" for x in by_hand)
    )


_OFTEN = 100


def _often(run: Callable[[], object]) -> None:
    for _ in range(_OFTEN):
        run()


def _gated_delta_by_hand(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The fastest of several formulations in torch: no checks, batched products."""
    B, H, K = q.shape
    S = (S * g.exp()[..., None, None]).view(B * H, K, -1)
    u = beta.view(-1, 1, 1) * (v.view(B * H, 1, -1) - torch.bmm(k.view(B * H, 1, K), S))
    S = torch.baddbmm(S, k.view(B * H, K, 1), u)
    return torch.bmm(q.view(B * H, 1, K), S), S


_BY_HAND: dict[str, Callable[..., object]] = {"gated_delta_rule": _gated_delta_by_hand}


def _compilation(name: str, shape: Shape) -> None:
    """Print the seconds that both directions take to compile, starting with an empty cache."""
    code = (
        "import sys, time\nfrom benchmarks import cpu\n"
        "print(cpu.compile_seconds(sys.argv[1], int(sys.argv[2])))"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CHUNKWISE_CACHE": folder}
        command = [sys.executable, "-c", code, name, str(shape.D)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(f"{name:<18} D{shape.D:<4} compiled in {float(done.stdout):.1f} s")


def compile_seconds(name: str, D: int) -> float:
    """Seconds of a first forward and backward, which compile; imports are not counted."""
    call = _call(name, Shape("small", 1, 64, 1, D))
    started = time.perf_counter()
    tvm_engine.ENGINE.forward(call)
    none = (None,) * len(call.form.states)
    tvm_engine.ENGINE.backward(call, torch.zeros(call.output_shape), none)
    return time.perf_counter() - started


def peak(engine: str, name: str, T: int, D: int) -> float:
    """MiB that forward and backward add to this process at their peak."""
    call = _call(name, Shape("long", 1, T, 8, D))
    do = torch.randn(call.output_shape)
    module = load(EngineName(engine))
    none = (None,) * len(call.form.states)
    short = _call(name, Shape("short", 1, 64, 8, D))
    module.forward(short)
    module.backward(short, torch.zeros(short.output_shape), none)
    before = _resident()
    seen = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = module.forward(call)
    gradients = module.backward(call, do, none)
    done.set()
    watcher.join()
    del kept, gradients
    return (max(seen) - before) / 2**20


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def _memory(name: str, T: int, D: int) -> None:
    code = "import sys\nfrom benchmarks import cpu\n"
    code += "print(cpu.peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))"
    found = {}
    for engine in ("tvm", "eager"):
        command = [sys.executable, "-c", code, engine, name, str(T), str(D)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[engine] = float(done.stdout)
    print(
        f"{name:<18} T{T} D{D}: forward+backward add {found['tvm']:.0f} MiB, "
        f"torch {found['eager']:.0f} MiB"
    )


def _sgemm() -> float:
    """GFLOP/s of the fastest large product of float32 matrices that torch offers here."""
    n = 1024
    x = torch.randn(n, n)
    side = measure.Side(lambda: x @ x, lambda: None)
    return 2 * n**3 / (measure.medians([side], CPU, 20)[0] * 1e-3) / 1e9


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32,64") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    p.add_argument("--ops", type=_names(list(CASES), "recurrence"), default=list(CASES))
    p.add_argument("--channels", type=_numbers, default=(64, 128), help="K = V, as 64,128")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--threads", type=int, default=2, help="of each side")
    p.add_argument("--repeats", type=int, default=15)
    lengths = "torch.compile too, at these chunk lengths: minutes for each"
    p.add_argument("--compile", type=_numbers, default=(), metavar="C,C", help=lengths)
    p.add_argument("--only", choices=("calls", "steps", "memory", "compilation"), default=None)
    p.add_argument("--json", type=Path, default=None, help="write the times of calls there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine, and the measurements that the options select."""
    options = parser().parse_args(argv)
    command = ("python", "-m", "benchmarks.cpu", *(sys.argv[1:] if argv is None else argv))
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 256  # a graph for each operand's shape, no fallback
    described = {**machine.describe(CPU), "load": os.getloadavg()[0]}
    for key, value in described.items():
        print(f"{key:<14} {value}")
    sgemm = _sgemm()
    described["sgemm_gflops"] = sgemm
    print(f"sgemm          {sgemm:.0f} GFLOP/s on {options.threads} threads\n")
    rows: list[dict[str, object]] = []
    for name in options.ops:
        for D in options.channels:
            shape = Shape("cpu", 1, options.tokens, 8, D)
            if options.only in (None, "calls"):
                rows += _contest(name, shape, options.repeats, sgemm, options.compile)
                if options.json is not None:
                    report.write(options.json, command, described, rows)
            if options.only in (None, "compilation"):
                _compilation(name, shape)
            if options.only in (None, "memory"):
                _memory(name, 8192, D)
        if options.only in (None, "steps"):
            _steps(name, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
