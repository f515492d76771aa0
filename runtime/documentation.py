"""What `help`, a notebook and an editor show of one recurrence: its operands, not just `*args`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from ..dsl.classify import classify
from ..dsl.equations import equations
from ..dsl.ir import Kind, Op, Per, bounds_of, topological
from ..dsl.latex import aligned, mathml
from ..dsl.normal_form import Operand, StateDecl, expressions
from ..dsl.step import output_names
from ..dsl.turns import log_decays

if TYPE_CHECKING:
    from ..dsl.declaration import Declaration

_SIZES = """B sequences of T tokens, H key heads, HV value heads (a multiple of H), K and V
channels of a head, n micro-steps; N is B, or the number of sequences that `cu_seqlens` packs."""
_NO_FORM = "not affine in its state: the reference engine runs it, token by token"


@dataclass(frozen=True, slots=True)
class Annotation:
    """An annotation of a signature, shown as written: `Key[B,T,H,K]`."""

    text: str

    def __repr__(self) -> str:
        return self.text


def shape(x: Operand, *, time: bool = True) -> str:
    """The shape of an operand's tensor: `[B,T,H,K]`; of one token, `[B,H,K]`, without `time`."""
    return "[" + ",".join(a for a in x.axes if time or a != "T") + "]"


def state_shape(state: StateDecl) -> str:
    """The shape of a state's tensor: `[N,HV,K,V]`, or `[N,HV,K]`."""
    return "[" + ",".join(state.axes) + "]"


def class_of(declaration: Declaration) -> str:
    """The class of a recurrence in words, as `explain` prints it."""
    if declaration.any_step:
        return _NO_FORM
    return str(classify(declaration.normal_form(declaration.default_micro)))


def short(declaration: Declaration) -> str:
    """A recurrence in one line: its name, its operands with their kinds, its class."""
    operands = [f"{x.name}: {x.spelled}" for x in declaration.operands]
    numbers = [*(p.name for p in declaration.params), *declaration.statics]
    listed = ", ".join([*operands, *(["*", *numbers] if numbers else [])])
    return f"<recurrence {declaration.name}({listed}): {class_of(declaration)}>"


def signature(
    declaration: Declaration, options: tuple[inspect.Parameter, ...], *, time: bool = True
) -> inspect.Signature:
    """The signature of a call, or of a step (without `time`), with kinds and shapes."""
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            x.name,
            either,
            annotation=Annotation(replace(x, micro=False).spelled + shape(x, time=time)),
        )
        for x in declaration.operands
    ]
    for p in declaration.params:
        default = inspect.Parameter.empty if p.default is None else p.default
        parameters.append(inspect.Parameter(p.name, keyword, default=default, annotation=float))
    for name, constant in declaration.statics.items():
        kind = type(constant)
        parameters.append(inspect.Parameter(name, keyword, default=constant, annotation=kind))
    state = "final_state" if time else "state"
    returned = Annotation(f"({_output(declaration, time)}, {state})")
    return inspect.Signature([*parameters, *options], return_annotation=returned)


def docstring(declaration: Declaration, of: Callable[..., object], *, time: bool = True) -> str:
    """The docstring of a call or a step: the user's own, every operand, and what `of` says.

    `of` is the method of all recurrences, whose docstring says what its options, results and errors
    are.
    """
    general = inspect.getdoc(of) or ""
    option = "initial_state" if time else "state"
    _, _, rest = general.partition(f"    {option}:")
    notes = _notes(declaration)
    rows = [f"{_row(x, time)}{notes.get(x.name, '')}" for x in declaration.operands]
    for p in declaration.params:
        default = "required" if p.default is None else f"{p.default:g} by default"
        rows.append(f"{p.name} (float): a run-time number without a gradient, {default}")
    for name, constant in declaration.statics.items():
        kind = type(constant).__name__
        rows.append(f"{name} ({kind}): fixed when the step is traced, {constant} by default")
    states = ", ".join(f"{s.name} `{state_shape(s)}`" for s in declaration.states)
    return "\n".join(
        [
            declaration.doc or f"The recurrence {declaration.name}.",
            "",
            f"Class: {class_of(declaration)}. State: {states}.",
            "",
            f"Sizes: {_SIZES}",
            "",
            "Args:",
            *(f"    {row}." for row in rows),
            f"    {option}:{rest}",
        ]
    )


def html(declaration: Declaration) -> str:
    """A recurrence for a notebook: its equations as MathML, its operands, its class."""
    step = declaration.step(declaration.default_micro)
    typeset = mathml(aligned(equations(step)))
    notes = _notes(declaration)
    rows = [(x.name, x.spelled, shape(x), notes.get(x.name, "")) for x in declaration.operands]
    for p in declaration.params:
        default = "" if p.default is None else f"; {p.default:g} by default"
        rows.append((p.name, "float", "", default))
    rows += [(n, type(c).__name__, "", f"; {c} by default") for n, c in declaration.statics.items()]
    rows += [(s.name, s.kind.spelled, state_shape(s), "; carried") for s in declaration.states]
    cells = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    said, *_ = (declaration.doc or "A recurrence.").splitlines()
    return (
        f"<div><p><b>{escape(declaration.name)}</b>: {escape(said)}</p>{typeset}"
        f"<table>{cells}</table><p>{escape(class_of(declaration))}</p></div>"
    )


def _cell(text: str) -> str:
    return f'<td style="text-align: left">{escape(text.removeprefix("; "))}</td>'


def documented(
    method: Callable[..., Any], signature: inspect.Signature, doc: str
) -> types.FunctionType:
    """A copy of a method with a signature and a docstring of its own; it runs the same code."""
    assert isinstance(method, types.FunctionType)
    copy = types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__
    )
    copy.__kwdefaults__, copy.__annotations__ = method.__kwdefaults__, {}
    copy.__qualname__, copy.__module__, copy.__doc__ = method.__qualname__, method.__module__, doc
    # an operand may be called self
    own = "self" if "self" not in signature.parameters else "self_"
    first = inspect.Parameter(own, inspect.Parameter.POSITIONAL_ONLY)
    parameters = [first, *signature.parameters.values()]
    copy.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return copy


def _row(x: Operand, time: bool) -> str:
    grouped = x.kind is Kind.KEY and x.per is Per.TOKEN
    either = f", or `{shape(x, time=time).replace('H,', 'HV,')}`" if grouped else ""
    return f"{x.name} ({x.spelled}): `{shape(x, time=time)}`{either}"


def _notes(declaration: Declaration) -> dict[str, str]:
    """What operands must hold, by name: log-decays, and those with promised bounds."""
    if declaration.any_step:
        return {}
    form = declaration.normal_form(declaration.default_micro)
    decayed: dict[str, dict[str, None]] = {}
    for state, log_decay in log_decays(form):
        if log_decay.op is Op.OPERAND:
            decayed.setdefault(str(log_decay.attrs[0]), {})[state] = None
    notes = {n: f"; the log-decay of {' and '.join(s)}, at most 0" for n, s in decayed.items()}
    for node in topological(*expressions(form), *form.outputs):
        if node.op is Op.WITHIN and node.args[0].op is Op.OPERAND:
            low, high = bounds_of(node)
            notes[str(node.args[0].attrs[0])] = f"; promised to lie in [{low}, {high}]"
    return notes


def _output(declaration: Declaration, time: bool) -> str:
    kinds = [n.kind for n in declaration.step(declaration.default_micro).outputs]
    shapes = [",".join(["B", *(["T"] if time else []), "HV", *k.axes]) for k in kinds]
    names = output_names(len(kinds))
    named = ", ".join(f"{name}[{shape}]" for name, shape in zip(names, shapes, strict=True))
    return named if len(kinds) == 1 else f"({named})"
