"""Compares two results of `benchmarks.run`: which cells lost or gained more than noise.

A cell is a recurrence with its gates, at a shape, in a mode. Where both results timed it against
the same peer, the ratios to that are compared, since the drift of a machine cancels in them;
otherwise our times. Noise is what the repeats of both results spread by. Exits with 1 if a cell
lost, or is wrong that was right, and with 2 if the results are not of the same kind of device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contest import Row
from .report import key, rows_of

_LEAST = 0.01  # of noise: about what clocks resolve


@dataclass(frozen=True, slots=True)
class Change:
    """A cell of both results; `gain` above 1 is faster than before, 0 is wrong now."""

    before: Row
    now: Row
    gain: float
    noise: float

    @property
    def lost(self) -> bool:
        return self.gain < 1 - self.noise

    @property
    def gained(self) -> bool:
        return self.gain > 1 + self.noise

    def __str__(self) -> str:
        r = self.now
        words = (r.recurrence, r.gates, r.shape, r.dtype, r.mode, r.against and f"/ {r.against}")
        times = f"{self.before.ours.device_ms:.3f} -> {r.ours.device_ms or float('nan'):.3f} ms"
        return (
            f"{' '.join(filter(None, words))}: {times}, x {self.gain:.3f} (noise {self.noise:.3f})"
        )


def changes(before: Sequence[Row], now: Sequence[Row]) -> list[Change]:
    """The cells that both results have; first those that lost most."""
    earlier = {key(r): r for r in before if r.ours.ok and r.ours.device_ms}
    found = [_change(earlier[key(r)], r) for r in now if key(r) in earlier]
    return sorted(found, key=lambda c: c.gain)


def _change(before: Row, now: Row) -> Change:
    if not now.ours.ok or now.ours.device_ms is None or before.ours.device_ms is None:
        return Change(before, now, 0.0, _LEAST)
    sides = [before.ours, now.ours]
    gain = before.ours.device_ms / now.ours.device_ms
    if before.device_ratio is not None and now.device_ratio is not None:
        gain = now.device_ratio / before.device_ratio
        sides += [before.peer, now.peer]
    noise = sum((side.spread or 0.0) ** 2 for side in sides) ** 0.5
    return Change(before, now, gain, max(noise, _LEAST))


def report(before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """Print what changed between two results, as they are in JSON; the command's exit code."""
    devices = [r["machine"].get("device", r["machine"].get("processor")) for r in (before, now)]
    if devices[0] != devices[1]:
        print(f"not comparable: {devices[0]} before, {devices[1]} now")
        return 2
    found = changes(rows_of(before), rows_of(now))
    lost = [c for c in found if c.lost]
    for title, some in (("lost", lost), ("gained", [c for c in found if c.gained])):
        print(f"{title}: {len(some)} of {len(found)} cells", *some, sep="\n  ")
    return 1 if lost else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    p.add_argument("before", type=Path)
    p.add_argument("now", type=Path)
    args = p.parse_args(argv)
    return report(json.loads(args.before.read_text()), json.loads(args.now.read_text()))


if __name__ == "__main__":
    raise SystemExit(main())
