"""Associative recall of the table's mixers: `python -m benchmarks.mqar_table --out FILE`.

The task is that of examples/mqar.py: a text binds keys to values, again and again, and then asks
for the last value of some keys. Every model has two blocks, sees the same texts and has the same
rates; it is trained on texts of one length and asked on texts of several.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from chunkwise.nn import LanguageModel, ModelConfig, parameter_groups
from tqdm import tqdm

from benchmarks.machine import describe
from benchmarks.paper_table import MODELS, Size
from examples.mqar import BATCH, COUNTS, KEYS, PAIRS, VALUES, text

SIZE = Size(hidden=64, dim=16, blocks=2, window=16)
WIDTH = 128  # of the MLPs
_WARMUP, _ROWS = 100, 256


def trained(name: str, steps: int, rate: float, device: str) -> LanguageModel:
    """A model after so many texts of PAIRS pairs, `steps` times BATCH."""
    torch.manual_seed(0)
    mixers = MODELS[name](SIZE)
    width = 0 if len(mixers) > SIZE.blocks else WIDTH
    config = ModelConfig(KEYS + VALUES, SIZE.hidden, mixers, width=width)
    model = LanguageModel.from_config(config).to(device)
    data = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(parameter_groups(model), lr=rate, betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc=name, mininterval=10.0):
        for group in optimiser.param_groups:
            down = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            group["lr"] = rate * min(1.0, (step + 1) / _WARMUP) * down
        tokens, answers, _ = (x.to(device) for x in text(BATCH, data))
        logits = model(tokens)[:, 2 * PAIRS :]
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model


@torch.no_grad()
def row(name: str, steps: int, rate: float, device: str) -> dict[str, str]:
    """The share of right answers by the number of pairs, on texts that no model was trained on."""
    with torch.enable_grad():
        model = trained(name, steps, rate, device)
    fresh = torch.Generator().manual_seed(1_000_000)
    found = {"mixer": name, "parameters": str(sum(p.numel() for p in model.parameters()))}
    for pairs in COUNTS:
        tokens, answers, _ = (x.to(device) for x in text(_ROWS, fresh, pairs))
        right = model(tokens)[:, 2 * pairs :].argmax(-1) == answers
        found[f"{pairs} pairs"] = f"{right.double().mean().item():.3f}"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="names by commas (all)")
    parser.add_argument("--steps", type=int, default=1500, help="of training (1500)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate at its peak (3e-3)")
    parser.add_argument("--jobs", type=int, default=1, help="models at once (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/mqar.json"))
    args = parser.parse_args(argv)
    names = args.models.split(",")
    command = f"python -m benchmarks.mqar_table --steps {args.steps} --rate {args.rate}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        runs = {pool.submit(row, n, args.steps, args.rate, args.device): n for n in names}
        done: dict[str, dict[str, str]] = {}
        for run in as_completed(runs):
            done[runs[run]] = run.result()
            print(done[runs[run]], flush=True)
            result = {
                "command": command,
                "machine": describe(torch.device(args.device)),
                "rows": [done[name] for name in names if name in done],
            }
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
