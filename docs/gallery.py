"""Writes docs/gallery/index.md, a page on every recurrence of the library.

`python -m docs.gallery` writes it; a test compares.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import transition_of
from chunkwise.dsl.classify import classify
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.equations import equations
from chunkwise.dsl.explain import operand_rows
from chunkwise.dsl.latex import aligned
from chunkwise.dsl.library import all_declarations
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.report.pictures import source
from chunkwise.runtime.engine import chunk_refusal
from chunkwise.runtime.tuned.artifact import Artifact
from chunkwise.runtime.tuned.selection import SHIPPED, read

from docs.tables import FOLDER as RESULTS
from docs.tables import against, load, table

PAGE = Path(__file__).resolve().parent / "gallery" / "index.md"
_PAPERS = {
    "linear_attention": ("2006.16236", "Transformers are RNNs"),
    "retention": ("2307.08621", "Retentive Network"),
    "lightning_attention": ("2401.04658", "Lightning Attention-2"),
    "mamba2": ("2405.21060", "Transformers are SSMs"),
    "gla": ("2312.06635", "Gated Linear Attention Transformers"),
    "hgrn2": ("2404.07904", "HGRN2"),
    "hgrn": ("2311.04823", "Hierarchically Gated Recurrent Neural Network"),
    "rwkv4": ("2305.13048", "RWKV"),
    "rwkv6": ("2404.05892", "Eagle and Finch"),
    "rwkv7": ("2503.14456", "RWKV-7 Goose"),
    "mlstm": ("2405.04517", "xLSTM"),
    "delta_rule": ("2102.11174", "Linear Transformers Are Secretly Fast Weight Programmers"),
    "gated_delta_rule": ("2412.06464", "Gated Delta Networks"),
    "kda": ("2510.26692", "Kimi Linear"),
    "comba": ("2506.02475", "Comba"),
    "delta_product": ("2502.10297", "DeltaProduct"),
    "gdn2": ("2605.22791", "Gated DeltaNet-2"),
    "oja": ("2206.01649", "Neural Differential Equations for Learning to Program Neural Nets"),
    "longhorn": ("2407.14207", "Longhorn"),
    "mamba3_trapezoid": ("2603.15569", "Mamba-3"),
    "titans": ("2501.00663", "Titans"),
    "ttt": ("2407.04620", "Learning to (Learn at Test Time)"),
    "gsa": ("2409.07146", "Gated Slot Attention"),
    "abc": ("2110.02488", "ABC: Attention with Bounded-memory Control"),
    "residual_linear_attention": (
        "2509.25223",
        "Enhancing Linear Attention with Residual Learning",
    ),
    "preconditioned_delta": ("2604.21100", "Preconditioned DeltaNet"),
    "omega": ("2505.23735", "ATLAS"),
}
_SAME = {
    "linear_attention_normalised": "linear_attention",
    "simple_gla": "mamba2",
    "dplr": "rwkv7",
    "gated_delta_product": "delta_product",
    "delta_rule_normalised": "delta_rule",
    "longhorn_channels": "longhorn",
    "mamba3_mimo": "mamba3_trapezoid",
    "titans_batches": "titans",
    "preconditioned_kda": "preconditioned_delta",
}

_INTRO = """<!-- written by `python -m docs.gallery` -->
# The library

The {count} recurrences that `chunkwise.library` declares, simplest first: equation, class,
declaration, operands, speed. `chunkwise report NAME` writes a page on one of them, with its chunk
form, proof and kernels.

In equations t counts tokens; a bar, or a number above, marks a state between the old and the new
one; ⊙ multiplies entry by entry. Every recurrence has gradients for all operands and the initial
state, packed sequences, grouped heads (Keys may have fewer), initial and final states, and
`step`, one token at a time. The columns: *engines*, all are reference, eager, triton and tvm;
*segments*, whether long sequences with few heads are scanned in segments on a GPU, and what
brings a state past one; *tuned*, the machines of the shipped artifacts.

Speed, [as measured](../measured.md): "×" is the time of flash-linear-attention (on the device),
or of torch, over ours, so that more is better; "tuned" is the time of the shipped configuration,
for so many sequences times heads × tokens.

{matrix}
"""


class Entry(NamedTuple):
    """A recurrence of the page, its normal form, and why it has no chunk form (None: it has)."""

    declared: Declaration
    form: NormalForm
    refused: str | None


def entries() -> list[Entry]:
    """Every recurrence of the library, simplest first."""
    found = []
    for declared in all_declarations():
        form = declared.normal_form(declared.default_micro)
        found.append(Entry(declared, form, chunk_refusal(form)))
    return found


def _matrix(found: list[Entry]) -> str:
    heading = ("recurrence", "engines", "segments", "export", "tuned (K = V)")
    rows = [heading]
    for declared, form, refused in found:
        name = f"[{declared.name}](#{declared.name})"
        if refused is not None:
            rows.append((name, "reference", "no", "no", "-"))
            continue
        transition = transition_of(form, Dims(128, 128))
        segments = "no" if transition is None else f"yes, {transition.value}"
        machines: dict[str, list[str]] = {}
        for a in _shipped(form):
            machines.setdefault(_device(a), []).append(str(a.key.dims.K))
        tuned = "; ".join(f"{m}: {', '.join(sizes)}" for m, sizes in machines.items())
        rows.append((name, "all", segments, "yes", tuned or "-"))
    return table(rows)


def _shipped(form: NormalForm) -> list[Artifact]:
    found = [read(path) for path in sorted((SHIPPED / form.digest).glob("*.json"))]
    return sorted(found, key=lambda a: (a.key.engine.value, str(a.key.machine), a.key.dims.K))


def _device(artifact: Artifact) -> str:
    words = artifact.key.machine.model.replace("NVIDIA ", "").replace("(R)", "").split()
    return " ".join(words[:2] if artifact.key.machine.kind == "cpu" else words[:1])


def _speed(name: str, form: NormalForm) -> Iterator[tuple[str, ...]]:
    """Rows on the measured speed, from docs/results/ and from the shipped artifacts."""
    for path in sorted(RESULTS.glob("*.json")):
        result = load(path.name)
        machine = result["machine"]
        device = re.split(r" 80GB|,| \(", machine["device"])[0].removeprefix("NVIDIA ")
        device += f", {machine['date'][:10]}"  # of which the code is, too
        cells: dict[tuple[str, str], list[str]] = {}
        for row in (r for r in result["rows"] if r.get("recurrence") == name):
            if "peer" in row:
                if row["device_ratio"] is None or row.get("bar"):
                    continue
                call = f"shape {row['shape']} {row.get('gates', '')}".rstrip()
                key, ratio = (call, against(row)), row["device_ratio"]
            else:
                key, ratio = (f"K = V = {row['D']}, 8 × 2048", "torch"), row["ratio"]
            cells.setdefault(key, []).append(f"{round(ratio, 2):g} ×" if ratio else "-")
        yield from ((device, call, other, *ratios) for (call, other), ratios in cells.items())
    for a in _shipped(form):
        for t in a.tuned:
            call = f"K = V = {a.key.dims.K}, {t.bucket.rows} × {t.bucket.tokens}, {a.key.dtype}"
            yield _device(a), call, "tuned", "", f"{t.time_us / 1e3:,.2f} ms"


def _section(entry: Entry) -> str:
    declared, form, refused = entry
    micro = declared.default_micro
    name = declared.name
    parts = [f"## {name}", declared.doc]
    paper = _PAPERS.get(_SAME.get(name, name))
    if paper is not None:
        parts.append(f"Paper: [{paper[1]}](https://arxiv.org/abs/{paper[0]}).")
    two = " Two micro-steps are shown." if declared.has_micro else ""
    parts += [
        f"$$\n{aligned(equations(declared.step(micro)))}\n$$",
        f"Class: {classify(form)}.{two}",
    ]
    if refused is not None:
        parts.append(f"Only the reference engine runs it: {refused}.")
    file = Path(inspect.getfile(declared.function)).name
    parts.append(
        f"<!-- not run: the declaration in dsl/{file}, which tests run -->\n"
        f"```python\n{source(declared)}\n```"
    )
    parts.append(table([("operand", "kind", "shape"), *operand_rows(form)]))
    speed = list(_speed(name, form))
    if speed:
        parts.append(table([("device", "call", "", "forward", "with backward"), *speed]))
    return "\n\n".join(parts)


def page() -> str:
    """The page."""
    found = entries()
    intro = _INTRO.format(count=len(found), matrix=_matrix(found))
    return intro + "\n" + "\n\n".join(map(_section, found)) + "\n"


def main() -> int:
    """Write the page; 0."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
