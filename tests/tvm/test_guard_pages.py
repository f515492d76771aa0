"""Kernels touch no byte beside their tensors: at ends of memory they compute the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.classes import CLASSES

ROOT = Path(__file__).parents[2]


def _guarded(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.guarded", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_beside_a_tensor_is_touched(name: str) -> None:
    """A page that nobody may touch on one side and on the other; every layout, ragged lengths."""
    done = _guarded(name)
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-3000:]}"
    assert done.stdout.endswith(" calls of kernels\n")


@pytest.mark.parametrize("side", ["behind", "before"])
def test_a_kernel_that_does_is_ended(side: str) -> None:
    """The same call, told of one token more than there are, or to begin one sooner."""
    done = _guarded("simple_gla", "--control", side)
    assert done.stdout == "as it is: ran\n"
    assert done.returncode == -signal.SIGSEGV, done.stderr[-3000:]
