"""What a measurement was made on: without it the number means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("chunkwise", "torch", "triton", "fla-core", "flash-linear-attention", "flash-qla")


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _assembler() -> str | None:
    """The ptxas that Triton uses: TRITON_PTXAS_PATH, or the one in its wheel."""
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
    printed = _output(path, "--version")
    if printed is None:
        return None
    return next((x.strip() for x in printed.splitlines() if "release" in x), printed)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, object]:
    """Hardware, versions, assembler, commit and date, in a form that JSON takes."""
    seen: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p)) is not None},
        "peer_dispatch": os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") != "1",
        "triton_cache": os.environ.get("TRITON_CACHE_DIR"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        seen["device"] = properties.name
        seen["memory_gib"] = round(properties.total_memory / 2**30, 1)
        seen["cuda"] = torch.version.cuda
        seen["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        seen["assembler"] = _assembler()
    return seen
