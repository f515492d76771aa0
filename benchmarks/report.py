"""Formats rows as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .contest import Contestant, Row

_COLUMNS = (
    "recurrence",
    "gates",
    "shape",
    "mode",
    "against",
    "ours ms",
    "peer ms",
    "peer/ours",
    "dev ms",
    "peer dev",
    "dev ratio",
    "x floor",
    "ours MB",
    "peer MB",
    "first s",
    "peer s",
    "right",
)


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _right(ours: Contestant, peer: Contestant) -> str:
    words = {True: "yes", False: "WRONG", None: "-"}
    return f"{words[ours.ok]} / {words[peer.ok]}"


def _cells(row: Row) -> tuple[str, ...]:
    dagger = "†" if any(n.startswith("†") for n in row.notes) else ""
    over = None if row.ours.device_ms is None else row.ours.device_ms / row.floor_ms
    return (
        row.recurrence,
        row.gates or "-",
        row.shape,
        row.mode,
        row.against or "-",
        _number(row.ours.ms, 3),
        _number(row.peer.ms, 3) + (dagger if row.mode != "fwd" else ""),
        _number(row.ratio, 2),
        _number(row.ours.device_ms, 3),
        _number(row.peer.device_ms, 3),
        _number(row.device_ratio, 2),
        _number(over, 1),
        _number(row.ours.peak_mb, 0),
        _number(row.peer.peak_mb, 0),
        _number(row.ours.first_s, 1),
        _number(row.peer.first_s, 1),
        _right(row.ours, row.peer),
    )


def table(rows: Sequence[Row]) -> str:
    """One line per row, columns aligned."""
    lines = [_COLUMNS, *(_cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]

    def aligned(line: Sequence[str]) -> str:
        left = [c.ljust(w) for c, w in zip(line[:5], widths[:5], strict=True)]
        right = [c.rjust(w) for c, w in zip(line[5:], widths[5:], strict=True)]
        return "  ".join((*left, *right)).rstrip()

    return "\n".join(aligned(line) for line in lines)


def geometric_mean(given: Iterable[float | None]) -> float | None:
    """The geometric mean of the ratios that are not None; None if all are."""
    ratios = [r for r in given if r is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def means(rows: Sequence[Row]) -> str:
    """A line for each mode and peer: the geometric means of ratios as called and on the device."""
    lines = []
    for mode, against in sorted({(r.mode, r.against) for r in rows if r.against and not r.bar}):
        own = [r for r in rows if (r.mode, r.against) == (mode, against)]
        called, alone = (
            geometric_mean(getattr(r, name) for r in own) for name in ("ratio", "device_ratio")
        )
        if called is not None and alone is not None:
            words = f"geometric mean of {against}/ours, {mode}"
            lines.append(f"{words}: {called:.3f} as called, {alone:.3f} on the device")
    return "\n".join(lines)


def notes(rows: Sequence[Row]) -> str:
    """The notes of every recurrence and shape, each once."""
    lines: dict[str, None] = {}
    for row in rows:
        name = f"{row.recurrence} {row.gates}".rstrip()
        lines |= {f"{name} {row.shape}: {n}": None for n in row.notes}
    return "\n".join(lines)


def entry(row: Row) -> dict[str, object]:
    """A row for JSON, with its ratios."""
    return {**asdict(row), "ratio": row.ratio, "device_ratio": row.device_ratio}


def key(row: Row) -> tuple[str | None, ...]:
    """What tells a row from the others of a result."""
    return (row.recurrence, row.gates, row.shape, row.dtype, row.mode, row.against)


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a result, as `entry` made them."""
    fields = Row.__dataclass_fields__
    found = []
    for made in result["rows"]:
        given = {name: made[name] for name in fields if name in made}
        sides = {name: Contestant(**made[name]) for name in ("ours", "peer")}
        found.append(Row(**{**given, **sides, "notes": tuple(made["notes"])}))
    return found


def write(
    path: Path,
    command: Sequence[str],
    machine: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
) -> None:
    """Write a run as one JSON file, atomically: it is written beside `path` and renamed.

    The files of docs/results/ have this form; `python -m docs.tables` makes their tables.
    """
    content = {"command": shlex.join(command), "machine": machine, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
