"""The driver of memcheck counts errors correctly, tested without a GPU or the sanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interpreter

ROOT = Path(__file__).parents[1]
SANITIZER = """#!/bin/sh
while [ "$1" != --target-processes ]; do shift; done
shift 2
"""


def _run(tmp_path: Path, does: str, *options: str) -> tuple[int, list[str]]:
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text(f"{SANITIZER}{does}\n")
    sanitizer.chmod(0o755)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.sanitize", "--layouts", "simple_gla"),
            *("--sanitizer", str(sanitizer), *options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines()


def test_every_call_is_made_and_right(tmp_path: Path) -> None:
    does = 'echo "========= ERROR SUMMARY: 0 errors"; exec "$@"'
    status, lines = _run(tmp_path, does, "--jobs", "1")
    assert lines[0] == "simple_gla: 2 calls and 4 steps are right"
    assert lines[-1] == "0 errors (memcheck: ERROR SUMMARY: 0 errors)"
    assert status == 0


@pytest.mark.parametrize(
    ("does", "last"),
    [
        (
            'echo "========= ERROR SUMMARY: 3 errors"',
            "3 errors (memcheck: ERROR SUMMARY: 3 errors)",
        ),
        ("exit 7", "2 errors (memcheck: no summary)"),
    ],
)
def test_errors_are_counted(tmp_path: Path, does: str, last: str) -> None:
    status, lines = _run(tmp_path, does, "--jobs", "0")
    assert lines[-1] == last
    assert status == 1
