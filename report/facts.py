"""Facts about a recurrence: what it supports, its engines' errors and times, its artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..autotune.inputs import Family, draw
from ..autotune.measure import CpuDevice, CudaDevice, Timing, timing
from ..autotune.report import describe
from ..autotune.tolerance import relative_errors
from ..autotune.validation import answers, one_thread, validation_suite
from ..codegen.config import Dims
from ..codegen.programs import transition_of
from ..dsl.declaration import Declaration
from ..dsl.errors import BadArtifact, ChunkwiseError
from ..dsl.normal_form import NormalForm
from ..runtime.call import Call
from ..runtime.cannot_run import CannotRun
from ..runtime.engine import chunk_refusal
from ..runtime.engines import EngineName, available, load
from ..runtime.tuned import selection
from ..runtime.tuned.artifact import Artifact, Error

TOKENS = 272  # of the sequences whose results are compared: several chunks, the last unfinished
_SAMPLES = 7


@dataclass(frozen=True, slots=True)
class Agreement:
    """An engine's worst error of each result against the token loop in float64, or why none."""

    engine: EngineName
    device: str
    errors: tuple[tuple[str, Error], ...] = ()
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """Times of a call of `tokens` tokens: forward, and forward with backward."""

    engine: EngineName
    device: str
    tokens: int
    forward: Timing
    both: Timing


def placed() -> Iterator[tuple[EngineName, torch.device | None, str]]:
    """Every engine with the device that it runs on here, or why it runs on none."""
    gpu = torch.cuda.is_available()
    for name, why in available().items():
        if why is not None:
            yield name, None, why
        elif name is EngineName.TRITON and not gpu:
            yield name, None, "it needs a GPU, and this machine has none"
        else:
            on_gpu = gpu and name is not EngineName.TVM
            yield name, torch.device("cuda" if on_gpu else "cpu"), ""


def agreement(
    declared: Declaration, dims: Dims, dtype: torch.dtype, tokens: int = TOKENS
) -> Iterator[Agreement]:
    """Each engine on ordinary, hard and packed inputs: outputs, final states and gradients.

    `tokens`: of a sequence.

    Raises NotLowered if no legal inputs are known.
    """
    suites = {}
    for name, device, why in placed():
        if device is None:
            yield Agreement(name, "", left_out=why)
            continue
        if device not in suites:
            suites[device] = validation_suite(declared, dims, dtype, device, tokens=tokens)
        worst: dict[str, Error] = {}
        try:
            with one_thread():
                for case in suites[device].cases:
                    for result, got in answers(
                        load(name), case.call, case.do, case.dfinals
                    ).items():
                        rms, maximum = relative_errors(got, case.expected[result])
                        error = Error(rms, maximum, case.allowed[result])
                        known = worst.get(result)
                        if known is None or not rms / error.limit <= known.rms / known.limit:
                            worst[result] = error
        except ChunkwiseError as refused:
            yield Agreement(name, device.type, left_out=refused.headline)
            continue
        except CannotRun as failed:
            yield Agreement(name, device.type, left_out=str(failed))
            continue
        yield Agreement(name, device.type, tuple(worst.items()))


def speed(
    declared: Declaration, dims: Dims, dtype: torch.dtype, tokens: int, heads: int
) -> Iterator[Speed]:
    """Times of one sequence on each engine that has chunks and serves it here, taking turns."""
    form = declared.normal_form(declared.default_micro)
    ready: dict[torch.device, list[tuple[EngineName, Call]]] = {}
    for name, device, _ in placed():
        if device is None or name is EngineName.REFERENCE:  # which takes minutes
            continue
        call = draw(
            *(declared, form, Family.ORDINARY, dims, dtype, device),
            tokens=tokens,
            micro=declared.default_micro,
            batch=1,
            heads=heads,
        )
        if load(name).refusal(call) is None:
            ready.setdefault(device, []).append((name, call))
    for device, contestants in ready.items():
        clock = CudaDevice(device) if device.type == "cuda" else CpuDevice()
        runs = [run for name, call in contestants for run in _runs(name, call)]
        clock.rounds(runs, 1)
        samples = [timing(s) for s in clock.rounds(runs, _SAMPLES)]
        for n, (name, _) in enumerate(contestants):
            yield Speed(name, device.type, tokens, samples[2 * n], samples[2 * n + 1])


def _runs(name: EngineName, call: Call) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward alone, and both directions."""
    engine = load(name)
    do = torch.ones(call.output_shape, dtype=call.dtype, device=call.device)

    def both() -> None:
        engine.forward(call)
        engine.backward(call, do, (None,) * len(call.form.states))

    return partial(engine.forward, call), both


def artifacts(form: NormalForm) -> list[Artifact]:
    """The artifacts of this normal form, shipped or tuned by the user, by machine and size."""
    scanned = selection.scan(selection.folders())
    found = [a for _, a in scanned if not isinstance(a, BadArtifact)]
    own = [a for a in found if a.key.form == form.digest]
    return sorted(own, key=lambda a: (str(a.key.machine), a.key.dtype, a.key.dims.K, a.key.dims.V))


def tuned_rows(form: NormalForm) -> list[tuple[str, ...]]:
    """A table of what was tuned, with its heading; the heading alone if nothing was."""
    rows: list[tuple[str, ...]] = [
        ("machine", "engine", "dtype", "K, V", "rows × tokens", "µs", "default µs", "configuration")
    ]
    for a in artifacts(form):
        for t in a.tuned:
            rows.append(
                (
                    str(a.key.machine),
                    a.key.engine.value,
                    a.key.dtype,
                    f"{a.key.dims.K}, {a.key.dims.V}",
                    f"{t.bucket.rows} × {t.bucket.tokens}",
                    f"{t.time_us:,.1f}",
                    "-" if t.default_us is None else f"{t.default_us:,.1f}",
                    describe(t.config),
                )
            )
    return rows


def features(declared: Declaration) -> list[tuple[str, str]]:
    """What is supported, each with yes or no and what is to be said of it."""
    refused: str | None = "it was declared for the reference engine"
    engines, segments, export = "reference only: ", "no", "no"
    if not declared.any_step:
        form = declared.normal_form(declared.default_micro)
        refused = chunk_refusal(form)
    if refused is not None:
        engines += refused
    else:
        engines = ", ".join(e.value for e in EngineName)
        transition = transition_of(form, Dims(128, 128))
        if transition is not None:
            segments = f"yes: a segment's state is {transition.value}"
        export = "yes: package for GPUs, library for CPUs"
    micro = [("micro-steps per token", "any number, by the length of the tuples")]
    return [
        ("engines", engines),
        ("gradients", "of every operand and initial state, through the final state"),
        *(micro if declared.has_micro and refused is None else []),
        ("packed sequences", "yes"),
        ("grouped heads", "yes: Keys may have fewer heads"),
        ("long sequences in segments (K = V = 128)", segments),
        ("one token at a time", "yes: a kernel, and torch"),
        ("export", export),
    ]
