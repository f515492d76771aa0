"""A declaration as the compiler understood it, as text: StepIR, normal form, class, gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import algebra
from .classify import DecayClass, classify, decay_class
from .decay import SMALLEST
from .ir import Kind, Node, Op, topological
from .normal_form import Correction, NormalForm, Phase, Update, Write, expressions, results_of
from .notation import Level
from .printing import definition, infix, naming, printed
from .step import Step, output_names
from .turns import planes_of

if TYPE_CHECKING:
    from .declaration import Declaration

Names = Mapping[Node, str]
_WHEN = {
    Phase.BEFORE: "before the decay",
    Phase.DECAYED: "after the decay, before the writes",
    Phase.AFTER: "after the update",
}


def print_step(step: Step) -> str:
    """StepIR, one node a line, with the user's line beside it."""
    states = ", ".join(f"{s.name}[{','.join(s.kind.axes)}]" for s in step.states)
    operands = ", ".join(
        f"{o.name}{f'({step.micro})' if o.micro else ''}[{','.join(o.kind.axes)}]"
        for o in step.operands
    )
    params = "".join(f", {p.name}" for p in step.params)
    lines = [f"step {step.name}({states}; {operands}{params})"]
    names: dict[Node, str] = {}
    ends = {n: f"→ {s.name}" for s, n in zip(step.states, step.next_states, strict=True)}
    for name, n in zip(output_names(len(step.outputs)), step.outputs, strict=True):
        ends[n] = f"→ {name}" if n not in ends else f"{ends[n]}, {name}"
    for node in topological(*step.roots):
        if not node.args:
            continue
        names_of_args = {a: names[a] for a in node.args if a in names}
        text = _line(node, names_of_args)
        names[node] = f"%{len(names) + 1}"
        kind = ends.get(node, f": {'×'.join(node.kind.axes) or '1'}")
        where = "" if node.loc is None else f"{node.loc.file.rpartition('/')[2]}:{node.loc.line}"
        lines.append(f"  {names[node]:>3} = {text:<30} {kind:<8} {where}".rstrip())
    return "\n".join(lines)


def _line(node: Node, names: dict[Node, str]) -> str:
    args = [names.get(a) or infix(a) for a in node.args]
    if node.op is Op.SCALE:
        return f"scale {args[0]} by {args[1]}"
    if node.op in (Op.READ, Op.READ_VALUE):
        return f"{args[0]} @ {args[1]}"
    if node.op is Op.WITHIN:
        return f"{args[0]} within [{node.attrs[0]}, {node.attrs[1]}]"
    if node.op in (Op.ADD, Op.SUB, Op.MUL, Op.DIV):
        return infix(node, names)
    return f"{node.op.name.lower()} {', '.join(args)}"


def equations(step: Step) -> list[str]:
    """The step as equations, `S = exp(g)*S + outer(k, v)` and `o = q @ S`, one a line.

    On the right of a state's equation are the states of the token before.
    """
    states = [(n, s.name) for s, n in zip(step.states, step.next_states, strict=True)]
    parts = naming(*step.roots)
    lines = [f"{name} = {definition(n, parts)}" for n, name in parts.items()]
    lines += [f"{name} = {definition(n, parts)}" for n, name in states]
    outputs = zip(output_names(len(step.outputs)), step.outputs, strict=True)
    return [*lines, *(f"{name} = {infix(n, parts | dict(states))}" for name, n in outputs)]


def print_form(form: NormalForm) -> str:
    """The normal form, one decay, write or read a line, and the class it falls in."""
    roots = [*expressions(form), *form.outputs]
    names = naming(*roots, taken=[s.name for s in form.states])
    lines = [_row("part", f"{name} = {definition(n, names)}") for n, name in names.items()]
    for index, micro in enumerate(form.micro_steps):
        if len(form.micro_steps) > 1:
            lines.append(f"micro-step {index}")
        for update in micro.updates:
            lines += _update_lines(form, update, names)
    for n, read in enumerate(form.reads):
        text = (
            f"{read.state} {infix(read.key, names)}" if read.other_axis else infix(read.key, names)
        )
        of = f" of {read.state}" if len(form.states) > 1 else ""
        at = f" {read.micro_step}" if len(form.micro_steps) > 1 else ""
        lines.append(_row(f"read{at}", text, f"r{n}{of}, {_WHEN[read.phase]}"))
    for output in form.outputs:
        if len(form.outputs) > 1 or output.op is not Op.RESULT:
            lines.append(_row("output", infix(output, names)))
    lines.append(_row("class", str(classify(form))))
    return "\n".join(lines)


def _row(label: str, text: str, note: str = "") -> str:
    return f"{label:<8}{text:<32}  {note}".rstrip()


def _update_lines(form: NormalForm, update: Update, names: Names) -> list[str]:
    many = len(form.states) > 1
    of = f" of {update.state}" if many else ""
    lines = []
    itself = [m for m in update.mixes if m.state == update.state]  # in place of a decay
    if update.log_decay is not None and not itself:
        what = decay_class(form, update.log_decay)
        text = f"e^({infix(update.log_decay, names)})" if update.log_decay.args else ""
        text = text or f"e^{infix(update.log_decay, names)}"
        per = " per token" if what is DecayClass.SCALAR else ""
        lines.append(_row("decay", text, f"{what.value}{of}{per}, {_bound(update)}"))
    if update.columns is not None:
        what = decay_class(form, update.columns)
        lines.append(
            _row("decay", f"e^({infix(update.columns, names)})", f"{what.value}{of}, columns")
        )
    for mix in update.mixes:
        label = "factor" if mix in itself else "mix"
        lines.append(
            _row(label, f"{infix(mix.factor, names)} · {mix.state}", f"into {update.state}")
        )
    for write in update.writes:
        lines.append(
            _row(
                "write",
                _write(update, write, names, form.transposed),
                _write_note(update, write, many),
            )
        )
    if not lines:
        lines.append(_row("keep", update.state))
    return lines


def _write(update: Update, write: Write, names: Names, transposed: bool) -> str:
    key = printed(write.key, names).after(Level.QUOTIENT)
    value = _written(update, write, names)
    return f"{value} ⊗ {key}" if transposed else f"{key} ⊗ {value}"


def _written(update: Update, write: Write, names: Names) -> str:
    if write.correction is None:
        return infix(write.value, names) if write.value is not None else "0"
    recall = _recall(update, write.correction, write.key.kind, names)
    scale = write.correction.scale
    if write.value is None:
        factor = _factor(scale, names)
        return f"{factor}({recall})"
    positive = scale.args[0] if scale.op is Op.NEG else None
    if positive is not None and write.value.op is Op.MUL and write.value.args[0] == positive:
        return f"{infix(positive, names)}·({infix(write.value.args[1], names)} − {recall})"
    if algebra.number(scale) == -1.0:
        return f"({infix(write.value, names)} − {recall})"
    if positive is not None:
        return f"({infix(write.value, names)} − {_factor(positive, names)}({recall}))"
    return f"({infix(write.value, names)} + {_factor(scale, names)}({recall}))"


def _factor(scale: Node, names: Names) -> str:
    value = algebra.number(scale)
    if value == 1.0:
        return ""
    if value == -1.0:
        return "−"
    return f"{printed(scale, names).at(Level.QUOTIENT)}·"


def _recall(update: Update, correction: Correction, kind: Kind, names: Names) -> str:
    decayed = correction.decayed and update.log_decay is not None
    state = correction.state + ("'" if decayed else "")
    key = infix(correction.key, names)
    key = f"({key})" if correction.key.args else key
    return f"{state}{key}" if kind is Kind.VALUE else f"{key}ᵀ{state}"


def _write_note(update: Update, write: Write, many: bool) -> str:
    to = f"to {update.state}" if many else ""
    correction = write.correction
    if correction is None:
        return to
    same = correction.key == write.key and correction.decayed and correction.state == update.state
    reads = "decayed" if correction.decayed else "undecayed"
    parts = [to] if to else []
    parts += ["symmetric"] if same else []
    parts += [f"reads the {reads} state"] if update.log_decay is not None else []
    return ", ".join(parts)


def _bound(update: Update) -> str:
    lo, hi = update.bound.lo, update.bound.hi
    if math.isinf(lo) and hi > 0:
        return "bound unknown"
    return f"log-decay in [{_number(lo)}, {_number(min(hi, 0.0))}]"


def _number(x: float) -> str:
    return "-inf" if x == -math.inf else f"{x:.4g}"


def explain(what: Declaration | NormalForm) -> str:
    """A page on a recurrence: its step, normal form, class, operands with shapes, gates, notes."""
    if isinstance(what, NormalForm):
        return "\n".join([what.name, "", _operands(what), "", print_form(what), *_notes(what)])
    micro = what.default_micro
    head = [what.name, *(what.doc.splitlines() if what.doc else [])]
    step = print_step(what.step(micro))
    if what.any_step:
        tail = ["not normalised: only the reference engine runs it, token by token"]
        return "\n".join([*head, "", step, "", *tail])
    form = what.normal_form(micro)
    body = [_operands(form), "", step, "", print_form(form), *_notes(form)]
    return "\n".join([*head, "", *body])


def operand_rows(declared: NormalForm | Step) -> list[tuple[str, str, str]]:
    """Name, kind and shape of every operand, run-time float and state."""
    rows = []
    for o in declared.operands:
        rows.append((o.name, o.spelled, f"[{','.join(o.axes)}]"))
    for p in declared.params:
        default = "required" if p.default is None else f"default {p.default:g}"
        rows.append((p.name, "float", default))
    for s in declared.states:
        rows.append((s.name, s.kind.spelled, f"[{','.join(s.axes)}] float32"))
    return rows


def _operands(form: NormalForm) -> str:
    rows = operand_rows(form)
    width = max(len(r[0]) for r in rows)
    return "\n".join(f"  {n:<{width}}  {k:<18} {s}" for n, k, s in rows)


def _notes(form: NormalForm) -> list[str]:
    """Consequences of the declaration that would surprise a reader."""
    notes: list[str] = []
    for micro in form.micro_steps:
        for u in micro.updates:
            if u.log_decay is None:
                continue
            if u.bound.hi > 0:
                checked = "" if results_of(u.log_decay) else " (checked under CHUNKWISE_CHECK)"
                exact = ", and is summed exactly within a chunk, not factorised"
                notes.append(
                    f"the log-decay {infix(u.log_decay)} of {u.state} has no bound in the "
                    f"declaration: it must be ≤ 0{checked}"
                    + ("" if u.log_decay.kind is Kind.SCALAR else exact)
                )
            if any(algebra.number(n) == SMALLEST for n in topological(u.log_decay)):
                notes.append(
                    f"the multiplier of {u.state} becomes log(max(f, 2^-126)): at f = 0 the state "
                    "is scaled by 2^-126 instead of forgotten exactly"
                )
    for plane in planes_of(form):
        names = " and ".join(plane.states)
        turn = "angle" if any(a is not None for a in plane.angles) else "sign"
        notes.append(f"{names}: a chunk takes the {turn} of the factor out of the state, into keys")
    if form.transposed:
        notes.append("columns decay or are read: the state is handled transposed, V×K")
    promises = {n for n in topological(*form.outputs, *expressions(form)) if n.op is Op.WITHIN}
    for n in sorted(promises, key=infix):
        notes.append(f"{infix(n)} is a promise: checked under CHUNKWISE_CHECK, trusted otherwise")
    unique = list(dict.fromkeys(notes))
    return ["", *(f"note    {n}" for n in unique)] if unique else []
