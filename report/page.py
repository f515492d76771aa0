"""The report on a recurrence: one page of HTML that needs no network, light or dark, printable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..codegen.programs import chunk_program
from ..codegen.text.mathematics import chunk_equations
from ..dsl.classify import classify
from ..dsl.declaration import Declaration
from ..dsl.equations import as_step, equations
from ..dsl.explain import operand_rows, print_form
from ..dsl.latex import Equation, aligned, mathml
from ..dsl.normal_form import NormalForm
from .drawing import Bar, bars
from .facts import Agreement, Speed
from .pictures import PlanCosts, kernels_picture, source

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #59636e; --rule: #d1d9e0;
  --code: #f6f8fa; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1;
  --rule: #3d444d; --code: #151b23; --good: #3fb950; --bad: #f85149; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; border-bottom: 1px solid var(--rule);
  padding-bottom: .2rem; }
p { margin: .5rem 0; } .faint { color: var(--faint); } a { color: inherit; }
nav { margin: 1rem 0 0; } nav a { margin-right: 1rem; }
pre { background: var(--code); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
pre, code { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
.equations { overflow-x: auto; padding: .3rem 0; }
.equations math[display=block] { font-size: 1.15rem; width: fit-content; margin: 0; }
.equations mtd { padding: .25em .2em; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.scroll svg { min-width: 34rem; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 600; }
td:first-child { min-width: 8rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
@page { margin: 12mm; }
@media print { :root { --ink: #000; --paper: #fff; --faint: #444; --rule: #bbb; --code: #f6f6f6;
  font-size: 11px; } body { padding: 0; max-width: none; font-size: 11px; } nav { display: none; }
  h2 { break-after: avoid; } svg, tr, pre, .equations { break-inside: avoid; }
  pre { white-space: pre-wrap; font-size: 10px; } .scroll { overflow: visible; }
  td:first-child { min-width: 0; } .number { white-space: normal; } }
"""

_VERDICTS = {"right": "good", "WRONG": "bad"}
# a number or two, perhaps with a unit; a dash where there is none
_NUMBER = re.compile(r"-|[\d.,e+-]+( KiB)?|[\d,]+( ×|,) [\d,]+")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its heading, and its body as HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """Where links within the page find it."""
        return self.title.lower().replace(" ", "-")


def page(declared: Declaration, sections: Sequence[Section], made: str) -> str:
    """The whole page; `made` says with which versions, where and when."""
    form = None if declared.any_step else declared.normal_form(declared.default_micro)
    lines = declared.doc.splitlines()
    about = f"<p>{escape(' '.join(lines))}</p>" if lines else ""
    if form is not None:
        about += f"<p><strong>Class:</strong> {escape(str(classify(form)))}</p>"
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "\n".join(f'<h2 id="{s.anchor}">{escape(s.title)}</h2>\n{s.body}' for s in sections)
    name = escape(declared.name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · chunkwise</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
{about}
<nav>{links}</nav>
{body}
<p class="faint">{escape(made)}</p>
</body>
</html>
"""


# ---- sections ------------------------------------------------------------------------------------


def step_section(declared: Declaration) -> Section:
    """The declared step as an equation, as it was written, and its operands with shapes."""
    step = declared.step(declared.default_micro)
    parts = [_equations(equations(step)), f"<pre>{escape(source(declared))}</pre>"]
    rows = [("operand", "kind", "shape"), *operand_rows(step)]
    return Section("Declared step", "\n".join([*parts, table(rows)]))


def form_section(form: NormalForm) -> Section:
    """The normal form as the step that it describes, and as the compiler reads it."""
    text = f"<pre>{escape(print_form(form))}</pre>"
    return Section("Normal form", _equations(equations(as_step(form))) + text)


def chunk_section(form: NormalForm) -> Section:
    """The equations of one chunk. Raises NotLowered where there are none."""
    note = (
        '<p class="faint">i and j run over the tokens of a chunk, k and v over channels; a bracket '
        "is 1 where its condition holds and 0 elsewhere; <em>next</em> is the state after the "
        "chunk.</p>"
    )
    return Section("Chunk form", _equations(chunk_equations(chunk_program(form))) + note)


def plan_section(name: str, costs: PlanCosts) -> Section:
    """The kernels by default, drawn and with what each stores."""
    rows = [("kernel", "runs", "stores", "bytes", "FLOPs")]
    for k in costs.kernels:
        stored = ", ".join(buffer.label for buffer, _ in k.kernel.stores)
        label = f"{k.direction} {k.name}"
        rows.append((label, k.kernel.loop.value, stored, f"{k.bytes:,.0f}", f"{k.flops:,.0f}"))
    floors = ", ".join(f"{n} {x:,.0f}" for n, x in costs.compulsory.items())
    config = costs.config
    plans = f"Plans: forward {config.forward.label}; backward {config.backward.label}. "
    note = plans + f"Bytes that any plan has to move, per token and value head: {floors}."
    picture = f'<div class="scroll">{kernels_picture(name, costs)}</div>'
    return Section("Plan", f"{picture}{table(rows)}<p>{escape(note)}</p>")


def agreement_section(found: Sequence[Agreement], limits: str) -> Section:
    """Errors of each engine against the token loop in float64, drawn and as a table."""
    rows = [("result", "engine", "relative RMS error", "allowed", "")]
    drawn = []
    for a in found:
        for result, e in a.errors:
            verdict = "right" if e.rms <= e.limit else "WRONG"
            rows.append((result, a.engine.value, f"{e.rms:.1e}", f"{e.limit:.1e}", verdict))
        if a.errors:
            result, e = max(a.errors, key=lambda x: x[1].rms / x[1].limit)
            label = f"{a.engine.value} on {a.device}: {result}"
            drawn.append(Bar(label, (e.rms,), (f"{e.rms:.1e} of {e.limit:.0e}",), e.limit))
    left_out = [f"{a.engine.value}: {a.left_out}" for a in found if a.left_out]
    notes = "".join(f"<p class='faint'>{escape(text)}</p>" for text in [limits, *left_out])
    picture = bars("the worst error of each engine, and what is allowed", drawn, logarithmic=True)
    chart = f'<div class="scroll">{picture}</div>' if drawn else ""
    return Section("Agreement of engines", chart + (table(rows) if drawn else "") + notes)


def speed_section(found: Sequence[Speed], sizes: str) -> Section:
    """Times here, drawn."""
    drawn = [
        Bar(
            f"{s.engine.value} on {s.device}",
            (s.forward.median, s.both.median),
            tuple(f"{t.median / 1e3:,.2f} ms" for t in (s.forward, s.both)),
        )
        for s in found
    ]
    picture = bars(f"medians, {sizes}", drawn, ("forward", "forward and backward"))
    note = f"Medians of {found[0].forward.samples} runs, in turns, on this machine as it was."
    return Section("Speed here", f'<div class="scroll">{picture}</div><p class="faint">{note}</p>')


def proof_section(proof: str, seconds: float) -> Section:
    """What was shown, on which sizes."""
    return Section("Proof", f"<pre>{escape(proof)}\nin {seconds:.1f} s</pre>")


def table_section(title: str, rows: Sequence[Sequence[str]], note: str = "") -> Section:
    """A table whose first row is its heading, and a note; the note alone if there are no rows."""
    faint = f'<p class="faint">{escape(note)}</p>' if note else ""
    return Section(title, (table(rows) if len(rows) > 1 else "") + faint)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table; the first is the heading, columns of numbers are flush right."""
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(rows[0])
    styles = ["number" if all(map(_NUMBER.fullmatch, column)) else "" for column in columns]
    lines = [_row("th", rows[0], styles), *(_row("td", row, styles) for row in rows[1:])]
    return f'<div class="scroll"><table>\n{"".join(lines)}</table></div>'


def _row(tag: str, row: Sequence[str], styles: Sequence[str]) -> str:
    cells = ""
    for text, style in zip(row, styles, strict=True):
        style = _VERDICTS.get(text, style)
        attribute = f' class="{style}"' if style else ""
        cells += f"<{tag}{attribute}>{escape(text)}</{tag}>"
    return f"<tr>{cells}</tr>\n"


def _equations(rows: Sequence[Equation]) -> str:
    return f'<div class="equations">{mathml(aligned(rows))}</div>'
