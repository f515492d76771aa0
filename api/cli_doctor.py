"""The command `chunkwise doctor`: versions, devices, artifacts, and a small call per engine."""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from . import library
from .autotune.store import versions_here
from .cli_arguments import add_dims, add_dtype
from .cli_command import TARGET, Command, add_json, find, print_json
from .cli_progress import Progress
from .codegen.config import Dims
from .codegen.interface import Dtype
from .dsl import errors, oracle
from .environment import VARIABLES
from .runtime.cache import cache_folder, own_folder
from .runtime.engines import EngineName, available, choose
from .runtime.tuned.machine import assembler, driver, known_bad, machine_of, version
from .runtime.tuned.selection import find as look_up
from .runtime.tuned.selection import folders, key_here, scan

_PACKAGES = (
    "chunkwise",
    "torch",
    "triton",
    "sympy",
    "optuna",
    "matplotlib",
    "apache-tvm",
    "apache-tvm-ffi",
)
_TOLERANCE = 1e-4  # float32 against float64, GPU included


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Whether an engine serves calls here, whether that is as it should be, and a sentence."""

    serves: bool
    healthy: bool
    text: str


def _devices() -> list[str]:
    found = [f"cpu: {machine_of(torch.device('cpu'))}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(
            f"cuda:{i}: {about.name}, sm_{about.major}{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB"
        )
    return found


def _no_gpu() -> str:
    """Why torch sees no GPU; empty if it sees one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    if driver() is None:
        return "this machine has no NVIDIA driver"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"torch sees no GPU under CUDA_VISIBLE_DEVICES={hidden!r}"
    return f"torch {torch.__version__} sees no GPU under driver {driver()}"


def _verdict(engine: EngineName, why_not: str | None) -> _Verdict:
    """A test call on the engine, where it is installed and has a device."""
    if why_not is not None:
        return _Verdict(False, True, f"not here: {why_not}")
    device = "cuda" if engine is EngineName.TRITON else "cpu"
    if device == "cuda" and _no_gpu():
        return _Verdict(False, True, f"not here: {_no_gpu()}")
    op = library.gated_delta_rule
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")

    q, k = (torch.nn.functional.normalize(normal(1, 70, 2, 16), dim=-1) for _ in range(2))
    v = normal(1, 70, 2, 16)
    g, beta = (normal(1, 70, 2).sigmoid() for _ in range(2))
    operands = {"q": q, "k": k, "v": v, "g": -g, "beta": beta}
    want, _ = oracle.run(op.declaration.step(), operands)
    try:
        got, _ = op(*(x.to(device) for x in operands.values()), engine=engine)
    except errors.ChunkwiseError as error:
        reason = error.why or error.headline
        return _Verdict(False, False, f"REFUSED the test call: {reason}")
    wrong = float((got.cpu().double() - want).norm() / want.norm())
    if not wrong <= _TOLERANCE:  # NaN is wrong as well
        return _Verdict(False, False, f"WRONG: relative error {wrong:.1e} on {device}")
    return _Verdict(True, True, f"right on {device} (relative error {wrong:.0e})")


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.target is not None:
        find(arguments.target)  # refused before the engines are called
    with Progress("calling each engine", quiet=arguments.json):
        verdicts = {name: _verdict(name, why) for name, why in available().items()}
    bad = known_bad()
    healthy = all(v.healthy for v in verdicts.values()) and not bad
    if arguments.json:
        report = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in _PACKAGES},
            "driver": driver(),
            "assembler": assembler(),
            "known_bad": [str(pair) for pair in bad],
            "devices": _devices(),
            "engines": {name.value: v.text for name, v in verdicts.items()},
            "environment": {v.name: os.environ.get(v.name) for v in VARIABLES},
            "cache": _cache(),
            "artifacts": [{"file": str(a.path), "state": a.state} for a in _artifacts()],
            "serves": [] if arguments.target is None else _serves(arguments),
            "healthy": healthy,
        }
        print_json(report)
        return 0 if healthy else 1
    print(_summary(verdicts, healthy), end="\n\n")
    for what, line in _lines(verdicts, arguments):
        print(f"{what:<14} {line}")
    return 0 if healthy else 1


def _summary(verdicts: Mapping[EngineName, _Verdict], healthy: bool) -> str:
    """A verdict on everything, then what serves calls here and what to mend."""
    serving = [name.value for name, v in verdicts.items() if v.serves]
    state = "healthy" if healthy else "NOT HEALTHY"
    engines = f"calls run on {', '.join(serving)}" if serving else "no engine serves calls"
    lines = [f"{state}: chunkwise {version('chunkwise') or '(not installed)'}, {engines}"]
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines += [f"tensors on {kind} run on {choose(kind).value}" for kind in kinds]
    lines += [f"{name.value}: {v.text}" for name, v in verdicts.items() if not v.healthy]
    lines += [str(pair) for pair in known_bad()]
    fault = _cache()["fault"]
    lines += [f"the cache is not used: {fault}"] if fault else []
    return "\n".join(lines)


def _lines(
    verdicts: Mapping[EngineName, _Verdict], arguments: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """The lines to print, each as a word for the margin and a text."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield name, version(name) or "not installed"
    yield "driver", driver() or "no NVIDIA driver"
    yield "assembler", assembler() or "none"
    for pair in known_bad():
        yield "known bad", f"{pair}  <--"
    for device in _devices():
        yield "device", device
    if _no_gpu():
        yield "", f"no GPU: {_no_gpu()}"
    for engine, verdict in verdicts.items():
        yield "engine", f"{engine.value}: {verdict.text}" + ("" if verdict.healthy else "  <--")
    for variable in VARIABLES:
        value = os.environ.get(variable.name)
        if value is not None or variable.name.startswith("CHUNKWISE"):
            shown = "(not set)" if value is None else value
            yield "environment", f"{variable.name}={shown}"
    cache = _cache()
    yield "cache", f"{cache['folder']}, {cache['bytes'] / 2**20:.1f} MiB"
    if cache["fault"]:
        yield "", f"NOT USED: {cache['fault']}"
    yield from _artifact_lines(every=arguments.artifacts)
    if arguments.target is not None:
        first, *others = _serves(arguments)
        yield "serves", first
        yield from (("", line) for line in others)


def _artifact_lines(every: bool) -> Iterator[tuple[str, str]]:
    """All artifacts, or their number by machine, and those that are refused."""
    found = _artifacts()
    if not found:
        yield "artifacts", "none: every call is served by a default configuration"
        return
    if every:
        for a in found:
            yield "artifact", str(a.path)
            yield "", a.state
        return
    kinds = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    here = {str(machine_of(device)) for device in kinds}
    by_machine = Counter(a.machine for a in found if a.machine)
    mine = sum(n for machine, n in by_machine.items() if machine in here)
    yield "artifacts", f"{len(found)}, of which {mine} are for this machine (--artifacts lists all)"
    for machine, n in by_machine.most_common():
        yield "", f"{n} for {'this machine: ' if machine in here else ''}{machine}"
    for a in found:
        if not a.machine:
            yield "", f"{a.path}: {a.state}"


class _Cache(TypedDict):
    """The cache folder, the size of its files, and why it is not used (None: it is used)."""

    folder: str
    bytes: int
    fault: str | None


def _cache() -> _Cache:
    folder, held, fault = cache_folder(), 0, None
    try:
        held = sum(p.stat().st_size for p in own_folder().rglob("*") if p.is_file())
    except errors.BadCache as why:
        fault = why.why
    shown = os.fsencode(folder).decode(errors="backslashreplace")
    return _Cache(folder=shown, bytes=held, fault=fault)


@dataclass(frozen=True, slots=True)
class _Found:
    """An artifact's file, its machine (empty: the file is refused), and its key or the reason."""

    path: Path
    machine: str
    state: str


def _artifacts() -> list[_Found]:
    found = []
    for path, artifact in scan(folders()):
        if isinstance(artifact, errors.BadArtifact):
            found.append(_Found(path, "", f"REFUSED: {artifact.why}"))
        else:
            sizes, wrong = len(artifact.tuned), len(artifact.quarantine)
            state = f"{artifact.recurrence}: {artifact.key}; {sizes} sizes tuned"
            state += f", {wrong} in quarantine" if wrong else ""
            found.append(_Found(path, str(artifact.key.machine), state))
    return found


def _serves(arguments: argparse.Namespace) -> list[str]:
    """The artifacts that serve calls of TARGET here, and how the keys of the others differ."""
    declared = find(arguments.target).declaration
    form = declared.normal_form(declared.default_micro)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine, dtype = choose(device.type), getattr(torch, arguments.dtype.value)
    key = key_here(form, engine, dtype, arguments.dims, device)
    served = look_up(key, folders())
    lines = [f"{declared.name}: {key}", served.nearness.value, *map(str, served.files)]
    lines += [f"not {miss}" for miss in served.misses]
    for t in served.artifact.tuned if served.artifact is not None else ():
        size = f"{t.bucket.rows} x {t.bucket.tokens}"
        state = "as tuned" if t.versions == versions_here(engine) else "tuned under other versions"
        lines.append(f"{size} (sequences x heads, tokens): {state}")
    return lines


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar=TARGET, help="also show what serves it")
    parser.add_argument("--artifacts", action="store_true", help="list every artifact")
    add_dims(parser, Dims(128, 128), " (of TARGET)")
    add_dtype(parser, Dtype.BFLOAT16, "of TARGET; default: bfloat16")
    add_json(parser)


DOCTOR = Command(
    "doctor",
    "Say whether this machine is in order: versions, devices, a call on each engine, artifacts.",
    ("chunkwise doctor", "chunkwise doctor kda --dims K=128,V=128", "chunkwise doctor --json"),
    _arguments,
    _doctor,
)
