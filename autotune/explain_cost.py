"""Explains the cost model's prediction for a recurrence on a GPU: each kernel's time and limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..codegen.config import Config, Dims
from ..codegen.interface import Dtype, Signature
from ..codegen.plan import Plan, Program, backward_plans, forward_plans
from ..codegen.programs import backward_program, chunk_program, forward_program, savings
from ..codegen.saves import saving
from ..codegen.text.table import table
from ..codegen.triton.fit import untuned_config
from ..codegen.triton.offline import signature_for
from ..codegen.triton.resources import Target
from ..dsl.normal_form import NormalForm
from ..runtime.triton.segments import in_parts
from ..runtime.tuned.artifact import CallSize
from .gpu import Gpu
from .kernel_space import RULES, Choice, tiles_text, traits
from .predict import Prediction, predict

_BEST = 5  # plans that are listed


@dataclass(frozen=True, slots=True)
class _Setting:
    form: NormalForm
    signature: Signature
    gpu: Gpu
    size: CallSize
    segments: bool


def explain_cost(form: NormalForm, dims: Dims, dtype: Dtype, size: CallSize, gpu: Gpu) -> str:
    """Tables of the default's kernels, of the plans predicted to be fastest, and of tile rules.

    Raises:
        NotLowered: the form has no chunk form.
    """
    target = Target.GFX942 if gpu.warp == 64 else Target.SM90
    segment, parts = in_parts(form, dims, size, gpu.multiprocessors)
    setting = _Setting(form, signature_for(form, dims, dtype, target), gpu, parts, segment > 0)
    config = untuned_config(form, dims, dtype, gpu.shared_program)
    title = (
        f"predicted on {gpu.name}, for {size.rows} sequences x heads of {size.tokens} tokens, "
        f"K={dims.K}, V={dims.V}, {dtype.value}, chunks of {config.chunk}"
    )
    if segment:
        title += f"; scans take segments of {segment}"
    lines = [title, *_indented(_kernels(setting, config))]
    lines += ["", "the plans ahead, with default tiles", *_indented(_plans(setting, config))]
    rules = [("rule", "why"), *((r.name, r.reason) for r in RULES)]
    lines += ["", "tiles are not tried that break a rule", *_indented(table(rules))]
    return "\n".join(lines)


def _kernels(setting: _Setting, config: Config) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            *("kernel", "tiles", "programs", "resident", "steps", "shared KiB"),
            *("memory us", "products us", "in sequence us", "us", "waits for"),
        )
    ]
    for program in (_forward(setting, config.forward), _backward(setting, config.backward)):
        total = 0.0
        for name, p in _predictions(setting, program, config):
            total += p.us
            times = (p.memory_us, p.products_us, p.serial_us, p.us)
            counts = (str(p.programs), str(p.resident), str(p.steps), f"{p.shared / 1024:.0f}")
            shown = tuple(f"{x:.0f}" for x in times)
            rows.append((name, tiles_text(config.of(name)), *counts, *shown, p.limit))
        rows.append(("together", "", "", "", "", "", "", "", "", f"{total:.0f}", ""))
    return table(rows)


def _plans(setting: _Setting, config: Config) -> list[str]:
    body, kinds = chunk_program(setting.form), savings(setting.form)[1:]
    ahead, back = (
        (*plans, *(p for k in kinds for p in saving(plans, k)))
        for plans in (forward_plans(body), backward_plans(body))
    )
    forward = [(p, _forward(setting, p)) for p in ahead]
    backward = [(p, _backward(setting, p)) for p in back]
    rows = [("direction", "plan", "us")]
    for direction, plans in (("forward", forward), ("backward", backward)):
        totals = [
            (sum(p.us for _, p in _predictions(setting, program, config)), plan.label)
            for plan, program in plans
        ]
        rows += [(direction, label, f"{us:.0f}") for us, label in sorted(totals)[:_BEST]]
    return table(rows)


def _predictions(
    setting: _Setting, program: Program, config: Config
) -> Iterator[tuple[str, Prediction]]:
    for kernel in program.kernels:
        own = config.of(kernel.name)
        choice = Choice(kernel, own, config.chunk, setting.signature, setting.gpu)
        found = traits(kernel, config.chunk, setting.signature)
        yield kernel.name, predict(choice, found, setting.size)


def _forward(setting: _Setting, plan: Plan) -> Program:
    return forward_program(setting.form, plan, segments=setting.segments)


def _backward(setting: _Setting, plan: Plan) -> Program:
    return backward_program(setting.form, plan, segments=setting.segments)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
