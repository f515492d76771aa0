"""Drawings that the documents alone have: the road of a recurrence, and curves over an axis."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.text.mathematics import print_chunk
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.explain import print_form
from chunkwise.report.drawing import LINE, Drawing, text_width
from chunkwise.report.pictures import LOOPS, KernelCost, PlanCosts, plan_costs, source

_CURVES = ("#4c8dd6", "#d9822b", "#3fa45b", "#c2475c", "#8e6bd1", "#9a7b4f", "#2fa3a3", "#b0579e")


def road_picture(declared: Declaration) -> str:
    """From the step to the kernels, each stage as the compiler prints it."""
    form = declared.normal_form(declared.default_micro)
    chunk = print_chunk(chunk_program(form)).splitlines()
    stages = [
        ("the declared step", "", source(declared).splitlines()),
        ("normal form", "traced and normalised", print_form(form).splitlines()),
        ("one chunk", "derived", [_without_marks(line) for line in chunk]),
    ]
    width = 40 + max(text_width(line, code=True) for _, _, lines in stages for line in lines)
    costs = plan_costs(form)
    width = max(width, *(40 + _row_width(costs, d) for d in costs.compulsory))
    drawing = Drawing(width)
    y = 4.0
    for title, verb, lines in stages:
        y = _stage(drawing, y, title, verb, lines)
    y = _planned(drawing, y, costs)
    return drawing.svg(y, f"The road of {declared.name}")


def _without_marks(line: str) -> str:
    return line.replace("[s]", "").replace("[n]", "").rstrip()


def _stage(drawing: Drawing, y: float, title: str, verb: str, lines: Sequence[str]) -> float:
    if verb:
        y = _arrow(drawing, y, verb)
    height = LINE * (len(lines) + 1) + 14
    drawing.box(1, y, drawing.width - 2, height)
    drawing.text(14, y + 20, title, "strong")
    for n, line in enumerate(lines):
        drawing.text(14, y + 20 + LINE * (n + 1), line, "code")
    return y + height


def _arrow(drawing: Drawing, y: float, verb: str) -> float:
    middle, end = drawing.width / 2, y + 34
    drawing.line((middle, y + 4), (middle, end - 6))
    tip = f"{middle - 4:.1f},{end - 7:.1f} {middle + 4:.1f},{end - 7:.1f} {middle:.1f},{end:.1f}"
    drawing.parts.append(f'<polygon points="{tip}" class="tip"/>')
    drawing.text(middle + 12, y + 23, verb, "faint")
    return y + 38


def _lines_of(k: KernelCost) -> list[str]:
    stored = ", ".join(name.label for name, _ in k.kernel.stores)
    return [LOOPS[k.kernel.loop], *textwrap.wrap(f"stores {stored}", 30)]


def _box_width(k: KernelCost) -> float:
    return max(text_width(line) for line in (k.name, *_lines_of(k))) + 24


def _row_width(costs: PlanCosts, direction: str) -> float:
    own = [k for k in costs.kernels if k.direction == direction]
    return sum(_box_width(k) + 12 for k in own) + 70


def _planned(drawing: Drawing, y: float, costs: PlanCosts) -> float:
    y = _arrow(drawing, y, "differentiated, factored and planned")
    top = y
    boxes: list[tuple[float, float, KernelCost, float]] = []
    y += 30
    for direction in costs.compulsory:
        own = [k for k in costs.kernels if k.direction == direction]
        height = LINE * max(len(_lines_of(k)) + 1 for k in own) + 12.0
        x = 84.0
        drawing.text(14, y + 20, direction, "faint")
        for k in own:
            boxes.append((x, y, k, height))
            x += _box_width(k) + 12
        y += height + 12
    drawing.box(1, top, drawing.width - 2, y - top)
    drawing.text(14, top + 20, "kernels", "strong")
    for x, at, k, height in boxes:
        drawing.box(x, at, _box_width(k), height)
        drawing.text(x + 12, at + 20, k.name, "strong")
        for n, line in enumerate(_lines_of(k)):
            drawing.text(x + 12, at + 20 + LINE * (n + 1), line, "faint" if n == 0 else "")
    return y + 4


Curve = tuple[str, Sequence[tuple[float, float]]]  # a name, and points from left to right


def curves(title: str, across: str, found: Sequence[Curve]) -> str:
    """Lines over a common axis, each named where it ends, the highest first."""
    width, height, top = 520.0, 300.0, 34.0
    points = [point for _, line in found for point in line] or [(0.0, 0.0), (1.0, 1.0)]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    names = text_width(max((name for name, _ in found), key=len, default="")) + 70
    drawing = Drawing(max(50 + width + names, 1.1 * text_width(title)))
    drawing.text(0, 16, title, "strong")

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            50 + width * (x - left) / ((right - left) or 1.0),
            top + height * (high - y) / ((high - low) or 1.0),
        )

    for n in range(5):
        x, y = left + (right - left) * n / 4, low + (high - low) * n / 4
        drawing.text(44, place(left, y)[1] + 4, f"{y:.2f}", "faint", "end")
        drawing.line(place(left, y), place(right, y), dashed=True)
        drawing.text(place(x, low)[0], top + height + 18, f"{x:.4g}", "faint", "middle")
    drawing.text(50 + width / 2, top + height + 36, across, "faint", "middle")
    below = 0.0
    order = sorted(range(len(found)), key=lambda n: -found[n][1][-1][1])
    for n in order:
        name, line = found[n]
        colour = _CURVES[n % len(_CURVES)]
        drawing.line(*(place(*point) for point in line), colour=colour)
        end = place(*line[-1])
        below = max(below + LINE, end[1])  # names do not overlap
        drawing.line(end, (56 + width, below), colour=colour)
        drawing.text(62 + width, below + 4, f"{name}  {line[-1][1]:.3f}")
    return drawing.svg(max(top + height + 44, below + 12), title)
