"""Pass: a Python function to StepIR, by calling it once with symbols."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import errors
from . import step as step_ir
from .ir import Loc, Node, Op, topological
from .kinds import annotations_of, kind_annotation
from .normal_form import Operand, Param, StateDecl
from .source import definition, last_return, raised_in
from .step import Step
from .traced import Traced


@dataclass(frozen=True, slots=True)
class StepSignature:
    """The parameters of a step, by kind. `statics`: int and bool keywords with their defaults."""

    operands: tuple[Operand, ...]
    params: tuple[Param, ...]
    states: tuple[StateDecl, ...]
    statics: tuple[tuple[str, int | bool], ...]
    keyword_only: frozenset[str]


def read_signature(function: Callable[..., object]) -> StepSignature:
    """The declared operands, states and numbers, in order.

    Raises MissingAnnotation, BadAnnotation, NoState.
    """
    loc = where(function)
    try:
        hints = annotations_of(function)
    except NameError as error:
        raise errors.BadAnnotation(
            getattr(error, "name", "?"), "an unknown name", str(error), loc
        ) from error
    operands: list[Operand] = []
    params: list[Param] = []
    states: list[StateDecl] = []
    statics: list[tuple[str, int | bool]] = []
    keyword_only: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        loc = where(function, name)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise errors.BadAnnotation(
                name, "a variable argument", "a step names its operands", loc
            )
        if name not in hints:
            raise errors.MissingAnnotation(name, loc, function.__name__)
        hint, default = hints[name], parameter.default
        if parameter.kind is parameter.KEYWORD_ONLY:
            keyword_only.add(name)
        annotation = kind_annotation(hint)
        if annotation is not None:
            if default is not parameter.empty:
                why = f"operands are tensors of each call; a number is `*, {name}: float = 1.0`"
                raise errors.BadAnnotation(name, f"{annotation.name} with a default", why, loc)
            if annotation.kind.is_state:
                states.append(StateDecl(name, annotation.kind))
            else:
                operands.append(Operand(name, annotation.kind, annotation.per, annotation.micro))
        elif hint in (float, int, bool):
            if parameter.kind is not parameter.KEYWORD_ONLY:
                raise errors.BadAnnotation(
                    name, "a number", "numbers are keyword-only: put a `*` before them", loc
                )
            missing = default is parameter.empty
            if hint is float:
                params.append(Param(name, None if missing else float(default)))
            else:
                if missing:
                    raise errors.BadAnnotation(
                        name, "a static number without a default", "the step is traced at once", loc
                    )
                statics.append((name, default))
        else:
            raise errors.BadAnnotation(name, _spelled(hint), "", loc)
    if not states:
        raise errors.NoState(function.__name__, where(function))
    return StepSignature(
        tuple(operands), tuple(params), tuple(states), tuple(statics), frozenset(keyword_only)
    )


def trace(
    function: Callable[..., object],
    micro: int = 1,
    static: Mapping[str, int | bool] | None = None,
) -> Step:
    """Trace `function`, with tuples of length `micro`, and `static` overriding int/bool keywords.

    Raises DeclarationError: see the catalogue in `errors`.
    """
    signature = read_signature(function)
    symbols: dict[str, object] = {}
    for state in signature.states:
        symbols[state.name] = Traced(step_ir.state_leaf(state))
    for operand in signature.operands:
        symbols[operand.name] = (
            tuple(Traced(step_ir.operand_leaf(operand, i)) for i in range(micro))
            if operand.micro
            else Traced(step_ir.operand_leaf(operand))
        )
    for param in signature.params:
        symbols[param.name] = Traced(step_ir.param_leaf(param))
    for name, default in signature.statics:
        symbols[name] = (static or {}).get(name, default)
    positional = [
        symbols[n]
        for n in inspect.signature(function).parameters
        if n not in signature.keyword_only
    ]
    keywords = {n: symbols[n] for n in signature.keyword_only}
    try:
        result = function(*positional, **keywords)
    except NameError as error:
        loc = raised_in(error, function.__code__) if inspect.isfunction(function) else None
        if loc is None or isinstance(error, errors.ChunkwiseError):
            raise
        raise errors.UnknownName(str(error.name), loc) from None
    next_states, outputs = _unpack(result, function, signature)
    step = Step(
        function.__name__,
        signature.operands,
        signature.params,
        signature.states,
        next_states,
        outputs,
        micro if any(o.micro for o in signature.operands) else 1,
    )
    given = static or {}
    usual = all(given.get(name, default) == default for name, default in signature.statics)
    _check_use(step, function, every=usual)
    return step


def where(function: Callable[..., object], parameter: str = "") -> Loc | None:
    """Where a function is declared, or where it names one of its parameters."""
    code = getattr(function, "__code__", None)
    return definition(code, parameter) if isinstance(code, types.CodeType) else None


def _return_line(function: Callable[..., object]) -> Loc | None:
    code = getattr(function, "__code__", None)
    return last_return(code) if isinstance(code, types.CodeType) else None


def _unpack(
    result: object, function: Callable[..., object], signature: StepSignature
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    loc = _return_line(function)
    states = signature.states
    wanted = " and ".join(f"a {s.kind.spelled} ({s.name})" for s in states)
    if len(states) > 1:
        wanted = f"a tuple of {wanted}"
    expected = f"{wanted}, then the output"
    if result is None:
        raise errors.NothingReturned(function.__name__, loc)
    if not (isinstance(result, tuple) and len(result) == 2):
        if isinstance(result, tuple) and len(result) == len(states) + 1 > 2:
            raise errors.BadReturn("the states one by one", expected, loc)
        raise errors.BadReturn(_describe(result), expected, loc)
    new, output = result
    if _is_state(output, states) and not _is_state(new, states):
        raise errors.ReturnOrder(loc)
    new = new if isinstance(new, tuple) else (new,)
    if not _is_state(new, states):
        raise errors.BadReturn(_describe(result), expected, loc)
    outputs = output if isinstance(output, tuple) else (output,)
    found = [x.node for x in outputs if isinstance(x, Traced) and not x.kind.is_state]
    if not found or len(found) < len(outputs):
        raise errors.BadReturn(_describe(result), expected, loc)
    return tuple(s.node for s in new), tuple(found)


def _is_state(x: object, states: tuple[StateDecl, ...]) -> bool:
    parts = x if isinstance(x, tuple) else (x,)
    return len(parts) == len(states) and all(
        isinstance(p, Traced) and p.kind is s.kind for p, s in zip(parts, states, strict=True)
    )


def _describe(x: object) -> str:
    if isinstance(x, Traced):
        return f"a {x.kind.spelled}"
    if isinstance(x, tuple):
        return "(" + ", ".join(_describe(y) for y in x) + ")"
    return f"a {type(x).__name__}"


def _check_use(step: Step, function: Callable[..., object], *, every: bool) -> None:
    """States change; with `every`, all else is used (a branch of a static keyword may not)."""
    for state, node in zip(step.states, step.next_states, strict=True):
        if node == step_ir.state_leaf(state):
            raise errors.StateUnchanged(state.name, _return_line(function))
    if not every:
        return
    leaves = {n.attrs[0] for n in topological(*step.roots) if n.op in (Op.OPERAND, Op.PARAM)}
    for name in [o.name for o in step.operands] + [p.name for p in step.params]:
        if name not in leaves:
            raise errors.UnusedOperand(name, where(function, name))


def _spelled(hint: object) -> str:
    return getattr(hint, "__name__", None) or str(hint)
