"""Says what a long command is doing: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
FIRST_S, EVERY_S = 5.0, 10.0  # the first line where there is no terminal, and those after it
_TICK_S = 1.0  # the clock of a bar goes on while one step takes long


class Progress:
    """Counts the steps of a command on stderr, from the first to the last second of the block.

    Args:
        what: the command's work, in a few words.
        total: its steps; None where nobody knows.
        unit: what one step is.
        seconds: a time limit, after which the work ends by itself; the bar then shows time.
        quiet: say nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        seconds: float | None = None,
        quiet: bool = False,
    ) -> None:
        self._what, self._total, self._unit, self._limit = what, total, unit, seconds
        self._started = time.monotonic()
        self._done, self._note = 0, ""
        self._ended = threading.Event()
        self._terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._quiet = quiet
        self._bar: tqdm[object] | None = None

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        if self._terminal:
            layout = None
            if self._limit is not None:
                layout = "{desc} {bar} {n:.0f}/{total:.0f} s{postfix}"
            elif self._total is None:
                layout = "{desc} {elapsed}{postfix}"
            self._bar = tqdm(
                total=self._total if self._limit is None else self._limit,
                desc=self._what,
                unit=self._unit or "it",
                bar_format=layout,
                leave=False,
                dynamic_ncols=True,
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def step(self, note: str = "") -> None:
        """One step is done; `note` says what was found so far."""
        self.say(note or self._note)
        self._done += 1
        if self._bar is not None and self._limit is None:
            self._bar.update()

    def say(self, note: str) -> None:
        """What the command does now, or has found so far."""
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)

    def tell(self, stage: str) -> None:
        """Another stage of the work has begun; said at once where there is no bar."""
        self.say(stage)
        if self._bar is not None:
            self._bar.refresh()
        elif not self._quiet:
            print(f"{self._what}: {stage}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        waits = _TICK_S if self._terminal else FIRST_S
        while not self._ended.wait(waits):
            if self._bar is not None:
                if self._limit is not None:
                    self._bar.n = min(time.monotonic() - self._started, self._limit)
                self._bar.refresh()
            else:
                print(self._line(), file=sys.stderr, flush=True)
                waits = EVERY_S

    def _line(self) -> str:
        seconds = f"{time.monotonic() - self._started:.0f}"
        seconds += " s" if self._limit is None else f" of {self._limit:.0f} s"
        parts = [seconds]
        if self._total is not None:
            parts.append(f"{self._done} of {self._total} {self._unit}s")
        return f"{self._what}: {', '.join([*parts, *filter(None, [self._note])])}"


def watched(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """The items, with their number shown as they come."""
    with Progress(what, total, unit) as progress:
        for item in items:
            progress.step()
            yield item
