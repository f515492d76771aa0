"""Makes the tables of docs/results/*.md from the JSON that benchmark commands wrote.

Between `<!-- results: FILE -->` and `<!-- end -->` stand the command, machine and date of that file
of docs/results/, and its rows as a table. `python -m docs.tables` rewrites them; a test compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import SHAPES
from benchmarks.report import geometric_mean

FOLDER = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.S)
Row = Mapping[str, Any]


def load(name: str) -> dict[str, Any]:
    """One file of docs/results/."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def provenance(result: Row) -> str:
    """The command, machine, versions, code and date of a result."""
    m = result["machine"]
    parts = [f"`{result['command']}`", str(m.get("device", m.get("processor")))]
    parts += [f"{n} {m[n]}" for n in ("driver", "cuda", "assembler", "python") if m.get(n)]
    parts += [f"{n} {v}" for n, v in m.get("versions", {}).items()]
    if "sgemm_gflops" in m:
        parts.append(f"sgemm {m['sgemm_gflops']:.0f} GFLOP/s on {m['threads']} threads")
    parts += [f"code of {m['commit']}"] if m.get("commit") else []
    parts += [str(m["date"])[:10]] if m.get("date") else []
    return "; ".join(parts) + "."


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _pair(row: Row, key: str, digits: int) -> str:
    ours, peer = (row[side].get(key) for side in ("ours", "peer"))
    if ours is None:
        return "-"
    return _number(ours, digits) if peer is None else f"{ours:.{digits}f} / {peer:.{digits}f}"


def _timed(row: Row, key: str, ratio: float | None, *, strong: bool) -> str:
    times = _pair(row, key, 3)
    if ratio is None:
        return times
    text = f"**{ratio:.2f}**" if strong else f"{ratio:.2f}"
    return text if times == "-" else f"{times}, {text}"


def _wrong(row: Row) -> str:
    """The sides whose results were wrong."""
    wrong = [
        name
        for side, name in (("ours", "ours"), ("peer", against(row)))
        if row[side].get("ok") is False
    ]
    return f" ({' and '.join(wrong)} wrong)" if wrong else ""


def against(row: Row) -> str:
    """Whom a row of `benchmarks.run` compares with; those before 2026-11-28 say it nowhere."""
    return str(row.get("against", "fla") or "-")


def _over(row: Row) -> str:
    """Our time on the device over that of compulsory traffic."""
    alone, floor = row["ours"].get("device_ms"), row.get("floor_ms")
    return "-" if alone is None or floor is None else f"{alone / floor:.1f}"


def _contest(rows: Sequence[Row]) -> str:
    """Runs of `benchmarks.run`: a line for each contest, and the geometric means by peer."""
    heading = (
        *("recurrence", "against", "forward, device: ours / theirs ms, ratio", "as called"),
        *("forward+backward, device", "as called", "× floor", "peak MB"),
    )
    pages: list[str] = []
    notes: dict[str, None] = {}
    for shape in dict.fromkeys(r["shape"] for r in rows):
        lines: list[tuple[str, ...]] = [heading]
        own = [r for r in rows if r["shape"] == shape]
        for contest in dict.fromkeys(map(_contest_of, own)):
            by_mode = {r["mode"]: r for r in own if _contest_of(r) == contest}
            name, gates, other = contest
            cells = []
            for row in (by_mode["fwd"], by_mode["fwd+bwd"]):
                said = [n for n in row.get("notes", ()) if n[0] in "†‡"]
                marks = "".join(f" {n[0]}" for n in said) + _wrong(row)
                cells.append(_timed(row, "device_ms", row["device_ratio"], strong=True) + marks)
                cells.append(_timed(row, "ms", row["ratio"], strong=False))
                notes |= dict.fromkeys(said)
            bar = by_mode["fwd"].get("bar")
            other += f", aim {bar:.2f}" if bar else ""
            floors = " / ".join(_over(by_mode[mode]) for mode in ("fwd", "fwd+bwd")).replace(
                "- / -", "-"
            )
            peak = _pair(by_mode["fwd+bwd"], "peak_mb", 0)
            lines.append((f"{name} {gates}".rstrip(), other, *cells, floors, peak))
        for peer in dict.fromkeys(against(r) for r in own if not r.get("bar")):
            means = []
            for mode in ("fwd", "fwd+bwd"):
                some = [r for r in own if r["mode"] == mode and against(r) == peer]
                for key in ("device_ratio", "ratio"):
                    means.append(_number(geometric_mean(r[key] for r in some), 2))
            if set(means) != {"-"}:
                lines.append(("geometric mean", peer, *means, "", ""))
        pages.append(f"{shape}: {SHAPES[shape].text}.\n\n{table(lines)}")
    return "\n\n".join([*pages, *notes])


def _contest_of(row: Row) -> tuple[str, str, str]:
    return row["recurrence"], row.get("gates", ""), against(row)


def _cpu(rows: Sequence[Row]) -> str:
    """Runs of `benchmarks.cpu`: TVM against the fastest formulation in torch."""
    modes = ("forward", "forward+backward")
    heads = (f"{m}: tvm / torch ms, ratio" for m in modes)
    lines: list[tuple[str, ...]] = [("recurrence", "K = V", *heads)]
    for name, size in dict.fromkeys((r["recurrence"], r["D"]) for r in rows):
        cells = []
        for mode in modes:
            found = (r for r in rows if (r["recurrence"], r["D"], r["mode"]) == (name, size, mode))
            row = next(found)
            share = f", {row['of_sgemm']:.0%} of sgemm" if "of_sgemm" in row else ""
            times = " / ".join(f"{round(row[key], 2):g}" for key in ("tvm_ms", "torch_ms"))
            cells.append(f"{times}, **{row['ratio']:.1f}**{share}")
        lines.append((name, str(size), *cells))
    return table(lines)


LANGUAGE = "language.json"


def _language(rows: Sequence[Row]) -> str:
    """Runs of `benchmarks.paper_table`, and the models that it has not trained yet."""
    lines: list[tuple[str, ...]] = [
        (
            *("model", "parameters", "perplexity", "of recalled tokens", "of the others"),
            *("Ktok/s", "peak GiB", "first step s", "trained on"),
        )
    ]
    for row in rows:
        if "perplexity" not in row:
            lines.append((row["model"], "not run yet", *[""] * 7))
            continue
        lines.append(
            (
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                *(f"{row[key]:.2f}" for key in ("perplexity", "recalled", "others")),
                f"{row['tokens_per_s'] / 1e3:.0f}",
                *(f"{row[k]:.1f}" if k in row else "-" for k in ("peak_gib", "first_s")),
                f"{row['machine'].get('device', 'a CPU')}, {row['machine']['date'][:10]}",
            )
        )
    return table(lines)


def _plain(rows: Sequence[Row]) -> str:
    return table([list(rows[0]), *([str(x) for x in r.values()] for r in rows)])


def printer(rows: Sequence[Row]) -> Callable[[Sequence[Row]], str]:
    """The layout that the rows' fields ask for."""
    layouts = {"peer": _contest, "tvm_ms": _cpu, "model": _language}
    return next((made for key, made in layouts.items() if key in rows[0]), _plain)


def regenerated(page: str) -> str:
    """`page` with every table made anew."""

    def block(found: re.Match[str]) -> str:
        result = load(found[2])
        rows = result["rows"]
        return f"{found[1]}{provenance(result)}\n\n{printer(rows)(rows)}\n{found[3]}"

    return _BLOCK.sub(block, page)


def main() -> int:
    """Rewrite the pages; 0."""
    for path in sorted(FOLDER.glob("*.md")):
        path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
