"""The command `chunkwise doctor`: versions, devices, artifacts, and a small call per engine."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import torch

from . import library
from .autotune.store import versions_here
from .cli_command import Command, add_json, find, print_json
from .cli_emit import dims
from .codegen.config import Dims
from .codegen.interface import Dtype
from .dsl import errors, oracle
from .runtime.cache import CACHE_VARIABLE, cache_folder, own_folder
from .runtime.check import CHECK_VARIABLE
from .runtime.engines import ENGINE_VARIABLE, EngineName, available, choose
from .runtime.tuned.machine import assembler, driver, known_bad, machine_of, version
from .runtime.tuned.selection import find as look_up
from .runtime.tuned.selection import folders, key_here, scan

_PACKAGES = ("chunkwise", "torch", "triton", "sympy", "optuna", "matplotlib", "apache-tvm")
_VARIABLES = (ENGINE_VARIABLE, CHECK_VARIABLE, CACHE_VARIABLE)
_TOLERANCE = 1e-4  # float32 against float64, GPU included


def _devices() -> list[str]:
    found = [f"cpu: {machine_of(torch.device('cpu'))}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(
            f"cuda:{i}: {about.name}, sm_{about.major}{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB"
        )
    return found


def _verdict(engine: EngineName, why_not: str | None) -> tuple[bool, str]:
    """Whether the engine works here (or is absent), and a sentence about it."""
    if why_not is not None:
        return True, f"not available: {why_not.splitlines()[-1].strip()}"
    device = "cuda" if engine is EngineName.TRITON else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return True, "installed; there is no CUDA device to run it on"
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
        return False, f"refused the test call: {error.headline}"
    wrong = float((got.cpu().double() - want).norm() / want.norm())
    if not wrong <= _TOLERANCE:  # NaN is wrong as well
        return False, f"WRONG: relative error {wrong:.1e} on {device}"
    return True, f"agrees with the oracle on {device} (relative error {wrong:.0e})"


def _doctor(arguments: argparse.Namespace) -> int:
    verdicts = {name: _verdict(name, why) for name, why in available().items()}
    bad = known_bad()
    healthy = all(fine for fine, _ in verdicts.values()) and not bad
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in _PACKAGES},
        "driver": driver(),
        "assembler": assembler(),
        "known_bad": [str(pair) for pair in bad],
        "devices": _devices(),
        "engines": {name.value: text for name, (_, text) in verdicts.items()},
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
        "cache": _cache(),
        "artifacts": [{"file": str(path), "state": state} for path, state in _artifacts()],
        "serves": [] if arguments.target is None else _serves(arguments),
        "healthy": healthy,
    }
    if arguments.json:
        print_json(report)
    else:
        for what, line in _lines(verdicts, arguments):
            print(f"{what:<12} {line}")
    return 0 if healthy else 1


def _lines(
    verdicts: Mapping[EngineName, tuple[bool, str]], arguments: argparse.Namespace
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
    for engine, (fine, text) in verdicts.items():
        yield "engine", f"{engine.value}: {text}" + ("" if fine else "  <--")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    yield "by default", f"tensors on {kind} run on {choose(kind).value}"
    for variable in _VARIABLES:
        yield "environment", f"{variable}={os.environ.get(variable, '(not set)')}"
    cache = _cache()
    yield "cache", f"{cache['folder']}, {cache['bytes'] / 2**20:.1f} MiB"
    if cache["fault"]:
        yield "", f"NOT USED: {cache['fault']}"
    artifacts = _artifacts()
    for path, state in artifacts:
        yield "artifact", str(path)
        yield "", state
    if not artifacts:
        yield "artifact", "none: every call is served by a default configuration"
    if arguments.target is not None:
        first, *others = _serves(arguments)
        yield "serves", first
        yield from (("", line) for line in others)


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


def _artifacts() -> list[tuple[Path, str]]:
    """Every artifact found, with its key, or with the reason why it is refused."""
    found = []
    for path, artifact in scan(folders()):
        if isinstance(artifact, errors.BadArtifact):
            found.append((path, f"REFUSED: {artifact.why}"))
        else:
            sizes, wrong = len(artifact.tuned), len(artifact.quarantine)
            state = f"{artifact.recurrence}: {artifact.key}; {sizes} sizes tuned"
            found.append((path, state + (f", {wrong} in quarantine" if wrong else "")))
    return found


def _serves(arguments: argparse.Namespace) -> list[str]:
    """The artifacts that serve calls of TARGET here, and how the keys of the others differ."""
    declared = find(arguments.target).declaration
    form = declared.normal_form(declared.default_micro)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine, dtype = choose(device.type), getattr(torch, arguments.dtype)
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
    parser.add_argument("target", nargs="?", metavar="TARGET", help="also show its artifacts")
    parser.add_argument("--dims", type=dims, default=Dims(128, 128), help="of TARGET, K=128,V=128")
    parser.add_argument("--dtype", choices=[d.value for d in Dtype], default="bfloat16")
    add_json(parser)


DOCTOR = Command(
    "doctor",
    "Report versions, devices, engines (with a small call on each) and artifacts.",
    ("chunkwise doctor", "chunkwise doctor kda --dims K=128,V=128", "chunkwise doctor --json"),
    _arguments,
    _doctor,
)
