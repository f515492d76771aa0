"""Compares two results of `benchmarks.run`: which cells lost or gained more than noise.

A cell is a recurrence with its gates, at a shape, in a dtype and a mode. Where both results timed
it against the same version of a peer, the ratios to that are compared, since the drift of a machine
cancels in them; otherwise our times. Noise is 3 %, which medians of equal runs may differ by, or
how far the medians are uncertain, if that is more. Exits with 1 if a cell lost, or is wrong that
was right, and with 2 if the results have no cell in common or are not of the same kind of device.
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

# of noise: clocks, temperature and another card of the same name, however certain the medians are
_LEAST = 0.03


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


def changes(before: Sequence[Row], now: Sequence[Row], *, ratios: bool = True) -> list[Change]:
    """The cells that both results have, against each peer of both; first those that lost most.

    `ratios` says whether peers are the same in both. A cell without a peer of both is one change.
    """
    found: list[Change] = []
    for cell in dict.fromkeys(map(_cell, now)):
        old = [r for r in before if _cell(r) == cell and r.ours.ok and r.ours.device_ms]
        new = [r for r in now if _cell(r) == cell]
        pairs = [(b, n) for b in old for n in new if b.against == n.against]
        found += [_change(b, n, ratios) for b, n in pairs or [*zip(old, new, strict=False)][:1]]
    return sorted(found, key=lambda c: c.gain)


def _cell(row: Row) -> tuple[str | None, ...]:
    return key(row)[:-1]


def _change(before: Row, now: Row, ratios: bool) -> Change:
    if not now.ours.ok or now.ours.device_ms is None or before.ours.device_ms is None:
        return Change(before, now, 0.0, _LEAST)
    sides = [before.ours, now.ours]
    gain = before.ours.device_ms / now.ours.device_ms
    # not to another recurrence of ours: one that gained would make the other lose
    same_peer = ratios and before.against == now.against and now.bar is None
    if same_peer and before.device_ratio is not None and now.device_ratio is not None:
        gain = now.device_ratio / before.device_ratio
        sides += [before.peer, now.peer]
    noise = sum((side.spread or 0.0) ** 2 for side in sides) ** 0.5
    return Change(before, now, gain, max(noise, _LEAST))


def report(before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """Print what changed between two results, as they are in JSON; the command's exit code."""
    why = obstacle(before, now["machine"])
    found: list[Change] = []
    if why is None:
        peers = [_versions(r["machine"]) for r in (before, now)]
        found = changes(rows_of(before), rows_of(now), ratios=peers[0] == peers[1])
        why = None if found else "no cell is in both"
    if why is not None:
        print(f"not comparable: {why}")
        return 2
    lost = [c for c in found if c.lost]
    for title, some in (("lost", lost), ("gained", [c for c in found if c.gained])):
        print(f"{title}: {len(some)} of {len(found)} cells", *some, sep="\n  ")
    missing = {_cell(r) for r in rows_of(before) if r.ours.ok} - {_cell(c.now) for c in found}
    if missing:
        print(f"not measured now: {len(missing)} cells")
    return 1 if lost else 0


def obstacle(before: Mapping[str, Any], machine: Mapping[str, Any]) -> str | None:
    """Why results of this machine cannot be compared with an earlier result; None: they can."""
    devices = [_device(m) for m in (before["machine"], machine)]
    if devices[0] != devices[1]:
        return f"{devices[0]} before, {devices[1]} now"
    if not all("against" in r for r in before["rows"]):
        return "rows of before 2026-11-28 do not say against whom they are"
    return None


def _device(machine: Mapping[str, Any]) -> str:
    on_cpu = f"{machine.get('processor')}, {machine.get('threads')} threads"
    return str(machine.get("device", on_cpu))


def _versions(machine: Mapping[str, Any]) -> dict[str, str]:
    """Those on which the times of peers depend."""
    return {p: v for p, v in machine.get("versions", {}).items() if p != "chunkwise"}


def result(path: str) -> dict[str, Any]:
    """What a file of results holds, as an argument of a command.

    Raises:
        ArgumentTypeError: there is none, or it is no result of `benchmarks.run`.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read: {why}") from None
    if not isinstance(found, dict) or not {"machine", "rows"} <= found.keys():
        raise argparse.ArgumentTypeError(f"{path!r} is no result of `python -m benchmarks.run`")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    p.add_argument("before", type=result)
    p.add_argument("now", type=result)
    args = p.parse_args(argv)
    return report(args.before, args.now)


if __name__ == "__main__":
    raise SystemExit(main())
