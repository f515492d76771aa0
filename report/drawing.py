"""Draws SVG in the colours of its page, light or dark: text, boxes, lines, bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

SIZE = 13  # of text, in pixels
LINE = 18  # from one line of text to the next
# of a letter, in sizes of text; measured widths of common fonts lie below these
_WIDE, _MONO = 0.6, 0.62
_STYLE = """
.picture { color: #1f2328; background: #fff; font: 13px system-ui, "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { .picture { color: #e6edf3; background: #0d1117; } }
@media print { .picture { color: #000; background: #fff; } }
.picture text { fill: currentColor; white-space: pre; }
.picture .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }
.picture .strong { font-weight: 600; }
.picture .faint { opacity: 0.7; }
.picture .box { fill: currentColor; fill-opacity: 0.05; stroke: currentColor; stroke-opacity: 0.3; }
.picture .line { stroke: currentColor; fill: none; stroke-opacity: 0.6; }
.picture .tip { fill: currentColor; fill-opacity: 0.6; }
.picture .first { fill: #4c8dd6; }
.picture .second { fill: #d9822b; }
"""


def text_width(text: str, *, code: bool = False) -> float:
    """At least the pixels that a line of text takes."""
    return len(text) * (12 * _MONO if code else SIZE * _WIDE)


@dataclass(slots=True)
class Drawing:
    """A picture in the making; y grows downwards, (x, y) of text is where its baseline begins."""

    width: float
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """A line of text; `style` is some of code, strong, faint."""
        at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {at} class="{style}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str = "box") -> None:
        """A rectangle; of style first and second, a bar."""
        round_ = 6 if style == "box" else 2
        size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {size} rx="{round_}" class="{style}"/>')

    def line(self, *points: tuple[float, float], dashed: bool = False, colour: str = "") -> None:
        """A line through points, of the text's colour unless another is named."""
        through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        looks = ' stroke-dasharray="3 3"' if dashed else ""
        looks += f' style="stroke: {colour}; stroke-width: 1.5"' if colour else ""
        self.parts.append(f'<polyline points="{through}" class="line"{looks}/>')

    def svg(self, height: float, title: str) -> str:
        """The picture as an element that stands in HTML and as a file."""
        box = f'viewBox="0 0 {self.width:.0f} {height:.0f}" width="{self.width:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" {box} role="img">'
        body = "\n".join(self.parts)
        return f"{head}\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n{body}\n</svg>\n"


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a chart: its label, one value or two, and the text beside each."""

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    limit: float | None = None


def bars(
    title: str, rows: Sequence[Bar], legend: Sequence[str] = (), *, logarithmic: bool = False
) -> str:
    """Horizontal bars, a group for each row; on a scale of logarithms from the least power of ten.

    A row's `limit` is a tick across its bars.
    """
    left = max((text_width(r.label) for r in rows), default=0) + 14
    right = max((text_width(t) for r in rows for t in r.texts), default=0) + 10
    span = max(760 - left - right, 200)
    values = [v for r in rows for v in (*r.values, r.limit) if v is not None and v > 0]
    least = 10 ** math.floor(math.log10(min(values, default=1.0))) if logarithmic else 0.0
    most = max(values, default=1.0)

    def length(value: float) -> float:
        if not logarithmic:
            return span * value / most
        decades = math.log10(most / least) or 1.0
        return span * max(math.log10(max(value, least) / least), 0.01) / decades

    drawing = Drawing(max(left + span + right, 1.1 * text_width(title)))
    drawing.text(0, 16, title, "strong")
    y = 30.0
    x = 0.0
    for name, style in zip(legend, ("first", "second"), strict=False):
        drawing.box(x, y, 12, 12, style)
        drawing.text(x + 18, y + 11, name)
        x += 34 + text_width(name)
    y += 24.0 if legend else 0.0
    for row in rows:
        height = 14 * len(row.values) + 2
        drawing.text(0, y + height / 2 + 4, row.label)
        for n, (value, text) in enumerate(zip(row.values, row.texts, strict=True)):
            top = y + 14 * n
            end = 0.0 if value is None else length(value)
            if value is not None:
                drawing.box(left, top + 1, max(end, 1), 12, ("first", "second")[n])
            drawing.text(left + max(end, length(row.limit) if row.limit else 0) + 6, top + 11, text)
        if row.limit is not None:
            at = left + length(row.limit)
            drawing.line((at, y - 2), (at, y + height))
        y += height + 8
    return drawing.svg(y + 2, title)
