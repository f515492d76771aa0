"""Times training steps of models of transformers, by their own torch road and on chunkwise.

A step is the forward, the loss of the next token, and the backward. The sides take turns, in one
process and on the same threads; a ratio compares least times, since others use the machine too.
Losses of both sides are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from chunkwise.integrations import transformers
from torch import Tensor

from . import machine, report
from .families import FAMILIES, VOCABULARY, model

HIDDEN, HEADS, DIM = 256, 4, 64


def step(net: torch.nn.Module, ids: Tensor) -> tuple[float, float]:
    """The loss of one step, and how long it took in ms."""
    net.zero_grad()
    begun = time.perf_counter()
    logits = net(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), 1e3 * (time.perf_counter() - begun)


def compare(family: str, ids: Tensor, repeats: int) -> dict[str, object]:
    """A row of least times."""
    net = model(family, HIDDEN, HEADS, DIM).train()
    losses, times = {}, {"torch": list[float](), "chunkwise": list[float]()}
    for n in range(repeats + 1):  # the first compiles
        for side in times:
            if side == "chunkwise":
                transformers.patch()
            losses[side], took = step(net, ids)
            transformers.unpatch()
            if n:
                times[side].append(took)
    torch.testing.assert_close(losses["chunkwise"], losses["torch"], rtol=0, atol=1e-4)
    theirs, ours = (min(x) for x in times.values())
    return {
        "family": family,
        "torch ms": round(theirs, 1),
        "chunkwise ms": round(ours, 1),
        "times as fast": round(theirs / ours, 1),
    }


def main() -> int:
    """Print a row for each family, and write them with `--json`; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    options = parser.parse_args()
    ids = torch.randint(2, VOCABULARY, (options.batch, options.tokens))
    rows = []
    for family in options.families.split(","):
        rows.append(compare(family, ids, options.repeats))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="   ", flush=True)
    if options.json:
        command = ("python", "-m", "benchmarks.models", *sys.argv[1:])
        report.write(options.json, command, machine.describe(torch.device("cpu")), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
