"""Reports a tuning as text: the configurations tried, the race, and why the winner won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from ..codegen.config import Config
from ..codegen.plan import Plan
from ..codegen.text.table import table
from ..runtime.tuned.artifact import Configuration
from .space import text
from .trials import Measured
from .tune import DID_NOT_RACE, Finalist, Tuning

_NOTES = ("registers", "spills", "wgmma", "barriers")  # of a trial, in the table


def report(tuning: Tuning) -> str:
    """The whole report, for a terminal."""
    findings = tuning.findings
    ended = "; stopped by Ctrl-C" if findings.interrupted else ""
    head = f"{findings.trials} configurations of {len(findings.parts)} parts measured"
    head += f" ({findings.mine} by this process) in {findings.seconds:.0f} s{ended}"
    pages = [head]
    if findings.refused:
        refused = ", ".join(f"{why} ({n})" for why, n in findings.refused[:5])
        pages[0] += f"\nrefused: {refused}"
    if tuning.cut:
        pages[0] += f"\ncut by the budget: {'; '.join(f'{what}: {n}' for what, n in tuning.cut)}"
    pages.append(_tried(tuning))
    if tuning.finalists:
        pages.append(_race(tuning.finalists))
        pages.append(_verdict(tuning))
    elif tuning.cut:
        pages.append("the budget ended before a race; a larger one goes on with --resume")
    return "\n\n".join(p for p in pages if p)


def _tried(tuning: Tuning) -> str:
    """A table of the parts of the winner (else of the fastest combination), with their trials."""
    combination = None if tuning.winner is None else tuning.winner.combination
    if combination is None:
        combination = next(iter(tuning.findings.combinations), None)
    if combination is None:
        return "nothing was measured: no configuration ran within the budget"
    chosen = dict(combination.points)
    names: dict[str, list[str]] = {}
    for _, alternative in combination.chosen:
        for key, name in zip(alternative.parts, alternative.kernels, strict=True):
            names.setdefault(key, []).append(name)
    rows: list[tuple[str, ...]] = [
        ("part", "tried", "best us", "worst us", "configuration", *_NOTES, "shared")
    ]
    for part, measured in tuning.findings.parts:
        if part.key in chosen:
            best = chosen[part.key]
            rows.append(_row(", ".join(names[part.key]), measured, best))
            first = next((m for m in measured if m.point in part.first[:1]), None)
            if first is not None and first.point != best.point:
                rows.append(_row("  tried first", [first], first))
    others = [(p, m) for p, m in tuning.findings.parts if p.key not in chosen and m]
    more = sum(len(m) for _, m in others)
    note = f"and {more} configurations of {len(others)} parts of other plans" if others else ""
    return "\n".join(filter(None, [*table(rows), note]))


def _row(name: str, measured: Sequence[Measured], best: Measured) -> tuple[str, ...]:
    shared = best.notes.get("shared")
    return (
        name,
        str(len(measured)),
        f"{best.us:.1f}",
        f"{max(m.us for m in measured):.1f}",
        text(best.point),
        *(str(best.notes.get(n, "-")) for n in _NOTES),
        f"{shared / 1024:.0f} KiB" if isinstance(shared, int) else "",
    )


def _race(finalists: tuple[Finalist, ...]) -> str:
    rows = [("whole call", "us", "95 % interval", "verdict")]
    for f in sorted(finalists, key=lambda f: f.timing.median):
        t = f.timing
        label = f"default: {describe(f.config)}" if f.combination is None else describe(f.config)
        rows.append((label, f"{t.median:.1f}", f"{t.low:.1f} to {t.high:.1f}", f.why))
    return "\n".join(table(rows))


def _verdict(tuning: Tuning) -> str:
    winner = tuning.winner
    if winner is None:
        if any(f.certificate is not None for f in tuning.finalists):
            return "nothing passed validation: no configuration may serve on this machine"
        return "nothing was validated within the budget, so that nothing is kept but the trials"
    default = next((f for f in reversed(tuning.finalists) if f.combination is None), None)
    if winner.combination is None:
        if DID_NOT_RACE in dict(tuning.cut):
            return "winner: the default; the budget ended before all others had raced it"
        return "winner: the default. Nothing was faster by more than the noise, and right"
    lines = [f"winner: {describe(winner.config)}"]
    if default is not None:
        ratio = default.timing.median / winner.timing.median
        lines.append(
            f"{ratio:.2f} times as fast as the default in the same race; the intervals do not meet"
        )
    if winner.certificate is not None and winner.certificate.errors:
        name, worst = max(winner.certificate.errors, key=lambda e: e[1].rms / e[1].limit)
        lines.append(
            f"right on {', '.join(winner.certificate.inputs)} inputs: the largest error, of {name},"
            f" is {worst.rms:.1e} ({worst.limit:.1e} allowed); two runs agree bit for bit"
        )
    return "\n".join(lines)


def describe(config: Configuration) -> str:
    """A configuration as one line."""
    if isinstance(config, Config):
        return f"C={config.chunk} {config.forward.label} / {config.backward.label}"
    values = ((f.name, getattr(config, f.name)) for f in fields(config))
    return " ".join(f"{n}={x.label if isinstance(x, Plan) else x}" for n, x in values)
