"""Twenty steps of a recurrence learning to output a target; run with the library and without it.

As a script: `python training.py FOLDER SIZES TRAINED TESTED`, names with commas, trains packages
below FOLDER and runs the tests of packages, in a process that cannot import chunkwise or what else
must not be needed.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

STEPS, RATE = 20, 2.0
FORBIDDEN = ("chunkwise", "optuna", "sympy", "tvm")


def train(op: Callable[..., Any], kinds: dict[str, str], sizes: dict[str, int]) -> list[float]:
    """Losses of `op` whose operands (axes in letters, `B T H K`) are what is learnt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    learnt = {}
    for name, letters in kinds.items():
        x = 0.3 * torch.randn([sizes[a] for a in letters.split()], generator=random)
        # a scalar is a gate or a step, negative and positive ones would grow the state
        learnt[name] = (-x.abs() if name == "g" else x).to(device).requires_grad_()
    shape = [sizes[a] for a in ("B", "T", "HV", "V")]
    target = torch.randn(shape, generator=random).to(device)
    losses = []
    for _ in range(STEPS):
        operands = {n: -x.abs() if n == "g" else x for n, x in learnt.items()}
        o, _ = op(**operands)
        loss = (o.float() - target).square().mean()
        gradients = torch.autograd.grad(loss, list(learnt.values()))
        with torch.no_grad():  # torch.optim would import sympy
            for x, d in zip(learnt.values(), gradients, strict=True):
                x -= RATE * d
        losses.append(float(loss.detach()))
    return losses


class _Blocked:
    """An importer that refuses the modules that no exported package may need."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def main(folder: str, sizes: str, trained: str, tested: str) -> None:
    """Prints one JSON object: losses by package."""
    sys.meta_path.insert(0, _Blocked(FORBIDDEN))  # type: ignore[arg-type]  # duck-typed finder
    sys.path.insert(0, folder)
    report = {}
    for name in trained.split(","):
        package = importlib.import_module(name)
        axes = importlib.import_module(f"{name}.op").AXES
        report[name] = train(getattr(package, name), axes, json.loads(sizes))
    for name in tested.split(","):
        test = importlib.import_module(f"{name}.test_{name}")
        test.test_whole_sequences()
        test.test_packed_sequences()
    assert not [m for m in sys.modules if m.partition(".")[0] in FORBIDDEN]
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
