"""Measures recurrences of the library against the peers' kernels and the memory floor."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from chunkwise.cli_arguments import add_dtype
from chunkwise.codegen.interface import Dtype

from . import compare, machine, measure, peers, report, warm
from .contest import Problem, Row, Settings, contest, rivals
from .registry import CASES, GATES, SHAPES

# measured with large copies, reads and writes counted; other devices are measured at the start
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.02e12}
WARMING = 2 / 3  # of the time limit, at most, is for compiling ahead
EXAMPLES = """
examples:
  python -m benchmarks.run --shapes A,B,C,D,E,F,G --json out/h100.json --warm-parallel 16
  python -m benchmarks.run --shapes F --ops delta_rule,kda --peers none
  python -m benchmarks.run --shapes F --json out/now.json --compare out/before.json
  python -m benchmarks.run --device cpu --shapes S --dtype fp32

With --json, what the file has already is not measured again, so that a run that was interrupted, or
ended by --seconds, goes on where it was. A file of other code, versions or settings is refused.
"""
# a result is continued only where these are the same
SAME = ("device", "processor", "versions", "sources", "peer_dispatch", "settings")


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
    p.add_argument("--gates", type=_names(GATES, "way of drawing gates"), default=list(GATES))
    p.add_argument(
        "--peers",
        type=_names(["none", *peers.NAMES], "peer"),
        default=peers.NAMES,
        help="whom to time beside ours, where they are installed (all); none: nobody",
    )
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
    p.add_argument(
        "--peer-tuning",
        type=float,
        metavar="MS",
        help="how long peers' autotuners time a configuration (Triton's: 100)",
    )
    p.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after that")
    p.add_argument("--json", type=Path, default=None, help="write everything there")
    p.add_argument(
        "--compare",
        type=compare.result,
        metavar="JSON",
        help="compare with an earlier result, as benchmarks.compare does",
    )
    return p


@dataclass(frozen=True, slots=True)
class Cell:
    """A contest, and whom it still lacks; None: ours is timed alone."""

    problem: Problem
    missing: tuple[str | None, ...]

    @property
    def against(self) -> list[str]:
        return [name for name in self.missing if name is not None]

    def __str__(self) -> str:
        p = self.problem
        return f"{p.case.name} {p.gates}".rstrip() + f" {p.shape.name}"


def cells(args: argparse.Namespace, settings: Settings, rows: Sequence[Row]) -> list[Cell]:
    """The contests that were asked for and are not among the rows."""
    have = {(r.recurrence, r.gates, r.shape, r.dtype, r.against) for r in rows}
    dtype = str(settings.dtype).removeprefix("torch.")
    found = []
    for shape in args.shapes:
        for case in (CASES[name] for name in args.ops):
            against: list[str | None] = [*rivals(case, settings.device, args.peers)] or [None]
            for gates in (g for g in case.gates if g in (*args.gates, "")):
                missing = tuple(
                    n for n in against if (case.name, gates, shape, dtype, n) not in have
                )
                if missing:
                    found.append(Cell(Problem(case, SHAPES[shape], gates, settings), missing))
    return found


def warmed(wanted: Sequence[Cell], jobs: int, until: float) -> list[Cell]:
    """The cells all of whose kernels were compiled until then."""

    def needed(cell: Cell) -> list[warm.Task]:
        # gates are compiled alike
        problem = replace(cell.problem, gates=cell.problem.case.gates[0])
        return warm.tasks(problem, cell.against)

    ended = warm.warm_all(list(dict.fromkeys(t for c in wanted for t in needed(c))), jobs, until)
    return [cell for cell in wanted if ended.issuperset(needed(cell))]


def _earlier(path: Path | None, described: Mapping[str, object]) -> dict[str, Any]:
    """What the file has already; no rows, if there is none.

    Raises:
        SystemExit: it is of another machine, or of other code, versions or settings.
    """
    if path is None or not path.exists():
        return {"machine": {}, "rows": []}
    result: dict[str, Any] = json.loads(path.read_text())
    for name in SAME:
        before, now = result["machine"].get(name), described.get(name)
        if before != now:
            raise SystemExit(f"{path} is of {name} {before}, not {now}: name another file")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Returns:
        1 if a result of ours is wrong, or a cell lost more than noise in a comparison; 2 if there
        is nothing to compare with; else 0.
    """
    started = time.monotonic()
    args = parser().parse_args(argv)
    until = started + args.seconds
    command = ("python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv))
    if not args.peer_dispatch:
        # fla reads this variable when it is imported
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    if args.peer_tuning is not None:
        peers.shorten_tuning(args.peer_tuning)

    device = torch.device(args.device)
    dtype = args.dtype or (Dtype.BFLOAT16 if device.type == "cuda" else Dtype.FLOAT32)
    described = machine.describe(device)
    chosen = {n: getattr(args, n) for n in ("engine", "repeats", "peer_tuning")}
    chosen |= {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    described["settings"] = chosen
    for name, value in described.items():
        print(f"{name}: {value}")
    before: dict[str, Any] | None = args.compare
    if before is not None and (why := compare.obstacle(before, described)) is not None:
        print(f"not comparable: {why}", file=sys.stderr)
        return 2
    earlier = _earlier(args.json, described)
    rows = [r for r in report.rows_of(earlier) if r.ours.ms is not None]  # failures are tried again
    known = earlier["machine"].get("bandwidth") or BANDWIDTH.get(str(described.get("device")))
    bandwidth = known or measure.bandwidth(device)
    described["bandwidth"] = bandwidth
    settings = Settings(device, getattr(torch, dtype.value), bandwidth, args.repeats, args.engine)
    every = wanted = cells(args, settings, rows)
    if args.warm_parallel:
        begun = time.monotonic()
        wanted = warmed(every, args.warm_parallel, begun + WARMING * (until - begun))
        described["warm_parallel_s"] = round(time.monotonic() - begun, 1)
        print(f"compiled {len(wanted)} cells in {described['warm_parallel_s']} s")
    print(f"floor: compulsory bytes at {bandwidth / 1e12:.3f} TB/s\n", flush=True)

    measured, took = 0, 0.0
    for cell in wanted:
        begun = time.monotonic()
        if begun + took > until:  # the next takes about as long as the one before
            break
        found = contest(cell.problem, cell.against)
        rows += found
        print(report.table(found), report.notes(found), sep="\n")
        print(f"measured in {time.monotonic() - begun:.1f} s\n", flush=True)
        if args.json is not None:
            # written after every contest, so that an interrupted run keeps its results
            report.write(args.json, command, described, [report.entry(r) for r in rows])
        measured, took = measured + 1, time.monotonic() - begun
    print("\n" + report.table(rows))
    print(report.means(rows))
    if measured < len(every):
        print(f"{len(every) - measured} of {len(every)} cells are left for another run")
    now = {"machine": described, "rows": [report.entry(r) for r in rows]}
    worse = 0 if before is None else compare.report(before, now)
    return worse or (0 if all(r.ours.ok for r in rows) else 1)


if __name__ == "__main__":
    sys.exit(main())
