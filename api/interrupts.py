"""A command's first seconds, while it imports torch: Ctrl-C is one line, and their time counts."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import dropwhile
from pathlib import Path
from types import FrameType

LINE = "chunkwise: interrupted"
_STARTED = time.monotonic()


def _end(_signal: int, _frame: FrameType | None) -> None:
    # an exception would pass through modules that are half imported, and may be caught there
    os.write(2, f"{LINE}\n".encode())
    os._exit(130)


def _is_command() -> bool:
    """Whether this process is `chunkwise …` or `python -m chunkwise …`."""
    words = [*dropwhile(lambda w: w.startswith("-") and w != "-m", sys.orig_argv[1:])]
    return words[:2] == ["-m", "chunkwise"] or Path(*words[:1]).stem == "chunkwise"


def started() -> float:
    """When the command began, by `time.monotonic`: before the imports of its own process."""
    return _STARTED if _is_command() else time.monotonic()


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, as it does in any program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
