"""The demo: two declarations, the race of their accuracies, what the compiler made of them, tuning.

Multi-query associative recall: the text binds values to keys, `k1 v1 k2 v2 ...`, and then asks for
keys; the right answer to a key is the value that it was bound to last. There are more bindings
than the head has key channels, because keys are bound again and again. Additive attention adds
every value that a key ever had; the delta rule first takes away what the key recalls (Schlag,
Irie, Schmidhuber 2021; Yang et al. 2024).

Both models are the same but for the declared step: sizes, data, steps, seed, and learning rates
from the same sweep (`--sweep` repeats it). They take their training steps in turns.

Then the compiler explains both, the engine that trained them is timed against plain torch
operations, and the delta rule's kernels are tuned for this machine.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import chunkwise as cw
import torch
import torch.nn.functional as F
from chunkwise import Key, Scalar, State, Value, outer
from chunkwise.cli import main as chunkwise_command
from chunkwise.cli_progress import Progress
from chunkwise.nn import LanguageModel, RecurrentLayer
from chunkwise.runtime.engines import choose
from torch import Tensor


@cw.recurrence
def additive_attention(S: State, q: Key, k: Key, v: Value) -> tuple[State, Value]:
    S = S + outer(k, v)  # add the value to whatever the key recalls already
    return S, q @ S


@cw.recurrence
def delta_rule(S: State, q: Key, k: Key, v: Value, beta: Scalar) -> tuple[State, Value]:
    S = S + beta * outer(k, v - k @ S)  # move what the key recalls towards the value
    return S, q @ S


KEYS, VALUES, PAIRS, QUERIES = 16, 32, 32, 16
HIDDEN, HEADS, KEY_DIM, VALUE_DIM = 64, 1, 16, 16
BATCH, WARMUP, LAST = 32, 50, 50
COUNTS = (8, 16, 24, 32, 48, 64)  # of pairs, after training on PAIRS of them
EVERY_S = 3.0  # seconds between two lines of the race
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MODELS = {"additive attention": additive_attention, "delta rule": delta_rule}
# the best of LEARNING_RATES for each, over 600 steps, by `--sweep`
BEST = {"additive attention": 1e-2, "delta rule": 3e-3}


@dataclass(frozen=True, slots=True)
class Result:
    """`curve`: accuracy at every step; on fresh text, `by_bindings[n]` for keys bound n times.

    `by_pairs[n]` is the accuracy on texts of n pairs.
    """

    curve: tuple[float, ...]
    accuracy: float
    by_bindings: dict[int, float]
    by_pairs: dict[int, float]
    seconds: float


def text(
    batch: int, generator: torch.Generator, pairs: int = PAIRS
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[B, 2 pairs + QUERIES]`, answers `[B, QUERIES]`, and how often each key was bound.

    Of fewer pairs than QUERIES, there are as many queries as pairs.
    """
    keys = torch.randint(KEYS, (batch, pairs), generator=generator)
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator).argsort(-1)[:, :QUERIES]
    queries = keys.gather(1, asked)
    same = keys[:, None, :] == queries[:, :, None]
    last = (same * torch.arange(1, pairs + 1)).argmax(-1)
    bound = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([bound, queries], 1), values.gather(1, last), same.sum(-1)


def model(op: cw.Recurrence, engine: str | None) -> LanguageModel:
    layer = RecurrentLayer(
        op, HIDDEN, HEADS, KEY_DIM, VALUE_DIM, normalise=("q", "k"), engine=engine
    )
    return LanguageModel(KEYS + VALUES, HIDDEN, [layer], width=0)


class Racer:
    """A model in training; `curve` has its accuracy at every step, `seconds` its share of time."""

    def __init__(self, name: str, rate: float, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.name, self.rate, self.args = name, rate, args
        self.data = torch.Generator().manual_seed(args.seed)
        self.net = model(MODELS[name], args.engine).to(args.device)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.0)
        self.curve: list[float] = []
        self.seconds = 0.0

    def step(self) -> None:
        """One training step, on texts of the racer's own."""
        started = time.perf_counter()
        decay = 0.5 * (1 + math.cos(math.pi * len(self.curve) / self.args.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, (len(self.curve) + 1) / WARMUP) * decay
        tokens, answers, _ = (x.to(self.args.device) for x in text(BATCH, self.data))
        logits = self.net(tokens)[:, 2 * PAIRS :]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.curve.append((logits.argmax(-1) == answers).float().mean().item())
        self.seconds += time.perf_counter() - started

    @property
    def recent(self) -> float:
        """The accuracy over the last steps."""
        last = self.curve[-LAST:]
        return sum(last) / max(len(last), 1)

    def result(self) -> Result:
        """Its accuracy on text that it has not seen."""
        fresh = torch.Generator().manual_seed(self.args.seed + 1_000_000)
        right, bindings = self._right(512, fresh, PAIRS)
        by_bindings = {
            n: right[bindings == n].mean().item() for n in range(1, 6) if (bindings == n).any()
        }
        by_pairs = {n: self._right(256, fresh, n)[0].mean().item() for n in COUNTS}
        return Result(tuple(self.curve), right.mean().item(), by_bindings, by_pairs, self.seconds)

    @torch.no_grad()
    def _right(self, batch: int, generator: torch.Generator, pairs: int) -> tuple[Tensor, Tensor]:
        """Whether each query is answered right, 1 or 0, and how often its key was bound."""
        drawn = text(batch, generator, pairs)
        tokens, answers, bindings = (x.to(self.args.device) for x in drawn)
        found = self.net(tokens)[:, 2 * pairs :].argmax(-1)
        return (found == answers).float(), bindings


def race(racers: Sequence[Racer], steps: int) -> list[Result]:
    """Train all of them, step by step in turns, and print how they do every few seconds."""
    said = time.perf_counter()
    for step in range(1, steps + 1):
        with Progress("the first step compiles kernels", quiet=step > 1):
            for racer in racers:
                racer.step()
        if step == steps or time.perf_counter() - said > EVERY_S:
            said = time.perf_counter()
            standings = (f"{r.name} {r.recent:.2f} {_bar(r.recent)}" for r in racers)
            print(f"step {step:4}/{steps}  {'  '.join(standings)}", flush=True)
    return [racer.result() for racer in racers]


def _bar(accuracy: float, width: int = 20) -> str:
    return ("█" * round(accuracy * width)).ljust(width, "·")


def declarations() -> str:
    """The source of both declarations, from this file."""
    functions = (op.declaration.function for op in MODELS.values())
    return "\n".join(inspect.getsource(f) for f in functions)


def timed(op: cw.Recurrence, engine: str | None, device: str) -> float:
    """Milliseconds of a forward and a backward of `op` at the size of a training step; median."""
    random = torch.Generator().manual_seed(0)
    last = {"Key": (KEY_DIM,), "Value": (VALUE_DIM,), "Scalar": ()}
    shape = (BATCH, 2 * PAIRS + QUERIES, HEADS)
    operands = []
    for x in op.declaration.operands:
        drawn = torch.randn(*shape, *last[x.kind.name.title()], generator=random)
        operands.append(F.normalize(drawn, dim=2).to(device).requires_grad_())
    cotangent = torch.ones(*shape, VALUE_DIM, device=device)
    samples = []
    for _ in range(25):
        started = time.perf_counter()
        op(*operands, engine=engine)[0].backward(cotangent)
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) * 1e3)
    return sorted(samples[5:])[10]


def compare(args: argparse.Namespace) -> None:
    """The engine that trained the models against torch operations, here and now."""
    engine = choose(args.device, args.engine).value
    print(f"\nforward and backward of one training step, {engine} and torch operations:")
    for name, op in MODELS.items():
        ours, eager = (timed(op, e, args.device) for e in (engine, "eager"))
        print(f"{name:20} {ours:.2f} ms, eager {eager:.2f} ms: {eager / ours:.1f} times as fast")


def tune(args: argparse.Namespace) -> int:
    """`chunkwise tune` on the delta rule as declared above, at the size of a training step."""
    size = f"{BATCH},{2 * PAIRS + QUERIES},{HEADS}"
    command = ["tune", f"{__file__}:delta_rule", "--dims", f"K={KEY_DIM},V={VALUE_DIM}"]
    command += ["--dtype", "fp32", "--shape", size, "--budget", str(args.tune)]
    picture = args.out.with_name("tuning.svg")
    print(f"\nchunkwise {' '.join(command)}", flush=True)
    done = chunkwise_command([*command, "--plot", str(picture)])
    if picture.exists():
        print(f"picture of the search: {picture}")
    return done


def plot(results: dict[str, Result], path: Path) -> None:
    """Accuracy while training; after it, by how often the key was bound and by pairs of a text."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "mqar"  # the same picture for the same numbers
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for index, (name, result) in enumerate(results.items()):
        window = min(20, len(result.curve))
        curve = torch.tensor(result.curve).unfold(0, window, 1).mean(-1)
        left.plot(range(window, len(result.curve) + 1), curve, label=name)
        counts = list(result.by_bindings)
        places = [n + 0.4 * index - 0.2 for n in counts]
        middle.bar(places, list(result.by_bindings.values()), width=0.38, label=name)
        right.plot(list(result.by_pairs), list(result.by_pairs.values()), marker="o", label=name)
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.05), title="while training")
    left.legend(loc="upper left")
    middle.set(xlabel="times the key was bound", title="after training, unseen text")
    right.set(xlabel="pairs of a text", xticks=COUNTS, title=f"trained on {PAIRS} pairs")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=130, metadata=undated)
    print(f"picture of the race: {path}")


def sweep(args: argparse.Namespace) -> None:
    """Both models at every learning rate."""
    for name in MODELS:
        for rate in LEARNING_RATES:
            (result,) = race([Racer(name, rate, args)], args.steps)
            print(f"{name:20} lr {rate:.0e}  accuracy {result.accuracy:.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--engine", default=None, help="reference, eager, tvm or triton")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out/mqar.svg"), help="the picture: .svg, .png, …"
    )
    parser.add_argument("--tune", type=int, default=40, help="seconds to tune for; 0: not at all")
    parser.add_argument("--sweep", action="store_true", help="try every learning rate, then stop")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        # tensors this small gain nothing from threads, and wait for them where cores are shared
        torch.set_num_threads(1)
    if args.sweep:
        sweep(args)
        return 0

    print(declarations())
    print(
        f"{PAIRS} bindings of {KEYS} keys, {QUERIES} questions; one layer, K = {KEY_DIM}, "
        f"V = {VALUE_DIM}; {args.steps} steps of {BATCH} texts, on {args.device}\n",
        flush=True,
    )
    racers = [Racer(name, BEST[name], args) for name in MODELS]
    results = dict(zip(MODELS, race(racers, args.steps), strict=True))
    print("\non unseen text:")
    for name, result in results.items():
        size = sum(p.numel() for p in model(MODELS[name], args.engine).parameters())
        bound = ", ".join(f"{n}x {a:.2f}" for n, a in result.by_bindings.items())
        print(
            f"{name:20} accuracy {result.accuracy:.3f}  (key bound {bound})  "
            f"{size} parameters, {result.seconds:.0f} s"
        )
    plot(results, args.out)
    for op in MODELS.values():
        print(f"\n{op.explain()}")
    compare(args)
    return tune(args) if args.tune else 0


if __name__ == "__main__":
    sys.exit(main())
