"""Trains a language model on real text, on a CPU, on a GPU or on many.

    python -m examples.train_lm
    torchrun --nproc-per-node 8 -m examples.train_lm --parallel fsdp --hidden 2048 …

Documents are packed, and none sees another. A step is a pure function of its number and the state,
so that a run that was killed continues from its checkpoint as if nothing had been; a checkpoint
replaces the one before it in one rename, and fits any number of processes. The end of a run writes
the model (`OUT/model`), measures it, and has it continue a text.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chunkwise as cw
import torch
import torch.distributed as dist
from chunkwise.nn import (
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    loss_by_position,
    mamba2,
    parameter_groups,
    perplexity,
    recall_split,
    token_losses,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm

from examples import token_file
from examples.token_file import packed, rows_of, tokenizer_of, vocabulary_of

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_COLUMNS = ("step", "tokens", "loss", "rate", "gradient", "seconds", "validation")


def mixers(args: argparse.Namespace) -> tuple[RecurrentConfig | AttentionConfig, ...]:
    """One per layer: the names in `--mixers`, over and over."""
    dim = args.hidden // args.heads

    def one(name: str) -> RecurrentConfig | AttentionConfig:
        if name == "attention":
            return AttentionConfig(args.heads)
        if name == "window":
            return AttentionConfig(args.heads, args.window)
        if name == "mamba2":
            return mamba2(args.hidden, state=dim, head_dim=dim)
        if name not in cw.library.names():
            known = ", ".join(("attention", "window", "mamba2", *cw.library.names()))
            raise SystemExit(f"--mixers has {name}: expected names of {known}")
        return RecurrentConfig(name, args.heads, dim, dim)

    kinds = [one(name) for name in args.mixers.split(",")]
    return tuple(kinds[n % len(kinds)] for n in range(args.layers))


class Trainer:
    """A model in training; `step` is the number of the next step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step = args, 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if _many() else (0, 1)
        self.device = _device(args)
        self.rows = {name: rows_of(args.text, name, args.tokens) for name in ("train", "valid")}
        share, rest = divmod(args.batch, self.world * args.accumulate)
        if rest:
            raise SystemExit(f"--batch {args.batch} is no multiple of processes * --accumulate")
        self.share = share
        self.sequences = max(r.most_documents(share) for r in self.rows.values())
        torch.manual_seed(args.seed)
        self.config = self.shape(vocabulary_of(args.text))
        self.model = LanguageModel.from_config(self.config).to(self.device)
        self.model.checkpointing = args.checkpointing
        if args.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.net: nn.Module = self._parallel()
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.model, args.decay),
            lr=args.rate,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.checkpoint = args.out / "checkpoint.pt"

    def shape(self, vocabulary: int) -> ModelConfig:
        """That of the model."""
        args = self.args
        return ModelConfig(vocabulary, args.hidden, mixers(args), tied=args.tied)

    def _parallel(self) -> nn.Module:
        if self.world == 1:
            return self.model
        if self.args.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(self.model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy()
        if self.args.bfloat16:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        # unless they are dropped, gathered weights serve the backward too: half of the messages
        shared: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        blocks = [
            fully_shard(block, **shared, reshard_after_forward=bool(self.args.reshard))
            for block in self.model.blocks
        ]
        fully_shard(self.model, **shared)
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
        return self.model

    @property
    def rate(self) -> float:
        """Of this step: up in a line, then down in half a cosine to a tenth."""
        args, peak = self.args, float(self.args.rate)
        if self.step < args.warmup:
            return peak * (self.step + 1) / int(args.warmup)
        done = (self.step - args.warmup) / max(1, args.steps - args.warmup)
        return peak * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))

    def inputs(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, targets and boundaries of rows `[B, T + 1]`."""
        return packed(batch, self.sequences)

    def narrow(self) -> torch.autocast:
        """Computation in bfloat16, where it is asked for."""
        enabled = self.args.bfloat16 and self.args.parallel != "fsdp"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def loss(self, batch: Tensor) -> Tensor:
        """The mean loss of rows `[B, T + 1]`."""
        tokens, targets, cu_seqlens = (
            None if x is None else x.to(self.device, non_blocking=True) for x in self.inputs(batch)
        )
        with self.narrow():
            found: Tensor = self.net(tokens, cu_seqlens, targets=targets)
        return found

    def _own(self, name: str, numbers: Sequence[int]) -> Iterator[Tensor]:
        """This process's rows, a micro-batch at a time."""
        own = numbers[self.rank :: self.world]
        for begin in range(0, len(own), self.share):
            yield self.rows[name].read(own[begin : begin + self.share])

    @contextlib.contextmanager
    def _communicating(self, last: bool) -> Iterator[None]:
        """Gradients are summed over processes once a step, in its last micro-batch."""
        if isinstance(self.net, nn.parallel.DistributedDataParallel) and not last:
            with self.net.no_sync():
                yield
            return
        if self.world > 1 and self.args.parallel == "fsdp":
            self.net.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def train(self) -> tuple[Tensor, Tensor]:
        """One step; the loss of this process's rows and the norm of the gradient, `[]` each."""
        args = self.args
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        total = torch.zeros((), device=self.device)
        numbers = self.rows["train"].drawn(self.step, args.batch, args.seed)
        for n, batch in enumerate(self._own("train", numbers), 1):
            with self._communicating(last=n == args.accumulate):
                loss = self.loss(batch) / args.accumulate
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), args.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def mean(self, x: Tensor) -> float:
        """The mean over processes."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x)
        return float(x) / self.world

    @torch.no_grad()
    def validate(self) -> float:
        """The perplexity of rows kept for validation."""
        each = self.share * self.world
        count = min(len(self.rows["valid"]), self.args.validate_rows) // each * each
        if not count:
            has = len(self.rows["valid"])
            raise SystemExit(
                f"--validate-rows {self.args.validate_rows}, of a text that has {has}: expected at "
                f"least a batch, {self.args.batch}"
            )
        losses = [self.loss(batch) for batch in self._own("valid", range(count))]
        return math.exp(min(self.mean(torch.stack(losses).mean()), 700.0))

    def save(self) -> None:
        """Write a checkpoint beside the last one, then rename it."""
        model, optimiser = get_state_dict(self.net, self.optimiser, options=_WHOLE)
        if self.rank == 0:
            beside = self.checkpoint.with_suffix(".new")
            with beside.open("wb") as file:
                torch.save(
                    {
                        "step": self.step,
                        "config": repr(self.config),
                        "model": model,
                        "optimiser": optimiser,
                    },
                    file,
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.checkpoint)

    def resume(self) -> None:
        """Continue from the checkpoint."""
        found = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if found["config"] != repr(self.config):
            raise SystemExit(f"{self.args.out} has a run of another model: {found['config']}")
        set_state_dict(
            self.net,
            self.optimiser,
            model_state_dict=found["model"],
            optim_state_dict=found["optimiser"],
            options=_WHOLE,
        )
        self.step = found["step"]

    def whole(self) -> LanguageModel | None:
        """The model on one device, on the first process."""
        weights = get_model_state_dict(self.net, options=_WHOLE)
        if self.rank:
            return None
        model = LanguageModel.from_config(self.config)
        model.load_state_dict(weights)
        return model.to(self.device)


class Log:
    """`log.csv`, of which a run that continues keeps what lies before its step."""

    def __init__(self, path: Path, step: int) -> None:
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
        self.path = path
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])

    def write(self, **values: float) -> None:
        """A line; columns without a value are empty."""
        texts = {n: v if isinstance(v, int) else f"{v:.6g}" for n, v in values.items()}
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([texts.get(n, "") for n in _COLUMNS])


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device(args: argparse.Namespace) -> torch.device:
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(args.device)


def run(args: argparse.Namespace) -> None:
    """The whole training, or what is left of it."""
    trainer = Trainer(args)
    first = trainer.rank == 0
    if trainer.checkpoint.exists():
        trainer.resume()
    log = Log(args.out / "log.csv", trainer.step) if first else None
    if first:
        size = sum(p.numel() for p in trainer.model.parameters())
        begun = f"continues at step {trainer.step}" if trainer.step else "begins"
        print(f"{size / 1e6:.2f} M parameters on {trainer.world} × {trainer.device}; {begun}")
    bar = tqdm(
        total=args.steps,
        initial=trainer.step,
        disable=not first,
        unit=" steps",
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    started, since = time.perf_counter(), trainer.step
    while trainer.step < args.steps:
        rate = trainer.rate
        found = trainer.train()
        bar.update()
        done, last = trainer.step, trainer.step == args.steps
        if done % args.log_every == 0 or last:
            loss, norm = trainer.mean(found[0]), float(found[1])
            if not math.isfinite(loss + norm):
                raise SystemExit(f"step {done}: loss {loss}, gradient {norm}")
            seconds = time.perf_counter() - started
            values: dict[str, Any] = {"step": done, "tokens": done * args.batch * args.tokens}
            values |= {"loss": loss, "rate": rate, "gradient": norm, "seconds": seconds}
            if done % args.validate_every == 0 or last:
                values["validation"] = trainer.validate()
            speed = (done - since) * args.batch * args.tokens / seconds
            bar.set_postfix_str(f"loss {loss:.3f}, {speed / 1e3:.1f} K tokens/s")
            if log:
                log.write(**values)
        if done % args.save_every == 0 or last:
            trainer.save()
    bar.close()
    model = trainer.whole()
    if model is not None:
        model.save_pretrained(args.out / "model")
        finish(model, args, trainer.device)


def finish(model: LanguageModel, args: argparse.Namespace, device: torch.device) -> None:
    """Measure the model, and let it continue a text."""
    valid = rows_of(args.text, "valid", args.tokens)
    tokens = valid.read(range(min(len(valid), args.validate_rows))).to(device)
    losses, tokens = token_losses(model, tokens), tokens.cpu()
    split = recall_split(losses, tokens)
    by_position = ", ".join(f"{x:.2f}" for x in loss_by_position(losses, bins=4).tolist())
    print(f"perplexity {perplexity(losses):.1f} of rows of {args.tokens} tokens")
    print(f"loss by quarters of a row: {by_position}")
    print(
        f"perplexity {split.recalled:.1f} of the {split.share:.0%} of tokens that end a bigram of "
        f"their row again, {split.others:.1f} of the others"
    )
    tokenizer = tokenizer_of(args.text)
    prompt = torch.tensor([0, *tokenizer.encode(args.prompt).ids], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    (text,) = model.generate(
        [prompt], args.generate, temperature=0.8, top_p=0.9, stop=0, generator=generator
    )
    print(f"\n{args.prompt}{tokenizer.decode(text.tolist())}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: Any, what: str) -> None:
        kind = Path if isinstance(default, Path) else type(default)
        made.add_argument(f"--{name}", default=default, type=kind, help=f"{what} ({default})")

    add("text", Path("out/text"), "folder of examples.token_file; made if absent")
    add("source", "stdlib", "of a text that is made")
    add("vocabulary", 4096, "of a text that is made")
    add("out", Path("out/lm"), "folder of checkpoint, log and model; a run that is there continues")
    add("mixers", "delta_rule", "names by commas: recurrences, window, attention; over and over")
    add("layers", 4, "blocks")
    add("hidden", 128, "size of the token vectors")
    add("heads", 2, "heads of a mixer")
    add("window", 64, "of the mixer `window`")
    add("tokens", 256, "tokens of a row, T")
    add("batch", 8, "rows of a step, on all processes together")
    add("accumulate", 1, "micro-batches of a step")
    add("steps", 400, "steps in all")
    add("rate", 3e-3, "learning rate at its peak")
    add("warmup", 40, "steps until the peak")
    add("decay", 0.1, "weight decay of matrices")
    add("clip", 1.0, "largest norm of a gradient")
    add("seed", 0, "of weights, of the order of rows, of the text at the end")
    add("log-every", 10, "steps between two lines of log.csv")
    add("validate-every", 200, "steps between two validations; a multiple of log-every")
    add("validate-rows", 128, "rows of a validation, at most")
    add("save-every", 100, "steps between two checkpoints")
    add("generate", 80, "tokens of the text at the end, at most")
    add("prompt", "def ", "what the text at the end begins with")
    add("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    add("parallel", "ddp", "with torchrun: ddp, or fsdp (FSDP2)")
    for name, what in (
        ("bfloat16", "compute in bfloat16; weights stay in float32"),
        ("compile", "torch.compile of each block, which are compiled once"),
        ("reshard", "fsdp: drop gathered weights after a block's forward, and gather them again"),
        ("checkpointing", "keep no activations within blocks"),
        ("tied", "embedding and output share a weight"),
    ):
        made.add_argument(f"--{name}", action="store_true", help=what)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.parallel not in ("ddp", "fsdp"):
        raise SystemExit(f"--parallel {args.parallel}: expected ddp or fsdp")
    mixers(args)  # before minutes are spent on a text
    if (args.text / "about.json").exists():
        print(f"{args.text} is there: --source and --vocabulary are as it was made")
    else:
        if "RANK" in os.environ:
            raise SystemExit(f"no text in {args.text}: run python -m examples.token_file first")
        token_file.build([args.source], args.vocabulary, args.text)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:  # torchrun set it
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        run(args)
    finally:
        if _many():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
