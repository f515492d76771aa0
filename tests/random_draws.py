"""One random call of a random recurrence on an engine, against the float64 token loop."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from chunkwise.autotune.tolerance import relative_errors
from chunkwise.dsl import errors, oracle
from chunkwise.dsl.ir import Kind, Per
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.dsl.step import Step
from chunkwise.runtime.recurrence import Recurrence
from torch import Tensor

from tests.harness import Inputs, wobbled
from tests.random_calls import Layout, Loss, Made, Plan, Probe, is_sound, laid_out, make, plan
from tests.random_rules import Pick, Rule, rule
from tests.tolerances import (
    FLOAT32_HARD,
    FLOAT64_RANDOM,
    OF_A_CHUNK,
    Tolerance,
    assert_agree,
)


class Outcome(Enum):
    """What became of a draw."""

    AGREED = "agreed"
    REFUSED = "refused"  # with an error of the catalogue
    WRONG = "wrong"
    CRASHED = "crashed"  # with any other exception
    MOOT = "moot"  # the token loop itself is not finite, or grows


@dataclass(frozen=True)
class Verdict:
    """An outcome, with its reason: the class of an error and where, or what disagrees."""

    outcome: Outcome
    reason: str = ""
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in (Outcome.WRONG, Outcome.CRASHED)


@dataclass(frozen=True)
class Draw:
    """A recurrence and a call of it."""

    rule: Rule
    plan: Plan

    def __str__(self) -> str:
        return f"{self.rule.source}{self.plan}"


@dataclass(frozen=True)
class Caliber:
    """What an engine is drawn for: the chunk it serves by default here, lengths, dtypes."""

    chunk: int
    longest: int
    dtypes: tuple[torch.dtype, ...]


CALIBERS = {
    "eager": Caliber(16, 40, (torch.float64, torch.float64, torch.float32)),
    "tvm": Caliber(32, 66, (torch.float32,)),
    "triton": Caliber(16, 33, (torch.float32,)),
}


def draw(pick: Pick, engine: str) -> Draw:
    """A draw for an engine."""
    c = CALIBERS[engine]
    # the call first: what is left out of a rule, in shrinking, moves no choice of the call
    call = plan(pick, chunk=c.chunk, longest=c.longest, dtypes=c.dtypes)
    return Draw(rule(pick), call)


def examine(drawn: Draw, engine: str) -> Verdict:
    """What an engine makes of a draw; an exception that is no refusal is what the net looks for."""
    try:
        return _examined(drawn, engine)
    except Exception as fault:
        return _crash(fault)


def _examined(drawn: Draw, engine: str) -> Verdict:
    try:
        declaration = drawn.rule.declare()
        micro = drawn.plan.micro if declaration.has_micro else 1
        statics = {n: x for n, x in drawn.plan.given_statics.items() if n in declaration.statics}
        form = declaration.normal_form(micro, statics)
    except errors.DeclarationError as refusal:
        return _refusal(refusal)
    plan = drawn.plan
    op = Recurrence(declaration)
    params = {**drawn.rule.params, **statics}
    if all(x.per is Per.HEAD for x in declaration.operands):
        return _refuses(errors.MissingOperand, op, make(declaration, form, params, plan).inputs)
    step = declaration.step(micro, statics)
    for reset in dict.fromkeys((plan.reset, plan.reset and (-1e3, 1e-4), None)):
        plan = replace(plan, reset=reset)
        try:
            made = make(declaration, form, params, plan)
        except errors.NotLowered as unknown:
            return Verdict(Outcome.MOOT, "no legal gates", str(unknown))
        cotangents = _cotangents(op, made.inputs, plan, form.outputs[0].kind)
        truth = _truth(step, made.inputs, cotangents)
        if is_sound(truth):
            break
    else:
        return Verdict(Outcome.MOOT, "the truth is not finite, or large")
    try:
        if plan.probe is Probe.MIXED and len(made.inputs.operands) > 1:
            return _refuses(errors.BadDevice, op, _on_two_devices(made.inputs, plan.seed))
        if plan.probe is Probe.META:
            return _shapes(op, made.inputs, truth, engine)
        if plan.probe is Probe.STEP and plan.lengths is None and plan.tokens:
            got = _steps(op, made.inputs, plan, engine)
            truth = {n: truth[n] for n in got}
        else:
            got = _results(op, made.inputs, plan, cotangents, engine)
    except (errors.NotLowered, errors.EngineUnavailable) as refusal:
        return _by_form(form, made, truth) or _refusal(refusal)
    except errors.PositiveGate as refusal:  # a promise that is broken is for `check` to say
        if not plan.check:
            raise
        return _refusal(refusal)
    verdict = _compared(step, made, plan, cotangents, got, truth)
    if verdict.outcome is Outcome.WRONG and "nan" in verdict.text:
        # a loss that asks for less may pass by a quotient that has no gradient
        all_of_it = _cotangents(
            op, made.inputs, replace(plan, loss=Loss.BOTH), form.outputs[0].kind
        )
        if not is_sound(_truth(step, made.inputs, all_of_it)):
            return Verdict(Outcome.MOOT, "the truth is not finite, or large")
    return verdict


def _by_form(form: NormalForm, made: Made, truth: dict[str, Tensor]) -> Verdict | None:
    """A step that no engine lowers must still mean what its normal form does; None if so."""
    exact = made.inputs.copied("cpu", torch.float64)
    with torch.no_grad():
        o, finals = oracle.run(form, exact.operands, exact.params, exact.initial, exact.cu_seqlens)
    got = {n: x.detach() for n, x in (("o", o), *_numbered(finals))}
    try:
        assert_agree(got, {n: truth[n] for n in got}, FLOAT64_RANDOM)
    except AssertionError as difference:
        return Verdict(Outcome.WRONG, "normal form", str(difference))
    return None


def _refusal(error: errors.ChunkwiseError) -> Verdict:
    reason = type(error).__name__
    if isinstance(error, (errors.NotLowered, errors.EngineUnavailable)):  # why it does not
        reason += ": " + (error.why or error.headline).partition("\n")[0].removeprefix("rule: ")
    return Verdict(Outcome.REFUSED, reason, error.headline)


def _crash(error: Exception) -> Verdict:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "chunkwise" in f.filename or "/dsl/" in f.filename]
    at = own[-1] if own else frames[-1]
    where = f"{type(error).__name__} at {Path(at.filename).name}:{at.name}"
    return Verdict(Outcome.CRASHED, where, f"{at.line}\n{type(error).__name__}: {error}")


def _compared(
    step: Step,
    made: Made,
    plan: Plan,
    cotangents: dict[str, Tensor],
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
) -> Verdict:
    limit = FLOAT64_RANDOM if plan.dtype is torch.float64 else FLOAT32_HARD
    if not _differences(got, truth, limit, made):
        return Verdict(Outcome.AGREED)
    near = _nearby(step, made.inputs, cotangents, plan.dtype, truth)
    if not all(x.isfinite().all() for x in near.values()):
        return Verdict(Outcome.MOOT, "the truth is not finite in this dtype")
    # of every state's chunks: what one state rounds, those that are made of its reads take over
    roundings = OF_A_CHUNK * len(step.states)
    left = _differences(got, truth, limit, made, near=near, roundings=roundings)
    if not left:
        return Verdict(Outcome.AGREED, "to what the token loop keeps in its dtype")
    lines = left.splitlines()
    names = sorted({line.partition(":")[0] for line in lines})
    nan = " (NaN)" if any("nan" in line for line in lines) else ""
    return Verdict(Outcome.WRONG, ", ".join(names) + nan, left)


def _differences(
    got: dict[str, Tensor], truth: dict[str, Tensor], limit: Tolerance, made: Made, **more: Any
) -> str:
    """A line per tensor that does not agree; none if all do."""
    try:
        assert_agree(got, truth, limit, gates=made.gates, **more)
    except AssertionError as difference:
        return str(difference)
    return ""


def _cotangents(op: Recurrence, inputs: Inputs, plan: Plan, kind: Kind) -> dict[str, Tensor]:
    """The weights of outputs in the loss, in the dtype they are handed over in."""
    random = torch.Generator().manual_seed(3)
    heads, d = plan.H * plan.group, op.declaration
    batch = plan.B if plan.lengths is None else 1
    tail = {Kind.VALUE: (plan.V,), Kind.KEY: (plan.K,)}.get(kind, ())
    shapes = {"o": (batch, plan.tokens, heads, *tail)}
    for n, s in enumerate(d.states):
        shapes[f"final {n}"] = (
            *(plan.sequences, heads, plan.K),
            *((plan.V,) if s.kind is Kind.STATE else ()),
        )
    if plan.loss is Loss.OUTPUT:
        shapes = {"o": shapes["o"]}
    elif plan.loss is Loss.STATES:
        del shapes["o"]
    found = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=random, dtype=torch.float64).to(plan.dtype)
        if plan.cotangents is Layout.BROADCAST:  # as of a sum
            found[name] = torch.tensor(1.3, dtype=plan.dtype).expand(shape)
        else:
            found[name] = laid_out(w, plan.cotangents).detach()
    return found


def _outcome(
    o: Tensor, finals: Sequence[Tensor], inputs: Inputs, cotangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs, final states and gradients by name."""
    outputs = {"o": o, **{f"final {n}": s for n, s in enumerate(finals)}}
    leaves = inputs.leaves
    reached = {n: w for n, w in cotangents.items() if outputs[n].requires_grad}
    taken: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if reached:
        taken = torch.autograd.grad(
            [outputs[n] for n in reached],
            list(leaves.values()),
            [w.to(outputs[n].dtype) for n, w in reached.items()],
            allow_unused=True,
        )
    grads = {
        f"d{n}": torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), taken, strict=True)
    }
    return {n: y.detach() for n, y in {**outputs, **grads}.items()}


def _nearby(
    step: Step,
    inputs: Inputs,
    cotangents: dict[str, Tensor],
    dtype: torch.dtype,
    truth: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What the token loop gives of wobbled operands, or in `dtype`: what is farthest off.

    Of a gradient that vanishes (of the length of what is normalised) no arithmetic in `dtype`
    keeps more than rounding leaves.
    """
    several = [wobbled(inputs, seed) for seed in range(4)]
    found = [_truth(step, x, cotangents) for x in several]
    found += [_truth(step, x, cotangents, dtype) for x in several]

    def off(x: Tensor, name: str) -> float:
        error = relative_errors(x, truth[name])[0]
        return error if math.isfinite(error) else math.inf

    return {n: max((x[n] for x in found), key=lambda x, n=n: off(x, n)) for n in truth}


def _truth(
    step: Step,
    inputs: Inputs,
    cotangents: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The same of the token loop, in float64."""

    exact = inputs.copied("cpu", dtype)
    o, finals = oracle.run(
        step, exact.operands, exact.params, exact.initial, exact.cu_seqlens, dtype
    )
    return _outcome(o, finals, exact, {n: w.to(dtype) for n, w in cotangents.items()})


@contextlib.contextmanager
def _defaults(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype for a while; memory that is not written to holds NaN."""
    before = torch.get_default_dtype()
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)


def _results(
    op: Recurrence, inputs: Inputs, plan: Plan, cotangents: dict[str, Tensor], engine: str
) -> dict[str, Tensor]:
    with _defaults(plan.default_dtype):
        o, finals = op(
            **inputs.operands,
            **inputs.options,
            engine=engine,
            output_final_state=True,
            check=plan.check,
        )
        states = finals if isinstance(finals, tuple) else (finals,)
        return _outcome(o, states, inputs, cotangents)


def _steps(op: Recurrence, inputs: Inputs, plan: Plan, engine: str) -> dict[str, Tensor]:
    """Output and final states of `op.step`, a token at a time."""
    engine = "reference" if engine == "eager" else engine
    heads = {x.name for x in op.declaration.operands if x.per is Per.HEAD}
    state: Any = inputs.options["initial_state"]
    outputs = []
    with _defaults(plan.default_dtype), torch.no_grad():
        for t in range(plan.T):
            now = {n: x if n in heads else x[:, t] for n, x in inputs.operands.items()}
            o, state = op.step(**now, **inputs.params, state=state, engine=engine)
            outputs.append(o)
    return {"o": torch.stack(outputs, 1), **dict(_numbered(state))}


def _on(device: str, inputs: Inputs) -> Inputs:
    initial = inputs.initial
    if initial is not None:
        initial = tuple(None if x is None else x.detach().to(device) for x in initial)
    cu = None if inputs.cu_seqlens is None else inputs.cu_seqlens.to(device)
    operands = {n: x.detach().to(device) for n, x in inputs.operands.items()}
    return Inputs(operands, initial, cu, inputs.params)


def _shapes(op: Recurrence, inputs: Inputs, truth: dict[str, Tensor], engine: str) -> Verdict:
    """On the meta device the shapes are those of the truth."""
    inputs = _on("meta", inputs)
    engine = "eager" if engine in ("tvm", "triton") else engine
    o, finals = op(**inputs.operands, **inputs.options, engine=engine, output_final_state=True)
    got = {"o": o, **dict(_numbered(finals))}
    for name, y in got.items():
        if y.shape != truth[name].shape or y.device.type != "meta":
            return Verdict(Outcome.WRONG, f"{name} on meta", f"{y.shape}, {truth[name].shape}")
    return Verdict(Outcome.AGREED, "on meta")


def _numbered(finals: Any) -> Iterator[tuple[str, Tensor]]:
    for n, x in enumerate(finals if isinstance(finals, tuple) else (finals,)):
        yield f"final {n}", x


def _on_two_devices(inputs: Inputs, at: int) -> Inputs:
    names = list(inputs.operands)
    other = names[at % len(names)]
    moved = {**inputs.operands, other: inputs.operands[other].to("meta")}
    return replace(inputs, operands=moved)


def _refuses(expected: type[errors.CallError], op: Recurrence, inputs: Inputs) -> Verdict:
    """A call that has no meaning is refused by name."""
    try:
        op(**inputs.operands, **inputs.options)
    except expected as refusal:
        return Verdict(Outcome.AGREED, f"{type(refusal).__name__} is raised")
    return Verdict(Outcome.WRONG, f"{expected.__name__} is not raised")
