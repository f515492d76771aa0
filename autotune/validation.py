"""Validates a configuration before it may serve calls, and writes its certificate.

The output, the final states and all gradients are compared with the float64 token loop, on ordinary
and on hard inputs. Each call runs twice: before the first run, new buffers are filled with NaN,
before the second with another number. Both runs must agree bit for bit. Besides engines, any object
with their two methods can be validated, for example an engine that a test has broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..codegen.config import Dims
from ..codegen.programs import transition_of
from ..codegen.tir.config import TvmConfig, spread
from ..dsl.declaration import Declaration
from ..runtime.call import Call
from ..runtime.engines import EngineName, load
from ..runtime.inputs import ranges, usual_params
from ..runtime.saves import saved_under
from ..runtime.tuned.artifact import Certificate, Configuration, Error
from .deadline import NEVER, Deadline
from .inputs import Family, draw
from .tolerance import (
    BY_DTYPE,
    FLOAT32_HARD,
    ROUNDINGS,
    Tolerance,
    relative_errors,
    within,
    wobbled,
)

# several chunks of 64 or 128 with a rest of 16: divisible as large calls are, so that Triton
# compiles the same machine code for both
TOKENS = 272
_SEGMENT = 128  # tokens of a segment: there are three, of one chunk or of several
_HARD_HALF = 4.0  # factor on half-precision tolerances: products of hard gates lose digits
# bytes that make a NaN, and a number above 1, of every float type
_NAN, _NUMBER = 0xFF, 0x45


class Runs(Protocol):
    """What is examined: `forward` and `backward` as an engine has them."""

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the final states."""

    def backward(
        self, call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        """Gradients of every operand and initial state."""


@dataclass(frozen=True, slots=True)
class ConfiguredEngine:
    """An engine that runs every call under one given configuration.

    Attributes:
        segment: the tokens of a segment, if the Triton engine is to scan even short calls in
            segments; None: as it would choose by itself.
        how: a phrase for reports, such as `in segments`; empty for the usual way.
    """

    engine: EngineName
    config: Configuration | None
    segment: int | None = None
    how: str = ""

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As the engine's."""
        return load(self.engine).forward(call, self.config, self.segment)

    def forward_saving(self, call: Call) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """As the engine's."""
        return load(self.engine).forward_saving(call, self.config, self.segment)

    def backward(
        self,
        call: Call,
        do: Tensor,
        dfinals: tuple[Tensor | None, ...],
        kept: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        """As the engine's, after another forward where that keeps something which is not given."""
        if kept is None and saved_under(self.config, call) is not None:
            *_, kept = self.forward_saving(call)
        return load(self.engine).backward(call, do, dfinals, self.config, self.segment, kept)

    def ways(self, call: Call) -> tuple[ConfiguredEngine, ...]:
        """This, and the variant that serves calls of few rows (in parts, or in segments)."""
        if isinstance(self.config, TvmConfig):
            cut = spread(self.config, rows=1, V=call.V, threads=call.V)
            if cut == self.config:
                return (self,)
            return self, replace(self, config=cut, how="in parts")
        dims = Dims(call.K, call.V)
        if self.engine is not EngineName.TRITON or not transition_of(call.form, dims):
            return (self,)
        return self, replace(self, segment=_SEGMENT, how="in segments")


@dataclass(frozen=True, slots=True)
class ValidationCase:
    """A call, the gradients of its results, the token loop's answers, and the allowed errors."""

    family: Family
    call: Call
    do: Tensor
    dfinals: tuple[Tensor | None, ...]
    expected: Mapping[str, Tensor]
    allowed: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ValidationSuite:
    """The cases of one recurrence, made once for all its configurations."""

    cases: tuple[ValidationCase, ...]


def validation_suite(
    declaration: Declaration,
    dims: Dims,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int = TOKENS,
    families: Sequence[Family] = tuple(Family),
    deadline: Deadline = NEVER,
) -> ValidationSuite:
    """The cases for calls of these dimensions (no token axis is shorter than 4).

    Raises:
        NotLowered: no inputs are known to be legal.
        TimeoutError: the deadline passed before all cases were made.
    """
    micro = declaration.default_micro
    form = declaration.normal_form(micro)
    small = ranges(form, usual_params(form)).small
    made = []
    with one_thread():
        for family in families:
            deadline.check()
            call = draw(declaration, form, family, dims, dtype, device, tokens=tokens, micro=micro)
            made.append(_case(family, call, small))
    return ValidationSuite(tuple(made))


def _case(family: Family, call: Call, small: frozenset[str]) -> ValidationCase:
    random = torch.Generator().manual_seed(3)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
        return drawn.to(call.device, dtype)

    do = normal(call.output_shape, call.dtype)
    dfinals = tuple(normal(call.state_shape(s), call.state_dtype) for s in call.form.states)
    expected = _expected(call, do, dfinals)
    allowed = {name: _limit(name, family, call.dtype, small) for name in expected}
    if call.dtype.itemsize == 2:
        near = _expected(
            replace(call, operands={n: wobbled(x, random) for n, x in call.operands.items()}),
            do,
            dfinals,
        )
        for name, want in expected.items():
            change, _ = relative_errors(near[name], want)
            allowed[name] = max(allowed[name], ROUNDINGS * change)
    return ValidationCase(family, call, do, dfinals, expected, allowed)


def cases(
    suite: ValidationSuite, runs: Runs, deadline: Deadline = NEVER
) -> Iterator[tuple[ValidationCase, Runs]]:
    """Every case, with every variant of the engine that has to pass it.

    Raises:
        TimeoutError: the deadline passed before the last case.
    """
    for case in suite.cases:
        ways = runs.ways(case.call) if isinstance(runs, ConfiguredEngine) else (runs,)
        for way in ways:
            deadline.check()
            yield case, way


def validate(suite: ValidationSuite, runs: Runs, deadline: Deadline = NEVER) -> Certificate:
    """The certificate of `runs` on the suite; exceptions of `runs` itself are not caught.

    Raises:
        TimeoutError: the deadline passed before the last case.
    """
    worst: dict[str, Error] = {}
    faults = []
    for case, way in cases(suite, runs, deadline):
        with _Filled(_NAN):
            first = answers(way, case.call, case.do, case.dfinals)
        with _Filled(_NUMBER):
            second = answers(way, case.call, case.do, case.dfinals)
        where = case.family.name.lower()
        if isinstance(way, ConfiguredEngine) and way.how:
            where += f", {way.how}"
        for name, want in case.expected.items():
            limit = case.allowed[name]
            rms, maximum = relative_errors(first[name], want)
            if not bool(first[name].isfinite().all()):
                faults.append(f"{name} ({where}) is not finite: is a buffer read before written?")
            elif not within(rms, maximum, limit):
                what = f"relative RMS error {rms:.1e}, maximum {maximum:.1e}, allowed {limit:.1e}"
                faults.append(f"{name} ({where}): {what}")
            if not _same_bits(first[name], second[name]):
                faults.append(f"{name} ({where}): two runs differ")
            known = worst.get(name)
            if known is None or not rms / limit <= known.rms / known.limit:
                worst[name] = Error(rms, maximum, limit)
    families = tuple(q.family.name.lower() for q in suite.cases)
    return Certificate(tuple(worst.items()), families, tuple(faults))


def answers(
    runs: Runs, call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]
) -> dict[str, Tensor]:
    """The results by name, on the CPU, in the dtypes and shapes of the call."""
    o, finals = runs.forward(call)
    grads, dinitials = runs.backward(call, do, dfinals)
    names = [s.name for s in call.form.states]
    named: dict[str, Tensor | None] = {"o": o}
    named |= {f"final {n}": x for n, x in zip(names, finals, strict=True)}
    named |= {f"d {n}": x for n, x in grads.items()}
    named |= {f"d initial {n}": x for n, x in zip(names, dinitials, strict=True)}
    return {n: x.detach().cpu() for n, x in named.items() if x is not None}


def _expected(call: Call, do: Tensor, dfinals: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The token loop's results in float64, on the CPU."""

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().cpu().double()

    engine = ConfiguredEngine(EngineName.REFERENCE, None)
    call = replace(
        call,
        operands={n: x.detach().cpu().double() for n, x in call.operands.items()},
        initial=tuple(map(exact, call.initial)),
        cu_seqlens=None if call.cu_seqlens is None else call.cu_seqlens.cpu(),
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    return answers(engine, call, do.cpu().double(), tuple(map(exact, dfinals)))


def _limit(name: str, family: Family, dtype: torch.dtype, small: frozenset[str]) -> float:
    tolerance = FLOAT32_HARD if dtype is torch.float32 else BY_DTYPE[dtype]
    allowed = _allowed(name, tolerance, small)
    return allowed * _HARD_HALF if family is Family.HARD and dtype.itemsize == 2 else allowed


def _allowed(name: str, tolerance: Tolerance, small: frozenset[str]) -> float:
    if not name.startswith("d "):
        return tolerance.outputs
    return tolerance.gates if name.removeprefix("d ") in small else tolerance.gradients


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class _Filled(TorchDispatchMode):
    """Fills each new tensor of floats with one byte, which replaces the old contents of memory."""

    def __init__(self, byte: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self._byte = byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _NEW and out.is_floating_point():
            out.untyped_storage().fill_(self._byte)
        return out


_NEW = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on the token loop's small tensors, threads would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
