"""The machine that runs a call, as far as configurations depend on it, and installed versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch

from ...codegen.limits import Form, Within


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine on which configurations are tuned; equal `kind` and `arch` can share them.

    Attributes:
        kind: "cuda", "hip" or "cpu".
        arch: "sm_90", "gfx942"; on a CPU its vector level, "x86-64-v3", "x86-64-v4".
        model: the device's own name, e.g. "NVIDIA H200".
        threads: the number of torch's threads on a CPU; else 0.
    """

    kind: Annotated[str, Form("cuda|hip|cpu", "one of cuda, hip, cpu")]
    arch: str
    model: str
    threads: Annotated[int, Within(0, 1 << 16)] = 0

    @property
    def label(self) -> str:
        """The machine's name in file names, e.g. `cuda-sm_90-NVIDIA-H200`."""
        parts = [self.kind, self.arch, re.sub(r"[^\w.]+", "-", self.model).strip("-")]
        return "-".join([*parts, f"{self.threads}-threads"] if self.threads else parts)

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.model} ({self.arch}{threads})"


def machine_of(device: torch.device) -> Machine:
    """The machine that runs calls on `device`."""
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return _cpu(torch.get_num_threads())


@lru_cache(maxsize=64)
def _gpu(index: int) -> Machine:
    about = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Machine("hip", str(about.gcnArchName).partition(":")[0], about.name)
    return Machine("cuda", f"sm_{about.major}{about.minor}", about.name)


@lru_cache(maxsize=64)
def _cpu(threads: int) -> Machine:
    machine = platform.machine()
    level = {"AVX2": "-v3", "AVX512": "-v4"}.get(torch.backends.cpu.get_cpu_capability(), "")
    arch = f"x86-64{level}" if machine in ("x86_64", "AMD64") else machine
    return Machine("cpu", arch, processor(), threads)


@lru_cache(maxsize=1)
def processor() -> str:
    """The CPU's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of `package`; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A pair of versions that is known to fail; `packages` has names and starts of versions."""

    packages: tuple[tuple[str, str], ...]
    reason: str
    source: str

    def __str__(self) -> str:
        pair = " with ".join(f"{name} {start}" for name, start in self.packages)
        return f"{pair}: {self.reason} ({self.source})"


# only faults that were seen in our own kernels and engines
KNOWN_BAD = (
    KnownBad(
        (("apache-tvm", "0.27.0"), ("apache-tvm-ffi", "0.1.15.post2")),
        "tvm.ir.save_json crashes",
        'pip install "apache-tvm-ffi==0.1.14.post1"',
    ),
)


def known_bad() -> tuple[KnownBad, ...]:
    """The entries of KNOWN_BAD whose versions are installed here."""
    return tuple(
        pair
        for pair in KNOWN_BAD
        if all((version(name) or "").startswith(start) for name, start in pair.packages)
    )


@lru_cache(maxsize=1)
def assembler() -> str | None:
    """The release of the ptxas that Triton uses (TRITON_PTXAS_PATH, or the one in its wheel)."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        try:
            files = metadata.files("triton") or []
        except metadata.PackageNotFoundError:
            return None
        found = [f for f in files if f.name == "ptxas"]
        if not found:
            return None
        path = str(found[0].locate())
    printed = output(path, "--version")
    if printed is None:
        return None
    return next((x.strip() for x in printed.splitlines() if "release" in x), printed)


@lru_cache(maxsize=1)
def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    printed = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.splitlines()[0] if printed else None


def output(*command: str, folder: Path | None = None) -> str | None:
    """The output of a command run in `folder`; None if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
