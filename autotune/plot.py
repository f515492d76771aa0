"""Draws a tuning: every measured configuration of the winner's kernels (extra `plot`)."""

from __future__ import annotations

from pathlib import Path

from .tune import Tuning


def plot(tuning: Tuning, file: Path) -> None:
    """Write the picture to `file`, in the format that its suffix names."""
    from matplotlib.figure import Figure  # an optional dependency
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    best = next(iter(tuning.findings.combinations), None)
    wanted = {} if best is None else dict(best.points)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for part, measured in tuning.findings.parts:
        if part.key in wanted and measured:
            slowest_first = sorted((m.us for m in measured), reverse=True)
            axes.plot(range(1, len(measured) + 1), slowest_first, "o-", ms=3, label=part.name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 4 * low:  # a decade has three ticks: here there may be none
        axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("configurations of the kernel, the slowest first")
    axes.set_ylabel("microseconds")
    axes.set_title(f"{tuning.artifact.recurrence} on {tuning.artifact.key.machine}")
    if wanted:
        axes.legend()
    figure.savefig(file)
