"""How the text of an exported package is laid out: lines, lists over several lines, modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

WIDTH = 92  # lines that are indented twice more stay within 100


def filled(parts: Iterable[str], indent: str = "", width: int = WIDTH) -> Iterator[str]:
    """`parts` with commas, as many to a line as it holds."""
    line = indent
    for part in parts:
        if line != indent and len(line) + len(part) + 1 > width:
            yield line.rstrip()
            line = indent
        line += part + ", "
    yield line.rstrip()


def wrapped(start: str, parts: Sequence[str], end: str, indent: str = "") -> Iterator[str]:
    """`start` + parts with commas + `end`: on one line, or on as many as they need."""
    flat = indent + start + ", ".join(parts) + end
    if len(flat) <= WIDTH:
        yield flat
        return
    yield indent + start
    yield from filled(parts, indent + "    ")
    yield indent + end


def module(*blocks: Iterable[str]) -> str:
    """A Python module: its blocks, two blank lines apart."""
    return "\n\n\n".join("\n".join(block).strip("\n") for block in blocks) + "\n"


def indented(lines: Iterable[str], by: str = "    ") -> list[str]:
    """`lines`, one level further in."""
    return [f"{by}{line}" if line else "" for line in lines]
