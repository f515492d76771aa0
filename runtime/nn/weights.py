"""The weights of a module in a file of safetensors, which need not be installed until then."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from torch import nn

from ..extras import how_to_install


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        remedy = how_to_install("train")
        raise ModuleNotFoundError(f"weights are files of safetensors: {remedy}") from None
    return safetensors.torch


def write_weights(module: nn.Module, path: Path) -> None:
    """Write a file beside `path`, then rename it: `path` is whole at any time."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    _safetensors().save_model(module, str(beside))
    os.replace(beside, path)


def read_weights(module: nn.Module, path: Path) -> None:
    """Load weights into a module.

    Raises:
        RuntimeError: the file has other tensors than the module.
    """
    _safetensors().load_model(module, str(path))
