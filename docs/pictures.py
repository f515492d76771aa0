"""Draws docs/pictures/*.svg: the road of a recurrence, its kernels, errors and speeds.

`python -m docs.pictures` writes them; a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chunkwise.dsl import library
from chunkwise.report.drawing import Bar, bars
from chunkwise.report.pictures import kernels_picture, plan_costs
from chunkwise.runtime.tuned.selection import SHIPPED, read

from docs.drawings import curves, road_picture
from docs.tables import LANGUAGE, Row, against, load

FOLDER = Path(__file__).resolve().parent / "pictures"


def _road() -> str:
    return road_picture(library.gated_delta_rule)


def _kernels() -> str:
    form = library.gated_delta_rule.normal_form()
    return kernels_picture(form.name, plan_costs(form))


def _against_fla(title: str, *names: str) -> str:
    """The peer's time over ours on the device, both directions; the tick is at 1."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in (row for name in names for row in load(name)["rows"] if against(row) == "fla"):
        name = f"{row['recurrence']} {row.get('gates', '')}".rstrip()
        cell = found.setdefault((row["shape"], name), {})
        cell[row["mode"]] = row["device_ratio"]
    rows = []
    for (shape, recurrence), ratios in sorted(found.items()):
        values = (ratios["fwd"], ratios["fwd+bwd"])
        texts = tuple("" if v is None else f"{v:.2f}" for v in values)
        rows.append(Bar(f"{shape}  {recurrence}", values, texts, 1.0))
    return bars(title, rows, ("forward", "forward and backward"))


def _against_torch(title: str, name: str) -> str:
    found: dict[tuple[str, int], list[float]] = {}
    for row in load(name)["rows"]:
        found.setdefault((row["recurrence"], row["D"]), []).append(row["ratio"])
    rows = [
        Bar(f"{recurrence}, K = V = {size}", tuple(ratios), tuple(f"{r:.1f}" for r in ratios), 1.0)
        for (recurrence, size), ratios in found.items()
    ]
    return bars(title, rows, ("forward", "forward and backward"))


def _errors() -> str:
    """The worst error of each shipped artifact, relative to what is allowed of that result."""
    rows = []
    for declared in library.all_declarations():
        form = declared.normal_form(declared.default_micro)
        for path in (SHIPPED / form.digest).glob("triton-bfloat16-K128-*H100*.json"):
            errors = [e for t in read(path).tuned for e in t.certificate.errors]
            name, worst = max(errors, key=lambda e: e[1].rms / e[1].limit)
            text = f"{name}: {worst.rms:.1e} of {worst.limit:.1e}"
            rows.append(Bar(declared.name, (worst.rms / worst.limit,), (text,), 1.0))
    title = "Relative RMS error against the float64 token loop, as a share of what is allowed"
    return bars(f"{title} (H100, bfloat16, K = V = 128)", rows)


def _trained() -> list[Row]:
    return [row for row in load(LANGUAGE)["rows"] if "perplexity" in row]


def _losses() -> str:
    """The loss in training; the first tenth, which would set the scale, is left out."""
    lines = [
        (row["model"], [(t / 1e6, y) for t, y in row["curve"] if t >= row["curve"][-1][0] / 10])
        for row in _trained()
    ]
    return curves("Loss in training", "million tokens", lines)


def _positions() -> str:
    """The validation loss by position, of all but the first bin, which has no context yet."""
    lines = []
    for row in _trained():
        size = row["T"] / len(row["positions"])
        losses = row["positions"][1:]
        lines.append((row["model"], [((n + 1.5) * size, y) for n, y in enumerate(losses)]))
    return curves("Validation loss by position", "position in the row", lines)


def _recall() -> str:
    rows = [
        Bar(
            r["model"], (r["recalled"], r["others"]), (f"{r['recalled']:.2f}", f"{r['others']:.1f}")
        )
        for r in _trained()
    ]
    kinds = ("tokens whose bigram occurred before in the row", "all others")
    return bars("Perplexity of tokens that the context shows", rows, kinds, logarithmic=True)


PICTURES: dict[str, Callable[[], str]] = {
    "road": _road,
    "kernels": _kernels,
    "errors": _errors,
    "h100-fla": partial(
        _against_fla,
        "H100: flash-linear-attention's time over ours, on the device",
        *("h100-fla-D.json", "h100-fla-E.json", "h100-fla-vector-gates.json"),
    ),
    "h200-fla": partial(
        _against_fla,
        "H200: flash-linear-attention's time over ours, on the device",
        "h200-fla.json",
    ),
    "language-loss": _losses,
    "language-position": _positions,
    "language-recall": _recall,
    "cpu-avx2": partial(
        _against_torch, "AVX2, 2 threads: torch's time over TVM's", "cpu-avx2.json"
    ),
    "cpu-avx512": partial(
        _against_torch, "AVX-512, 2 threads: torch's time over TVM's", "cpu-avx512.json"
    ),
}


def main() -> int:
    """Write every picture; 0."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
