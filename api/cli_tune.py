"""The command `chunkwise tune`: find the fastest configuration of a recurrence."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import interrupts
from .cli_arguments import add_dims, add_dtype, count, counts
from .cli_command import Command, UsageError, add_json, add_target, find, print_json
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .runtime.cache import cache_folder, own_folder
from .runtime.engines import EngineName, choose
from .runtime.extras import how_to_install

if TYPE_CHECKING:
    from .autotune.tunable import Tunable

_PICTURES = (".png", ".svg", ".pdf")
_ON_GPU, _ON_CPU = (4, 4096, 16), (1, 1024, 4)


def _tune(arguments: argparse.Namespace) -> int:
    started = interrupts.started()
    # importing Optuna is slow, and no other command needs it
    from .autotune.compilers import start_early
    from .autotune.report import report
    from .autotune.search import Budget
    from .autotune.storage import NoStorage, close_storage, open_storage, without_secrets
    from .autotune.store import save, versions_here
    from .autotune.subject import Size, rejected, subject
    from .autotune.tune import Task, tune
    from .runtime.tuned.json import to_plain

    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--plot needs matplotlib: {how_to_install('plot')}")
    if arguments.plot and arguments.plot.suffix not in _PICTURES:
        raise UsageError(f"--plot {arguments.plot}: a picture ends in {', '.join(_PICTURES)}")
    if arguments.plot and not arguments.plot.parent.is_dir():
        raise UsageError(f"--plot {arguments.plot}: no folder {arguments.plot.parent}")
    start_early()
    op = find(arguments.target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = choose(device.type, arguments.engine)
    if engine is not EngineName.TRITON:
        device = torch.device("cpu")
    on_gpu = device.type == "cuda"
    usual = Dtype.BFLOAT16 if on_gpu else Dtype.FLOAT32
    dtype = getattr(torch, (arguments.dtype or usual).value)
    B, T, H = arguments.shape or (_ON_GPU if on_gpu else _ON_CPU)
    limits = arguments.chunk or (), arguments.plans
    what, quiet = f"tuning {op.__name__}", arguments.json
    left = max(arguments.budget - (time.monotonic() - started), 0.0)
    with Progress(what, seconds=left, quiet=quiet) as progress:

        def watch(part: object, us: float | None, best_us: float | None, trials: int) -> None:
            best = "" if best_us is None else f", best {best_us:.0f} us"
            progress.say(f"{trials} trials{best}")

        progress.say("preparing the call")
        about = subject(
            op.declaration, engine, arguments.dims, dtype, Size(B, T, H), device, *limits
        )
        url = _storage(arguments, about.key.path)
        try:
            storage = open_storage(url)
        except NoStorage as why:
            raise UsageError(str(why)) from None
        versions = versions_here(engine)
        task = Task(
            recurrence=op.__name__,
            key=about.key,
            call_size=about.call_size,
            versions=versions,
            storage=storage,
            storage_url=_shown(without_secrets(url)),
            rejected=rejected(about.key, versions),
        )
        progress.say("0 trials")
        left = max(arguments.budget - (time.monotonic() - started), 0.0)
        budget = Budget(left, arguments.jobs, arguments.exhaustive, arguments.seed)
        try:
            tuning = tune(about.tunable, about.devices, task, budget, watch, progress.tell)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the trials are kept: --resume goes on with them") from None
        finally:
            close_storage(storage)
    kept = tuning.artifact.tuned or tuning.artifact.quarantine
    path = save(tuning.artifact) if kept else None
    if arguments.plot:
        from .autotune.plot import plot

        plot(tuning, arguments.plot)
    if arguments.json:
        document = to_plain(tuning.artifact)
        seconds = round(time.monotonic() - started, 1)
        file = None if path is None else str(path)
        cut = dict(tuning.cut)
        print_json({"file": file, "seconds": seconds, "cut": cut, "artifact": document})
    else:
        print(report(tuning))
        seconds = time.monotonic() - started
        print(f"\n{seconds:.0f} s in all; artifact: {path or 'none'}", flush=True)
        if arguments.chunk and (named := _default_chunk(about.tunable, arguments.chunk)):
            print(named)
    if tuning.findings.interrupted:
        raise KeyboardInterrupt("the result above is kept; --resume goes on with its trials")
    return 0 if tuning.winner is not None else 1


def _default_chunk(tunable: Tunable, chunks: tuple[int, ...]) -> str:
    """A sentence about the default, where --chunk does not name its chunk length."""
    default = tunable.default.chunk
    if default in chunks:
        return ""
    return f"--chunk limits what is tried; the default races with its own chunk, {default}"


def _storage(arguments: argparse.Namespace, path: str) -> str:
    """The URL given, else the journal of this key: the last one with --resume, or a new one."""
    own_folder("artifacts")  # the folder of the result: a fault in it is raised before the search
    if arguments.storage:
        return str(arguments.storage)
    folder = own_folder("studies", *Path(path).parent.parts)
    stem = Path(path).stem
    if arguments.resume:
        known = sorted(folder.glob(f"{stem}-*.journal"))
        if known:
            return str(known[-1])
    now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return str(folder / f"{stem}-{now}.journal")


def _shown(url: str) -> str:
    """The URL for readers; a file in the cache is named by its path there."""
    return url.removeprefix(f"{cache_folder()}{os.sep}")


def _shape(text: str) -> tuple[int, int, int]:
    B, T, H = counts(text, "B,T,H", "4,4096,16")
    return B, T, H


def _seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, as in 300") from None
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("a budget is a number of seconds above 0")
    return seconds


def _chunks(text: str) -> tuple[int, ...]:
    try:
        chunks = tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list as 32,64") from None
    if any(c < 16 or c & (c - 1) for c in chunks):
        raise argparse.ArgumentTypeError("chunks are powers of two, 16 or more")
    return chunks


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    add_dims(parser, Dims(128, 128))
    add_dtype(parser, None, "default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--shape", type=_shape, metavar="B,T,H", help="the size of the call to tune for"
    )
    parser.add_argument(
        "--engine", choices=[e.value for e in EngineName], help="the engine to tune"
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=100.0,
        metavar="SECONDS",
        help="the time for all of it, compilations too; default 100",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the last study")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="journal:///path or a database's URL: workers that share it divide the work",
    )
    parser.add_argument(
        "--jobs", type=count, default=os.cpu_count() or 1, help="compilations at a time"
    )
    parser.add_argument(
        "--chunk",
        type=_chunks,
        metavar="C,C",
        help="try only these chunk lengths (the default races them with its own)",
    )
    parser.add_argument(
        "--plans", type=count, metavar="N", help="at most N plans per direction, by least memory"
    )
    parser.add_argument(
        "--exhaustive", action="store_true", help="every configuration of every plan, in order"
    )
    parser.add_argument("--seed", type=int, help="the seed of the search")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the study (extra: plot)")
    add_json(parser)


TUNE = Command(
    "tune",
    "Find the fastest configuration on this machine, prove it right, and keep it.",
    (
        "chunkwise tune gated_delta_rule --dims K=128,V=128 --dtype bf16",
        "chunkwise tune my_rules.py:my_rule --shape 1,8192,32 --budget 300",
        "chunkwise tune kda --storage postgresql://tuner@db/studies",
    ),
    _arguments,
    _tune,
)
