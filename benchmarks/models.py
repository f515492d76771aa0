"""Times training steps of models of transformers, by their own torch road and on chunkwise.

A step is the forward, the loss of the next token, and the backward. The sides take turns, in one
process and on the same threads. Ratios compare least times, of the clock and of the processors,
since others may use the machine too. Losses of both sides are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from chunkwise.integrations import transformers
from torch import Tensor

from . import machine, report
from .families import FAMILIES, VOCABULARY, model

HIDDEN, HEADS, DIM = 256, 4, 64


def step(net: torch.nn.Module, ids: Tensor) -> tuple[float, tuple[float, float]]:
    """The loss of one step; its time in ms, and that of the processors."""
    net.zero_grad()
    begun = time.perf_counter(), time.process_time()
    logits = net(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    took = time.perf_counter() - begun[0], time.process_time() - begun[1]
    return loss.item(), (1e3 * took[0], 1e3 * took[1])


def compare(family: str, ids: Tensor, repeats: int) -> dict[str, object]:
    """A row of least times."""
    net = model(family, HIDDEN, HEADS, DIM).train()
    losses: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {"torch": [], "chunkwise": []}
    for n in range(repeats + 1):  # the first compiles
        for side, found in times.items():
            if side == "chunkwise":
                transformers.patch()
            losses[side], took = step(net, ids)
            transformers.unpatch()
            if n:
                found.append(took)
    torch.testing.assert_close(losses["chunkwise"], losses["torch"], rtol=0, atol=1e-4)
    (theirs, of_theirs), (ours, of_ours) = (
        [*map(min, zip(*x, strict=True))] for x in times.values()
    )
    return {
        "family": family,
        "torch, ms": round(theirs),
        "chunkwise, ms": round(ours),
        "ratio": round(theirs / ours, 1),
        "torch, ms of processors": round(of_theirs),
        "chunkwise, ms of processors": round(of_ours),
        "ratio of these": round(of_theirs / of_ours, 1),
    }


def main() -> int:
    """Print a row for each family, and write them with `--json`; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(2, VOCABULARY, (options.batch, options.tokens))
    command = ("python", "-m", "benchmarks.models", *sys.argv[1:])
    described = machine.describe(torch.device("cpu"))
    described |= {
        "device": f"{described['processor']}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
    }
    rows = []
    for family in options.families.split(","):
        rows.append(compare(family, ids, options.repeats))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="   ", flush=True)
        if options.json:
            report.write(options.json, command, described, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
