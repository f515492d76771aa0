"""Measures recurrences of the library against the peers' kernels and the memory floor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from chunkwise.cli_arguments import add_dtype
from chunkwise.codegen.interface import Dtype

from . import machine, measure, report, warm
from .contest import Row, Settings, contest
from .registry import CASES, SHAPES

# measured with large copies, reads and writes counted; other devices are measured at the start
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.02e12}
EXAMPLES = """
examples:
  python -m benchmarks.run --shapes F,C,D --json out/h100.json --warm-parallel 14
  python -m benchmarks.run --shapes F --ops delta_rule,kda --no-peer
  python -m benchmarks.run --device cpu --shapes S --dtype fp32
"""


def _names(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}: {', '.join(known)}")
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    p.add_argument("--shapes", type=_names(list(SHAPES), "shape"), default=["F" if gpu else "XS"])
    p.add_argument("--ops", type=_names(list(CASES), "recurrence"), default=list(CASES))
    add_dtype(p, None, "default: bfloat16 on a GPU, else float32")
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--engine", default=None, help="our engine (default: the device's own)")
    p.add_argument("--repeats", type=int, default=50, help="timed runs of each side")
    p.add_argument("--no-peer", action="store_true", help="only ours, against the floor")
    p.add_argument("--peer-dispatch", action="store_true", help="let fla use other back ends")
    p.add_argument(
        "--warm-parallel",
        type=int,
        nargs="?",
        const=os.cpu_count() or 1,
        default=0,
        metavar="N",
        help="compile both sides first, in N processes",
    )
    p.add_argument("--json", type=Path, default=None, help="write everything there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 0 if all our results were right, else 1."""
    args = parser().parse_args(argv)
    command = ("python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv))
    if not args.peer_dispatch:
        # fla reads this variable when it is imported
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    import chunkwise

    device = torch.device(args.device)
    peer = not args.no_peer and device.type == "cuda"
    dtype = args.dtype or (Dtype.BFLOAT16 if device.type == "cuda" else Dtype.FLOAT32)
    described = machine.describe(device)
    for key, value in described.items():
        print(f"{key}: {value}")
    if args.warm_parallel and device.type == "cuda":
        sides = warm.SIDES if peer else warm.SIDES[:1]
        seconds = warm.warm_all(args.ops, args.shapes, sides, dtype.value, args.warm_parallel)
        described["warm_parallel_s"] = round(seconds, 1)
        print(f"compiled both sides in {seconds:.0f} s, {args.warm_parallel} processes")
    bandwidth = BANDWIDTH.get(str(described.get("device"))) or measure.bandwidth(device)
    described["bandwidth"] = bandwidth
    print(f"floor: compulsory bytes at {bandwidth / 1e12:.3f} TB/s\n", flush=True)

    settings = Settings(
        device, getattr(torch, dtype.value), bandwidth, args.repeats, peer=peer, engine=args.engine
    )
    rows: list[Row] = []
    for shape in args.shapes:
        print(f"{shape}: {SHAPES[shape].text}, {dtype.value}")
        for name in args.ops:
            found = contest(CASES[name], getattr(chunkwise.library, name), SHAPES[shape], settings)
            rows += found
            print(report.table(found), report.notes(found), sep="\n", flush=True)
            if args.json is not None:
                # written after every recurrence, so that an interrupted run keeps its results
                entries = [report.entry(r) for r in rows]
                report.write(args.json, command, described, entries)
    print("\n" + report.table(rows))
    for mode in sorted({r.mode for r in rows}):
        of_mode = [r for r in rows if r.mode == mode]
        mean = report.geometric_mean(r.ratio for r in of_mode)
        alone = report.geometric_mean(r.device_ratio for r in of_mode)
        if mean is not None and alone is not None:
            print(f"geometric mean of peer/ours, {mode}: {mean:.3f}; of the device: {alone:.3f}")
    return 0 if all(r.ours.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
