"""Trains the models of DeltaNet's table (Yang et al. 2024), in small.

    python -m benchmarks.paper_table

Every model sees the same rows in the same order, has about as many parameters, and has the same
rates, so that they differ in their mixers. A model is a process of its own, which compiles its
kernels while the model before it trains. What it found is in `OUT/NAME.json`, rewritten as it
trains; a model that is whole there is not trained again, and one that was stopped continues from
its checkpoint. `--collect FILE` puts the rows of all models into one file of docs/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chunkwise.nn import (
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    loss_by_position,
    mamba2,
    perplexity,
    recall_split,
    token_losses,
)
from torch import Tensor

from benchmarks.machine import describe
from examples import token_file, train_lm

# text in files that are no HTML, about 135 MB of it
PACKAGES = (
    *("linux-doc-6.1", "python3.11-doc", "perl-doc", "vim-runtime", "python-sqlalchemy-doc"),
    *("git-doc", "llvm-15-doc", "clang-15-doc", "dict-gcide", "dict-foldoc", "dict-jargon"),
)
SOURCES = (*(f"deb:{name}" for name in PACKAGES), "stdlib")
BINS = 32  # of the loss by position
Mixers = tuple[RecurrentConfig | AttentionConfig, ...]


@dataclass(frozen=True, slots=True)
class Size:
    """What the models of a table have in common.

    Attributes:
        hidden: size of the token vectors.
        dim: channels of a head.
        blocks: with MLPs; Mamba-2 has none of these and twice as many blocks.
        window: of the hybrid's attention.
    """

    hidden: int
    dim: int
    blocks: int
    window: int

    @property
    def heads(self) -> int:
        """Of every mixer but Mamba-2's."""
        return self.hidden // self.dim


def _retnet(s: Size) -> Mixers:
    one = RecurrentConfig("retention", s.heads, s.dim, 2 * s.dim, conv_size=0, gated=True)
    return (one,) * s.blocks


def _gla(s: Size) -> Mixers:
    one = RecurrentConfig("gla", s.heads, s.dim // 2, s.dim, conv_size=0, gated=True)
    return (one,) * s.blocks


def _mamba2(s: Size) -> Mixers:
    return (mamba2(s.hidden, s.dim, s.dim // 2),) * (2 * s.blocks)


def _delta(s: Size) -> Mixers:
    one = RecurrentConfig("delta_rule", s.heads, s.dim, s.dim, normalise=("q", "k"))
    return (one,) * s.blocks


def _gated_delta(s: Size) -> Mixers:
    one = RecurrentConfig(
        "gated_delta_rule", s.heads, s.dim, s.dim, normalise=("q", "k"), gated=True
    )
    return (one,) * s.blocks


def _windows(s: Size) -> Mixers:
    """A sliding window in every second block."""
    window = AttentionConfig(s.heads, s.window)
    return tuple(window if n % 2 else one for n, one in enumerate(_delta(s)))


def _two_global(s: Size) -> Mixers:
    """Global attention in the second block and in the one after the middle."""
    at = (1, s.blocks // 2)
    return tuple(AttentionConfig(s.heads) if n in at else one for n, one in enumerate(_delta(s)))


MODELS: dict[str, Callable[[Size], Mixers]] = {
    "transformer": lambda s: (AttentionConfig(s.heads),) * s.blocks,
    "deltanet": _delta,
    "mamba2": _mamba2,
    "gla": _gla,
    "retnet": _retnet,
    "gated-deltanet": _gated_delta,
    "deltanet-window": _windows,
    "deltanet-global": _two_global,
}


def shape_of(name: str, size: Size, vocabulary: int, parameters: int) -> ModelConfig:
    """The shape of a model of about so many parameters, by the width of its MLPs."""
    mixers = MODELS[name](size)
    bare = ModelConfig(vocabulary, size.hidden, mixers, width=0, tied=True)
    if len(mixers) > size.blocks:
        return bare
    own = sum(p.numel() for p in LanguageModel.from_config(bare).parameters())
    left = (parameters - own) // len(mixers) - size.hidden
    width = max(64, round(left / (3 * size.hidden) / 64) * 64)
    return ModelConfig(vocabulary, size.hidden, mixers, width=width, tied=True)


class Run(train_lm.Trainer):
    """One model of the table in training, on rows that are not packed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        super().__init__(args)
        self.row: dict[str, Any] = {
            "model": name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "blocks": len(self.model.blocks),
            "width": self.config.width,
            "batch": args.batch,
            "T": args.tokens,
            "rate": args.rate,
            "steps": args.steps,
            "step": 0,
            "curve": [],
            "speeds": [],
        }

    def shape(self, vocabulary: int) -> ModelConfig:
        args = self.args
        size = Size(args.hidden, args.dim, args.layers, args.window)
        return shape_of(self.name, size, vocabulary, args.parameters)

    def inputs(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return batch[:, :-1], batch[:, 1:], None

    def compile(self) -> None:
        """Have the kernels of a step compiled, which leaves the state as it is."""
        started = time.perf_counter()
        self.loss(self.rows["train"].read(range(self.share))).backward()
        self.optimiser.zero_grad(set_to_none=True)
        self.synchronise()
        self.row["first_s"] = time.perf_counter() - started

    def remember(self, row: dict[str, Any]) -> None:
        """Keep of an earlier row what lies before this step."""
        done = self.step * self.args.batch * self.args.tokens
        self.row["curve"] = [point for point in row["curve"] if point[0] <= done]
        self.row["speeds"] = row["speeds"][: len(self.row["curve"])]
        self.row["step"] = self.step

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def interval(self, steps: int) -> None:
        """Train so many steps, and note their mean loss and the tokens per second."""
        started, total = time.perf_counter(), torch.zeros((), device=self.device)
        for _ in range(steps):
            total += self.train()[0]
        tokens = self.args.batch * self.args.tokens
        loss = float(total) / steps
        if not loss < float("inf"):
            raise SystemExit(f"{self.name}: loss {loss} at step {self.step}")
        self.row["curve"].append([self.step * tokens, loss])
        self.row["speeds"].append(steps * tokens / (time.perf_counter() - started))
        self.row["step"] = self.step

    def measure(self) -> None:
        """Evaluate the model on rows kept for validation, of all sources."""
        rows = self.rows["valid"]
        count = min(len(rows), self.args.validate_rows)
        tokens = rows.read([n * len(rows) // count for n in range(count)])
        self.row |= {"validation_tokens": tokens[:, 1:].numel()}
        with torch.compiler.set_stance("force_eager"), self.narrow():
            losses = token_losses(self.model, tokens.to(self.device), self.share)
        split = recall_split(losses, tokens)
        self.row |= {
            "perplexity": perplexity(losses),
            "recalled": split.recalled,
            "others": split.others,
            "share": split.share,
            "positions": loss_by_position(losses, min(BINS, self.args.tokens)).tolist(),
        }

    def write(self) -> None:
        """Replace the file of results."""
        speeds = self.row["speeds"]
        self.row |= {"tokens_per_s": statistics.median(speeds)} if speeds else {}
        if self.device.type == "cuda":
            self.row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        path = self.args.out.with_suffix(".json")
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(self.row, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Whoever trains; the others, which have compiled, wait for it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train(name: str, args: argparse.Namespace) -> None:
    """One model, from its checkpoint to its end, or until the time is up."""
    folder = args.out
    args.out = folder / name
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(name, args)
    run.row |= {"command": args.command, "machine": describe(run.device)}
    if run.checkpoint.exists():
        run.resume()
        run.remember(json.loads(args.out.with_suffix(".json").read_text(encoding="utf-8")))
    run.compile()
    print(
        f"{name}: {run.row['parameters'] / 1e6:.1f} M, compiled {run.row['first_s']:.0f} s",
        flush=True,
    )
    with _turn(folder / ".turn"):
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        said = saved = time.monotonic()
        while run.step < args.steps and time.time() < args.until:
            run.interval(min(args.log_every, args.steps - run.step))
            if time.monotonic() - said > 5 or run.step == args.steps:
                said = time.monotonic()
                _, loss = run.row["curve"][-1]
                speed = run.row["speeds"][-1] / 1e3
                print(f"{name}: {run.step}/{args.steps} {loss:.3f}, {speed:.0f} Ktok/s", flush=True)
                run.write()
            if time.monotonic() - saved > args.save_seconds and run.step < args.steps:
                saved = time.monotonic()
                run.save()
        if run.step < args.steps:
            run.save()
        else:
            run.measure()
        run.write()
    if run.step == args.steps:
        run.model.save_pretrained(args.out / "model")
        run.checkpoint.unlink(missing_ok=True)
        row = run.row
        print(
            f"{name}: perplexity {row['perplexity']:.2f}, recalled {row['recalled']:.2f}, others "
            f"{row['others']:.2f}; {row['tokens_per_s'] / 1e3:.0f} Ktok/s",
            flush=True,
        )


def whole(path: Path) -> bool:
    """Whether a file of results has a whole run."""
    return path.exists() and "perplexity" in json.loads(path.read_text(encoding="utf-8"))


def train_all(names: Sequence[str], args: argparse.Namespace, argv: Sequence[str]) -> None:
    """A process for each model; the next one compiles while one trains.

    A model is not begun if the time that is left is less than the last one took.
    """
    waiting = [n for n in names if not whole(args.out / f"{n}.json")]
    running: list[subprocess.Popen[bytes]] = []
    took, ended = 0.0, time.time()
    while waiting or running:
        while waiting and len(running) < 2:
            own = ["--models", waiting.pop(0), "--until", str(args.until)]
            running.append(
                subprocess.Popen([sys.executable, "-m", "benchmarks.paper_table", *argv, *own])
            )
        running.pop(0).wait()
        now = time.time()
        took, ended = now - ended, now
        if now + took * 0.9 > args.until:
            for child in running:
                child.terminate()
                child.wait()
            break


def collect(folder: Path, file: Path) -> None:
    """Add the whole runs of a folder to a file of docs/results/, in the order of the table."""
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = {name: {"model": name} for name in MODELS} | {row["model"]: row for row in before}
    for name in MODELS:
        if whole(folder / f"{name}.json"):
            rows[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            del rows[name]["speeds"], rows[name]["machine"]["triton_cache"]
    machines = [row["machine"] for row in rows.values() if "machine" in row]
    machine = machines[-1] if machines else describe(torch.device("cpu"))
    result = {
        "command": "python -m benchmarks.paper_table",
        "machine": {"device": machine["processor"]} | machine,
        "rows": list(rows.values()),
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = train_lm.parser()
    made.description = __doc__
    made.add_argument("--models", default=",".join(MODELS), help="names by commas (all)")
    made.add_argument("--dim", default=128, type=int, help="channels of a head (128)")
    made.add_argument("--parameters", default=31_500_000, type=int, help="about (31500000)")
    made.add_argument("--seconds", default=1e9, type=float, help="until it stops (no limit)")
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)
    made.add_argument("--save-seconds", default=300.0, type=float, help="to a checkpoint (300)")
    made.add_argument("--collect", type=Path, help="a file of docs/results/, instead of training")
    made.set_defaults(
        text=Path("out/table-text"), out=Path("out/table"), vocabulary=8192, hidden=512, layers=8,
        window=256, tokens=2048, batch=32, steps=1526, rate=1.5e-3, warmup=100, log_every=20,
        validate_rows=256, tied=True, bfloat16=True, compile=torch.cuda.is_available(),
    )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.until = args.until or time.time() + args.seconds
    named = argv[: argv.index("--until")] if "--until" in argv else argv
    args.command = shlex.join(["python", "-m", "benchmarks.paper_table", *named])
    names = args.models.split(",")
    if unknown := [n for n in names if n not in MODELS]:
        raise SystemExit(
            f"--models has {', '.join(unknown)}: expected names of {', '.join(MODELS)}"
        )
    if args.collect is not None:
        collect(args.out, args.collect)
        return 0
    if not (args.text / "about.json").exists():
        token_file.build(SOURCES, args.vocabulary, args.text)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if len(names) == 1:
        train(names[0], args)
    else:
        train_all(names, args, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
