"""Describes the machine of a measurement, without which its numbers mean nothing."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from importlib import import_module
from pathlib import Path

import torch
from chunkwise.runtime.tuned.machine import assembler, driver, output, processor, version

PACKAGES = (
    *("chunkwise", "torch", "triton", "fla-core", "flash-linear-attention", "flash-qla"),
    *("tilelang", "nvidia-cudnn-frontend", "mamba-ssm"),
)


def describe(device: torch.device) -> dict[str, object]:
    """Hardware, versions, assembler, commit, sources and date, in a form that JSON takes."""
    seen: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "--short", "HEAD", folder=Path(__file__).parent),
        "sources": sources(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p)) is not None},
        "peer_dispatch": os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") != "1",
        "triton_cache": os.environ.get("TRITON_CACHE_DIR"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        seen["device"] = properties.name
        seen["memory_gib"] = round(properties.total_memory / 2**30, 1)
        seen["cuda"] = torch.version.cuda
        seen["driver"] = driver()
        seen["assembler"] = assembler()
    return seen


_MEASURED = ("", ".autotune", ".codegen", ".dsl", ".runtime")


def sources() -> str:
    """A digest of the code and artifacts that are measured and of the benchmarks, committed or not.

    A machine without git, or with files that are not committed, knows its version by no other.
    """
    modules = [__package__ or "benchmarks", *(f"chunkwise{name}" for name in _MEASURED)]
    folders = {Path(p).resolve() for m in modules for p in import_module(m).__path__}
    files = {
        Path(folder, name).resolve()
        for top in folders
        for folder, _, names in os.walk(top, followlinks=True)
        for name in names
        if name.endswith((".py", ".json"))
    }
    each = sorted(hashlib.blake2b(path.read_bytes()).digest() for path in files)
    return hashlib.blake2b(b"".join(each), digest_size=6).hexdigest()
