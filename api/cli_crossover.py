"""The command `chunkwise crossover`: from which length do chunks beat the token loop?"""

from __future__ import annotations

import argparse

import torch

from .autotune.crossover import LENGTHS, Bracket, contest, search
from .autotune.store import save
from .autotune.subject import Size, subject
from .cli_arguments import add_dims, add_dtype, count
from .cli_command import Command, add_json, add_target, find, print_json
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .codegen.tir.config import TvmConfig, spread
from .dsl import errors
from .runtime.engines import EngineName, choose
from .runtime.tuned.artifact import CONFIGURATIONS, Artifact, Configuration, Crossover
from .runtime.tuned.json import to_plain
from .runtime.tuned.selection import select_config


def _crossover(arguments: argparse.Namespace) -> int:
    op = find(arguments.target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = choose(device.type, arguments.engine)
    if engine is EngineName.REFERENCE:
        raise errors.EngineUnavailable(
            engine.value, "it is the token loop that others are compared with"
        )
    if engine is not EngineName.TRITON:
        device = torch.device("cpu")
    dtype = getattr(torch, arguments.dtype.value)
    size = Size(1, LENGTHS[-1], arguments.heads)
    about = subject(op.declaration, engine, arguments.dims, dtype, size, device)
    _, clock = about.devices

    def fewer(config: Configuration) -> Configuration:
        if not isinstance(config, TvmConfig):
            return config
        return spread(config, arguments.heads, arguments.dims.V, torch.get_num_threads())

    wins = contest(
        op.declaration,
        engine,
        select_config(
            CONFIGURATIONS[engine],
            about.key,
            about.call_size,
            lambda: about.tunable.default,
            fewer,
        ),
        arguments.dims,
        dtype,
        device,
        clock.rounds,
        rows=arguments.heads,
    )
    with Progress("timing chunks and token loop", quiet=arguments.json):
        found = search(wins, LENGTHS)
    known = Crossover(arguments.heads, found.low, found.high, found.confidence, found.timings)
    path = save(Artifact(op.__name__, about.key, crossovers=(known,)))
    if arguments.json:
        print_json({"file": str(path), "crossover": to_plain(known)})
        return 0
    print(f"{op.__name__}: {about.key}, {arguments.heads} heads")
    print(f"  {_sentence(found)}")
    print(f"  with {found.confidence:.0%} confidence".replace("%", " %"), end="")
    print(f", by {found.timings} paired timings")
    print(f"  artifact: {path}")
    return 0


def _sentence(found: Bracket) -> str:
    if found.low is None:
        return f"chunks win at every length from {found.high or 'none'} tokens on"
    if found.high is None:
        return f"the token loop wins at every length up to {found.low} tokens"
    return f"the token loop wins up to {found.low} tokens, chunks win from {found.high} on"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    add_dims(parser, Dims(64, 64))
    add_dtype(parser, Dtype.FLOAT32)
    parser.add_argument("--heads", type=count, default=8, help="heads of the timed call")
    parser.add_argument(
        "--engine", choices=[e.value for e in EngineName], help="the engine to time"
    )
    add_json(parser)


CROSSOVER = Command(
    "crossover",
    "Find from which length the forward in chunks beats the token loop on this machine.",
    (
        "chunkwise crossover gated_delta_rule --dims K=64,V=64",
        "chunkwise crossover kda --heads 4",
    ),
    _arguments,
    _crossover,
)
