"""The command that looks at the machine: versions, devices, engines, and a small call of each."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

import torch

from . import library
from .cli_command import Command, add_json, print_json
from .dsl import errors, oracle
from .runtime.check import CHECK_VARIABLE
from .runtime.engines import ENGINE_VARIABLE, EngineName, available, choose

_PACKAGES = ("chunkwise", "torch", "triton", "sympy", "optuna", "matplotlib", "apache-tvm")
_VARIABLES = (ENGINE_VARIABLE, CHECK_VARIABLE)
_TOLERANCE = 1e-4  # float32 against float64, GPU included


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(
            f"cuda:{i}: {about.name}, sm_{about.major}{about.minor}, "
            f"{about.total_memory / 2**30:.0f} GiB"
        )
    return found


def _verdict(engine: EngineName, why_not: str | None) -> tuple[bool, str]:
    """Whether the engine is in order here (an absent one is), and what there is to say of it."""
    if why_not is not None:
        return True, f"not available: {why_not.splitlines()[-1].strip()}"
    device = "cuda" if engine is EngineName.TRITON else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return True, "installed; there is no CUDA device to run it on"
    op = library.gated_delta_rule
    random = torch.Generator().manual_seed(0)
    q, k = (
        torch.nn.functional.normalize(torch.randn(1, 70, 2, 16, generator=random), dim=-1)
        for _ in range(2)
    )
    v = torch.randn(1, 70, 2, 16, generator=random)
    g, beta = (torch.rand(1, 70, 2, generator=random) for _ in range(2))
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
    healthy = all(fine for fine, _ in verdicts.values())
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "engines": {name.value: text for name, (_, text) in verdicts.items()},
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
        "healthy": healthy,
    }
    if arguments.json:
        print_json(report)
        return 0 if healthy else 1
    print(f"python       {report['python']} on {report['platform']}")
    for name in _PACKAGES:
        print(f"{name:<12} {_version(name) or 'not installed'}")
    for device in _devices():
        print(f"device       {device}")
    for engine, (fine, text) in verdicts.items():
        print(f"engine       {engine.value}: {text}" + ("" if fine else "  <--"))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"by default   tensors on {kind} run on {choose(kind).value}")
    for variable in _VARIABLES:
        print(f"environment  {variable}={os.environ.get(variable, '(not set)')}")
    return 0 if healthy else 1


DOCTOR = Command(
    "doctor",
    "Report versions, devices and engines, and try a small call on each.",
    ("chunkwise doctor", "chunkwise doctor --json"),
    add_json,
    _doctor,
)
