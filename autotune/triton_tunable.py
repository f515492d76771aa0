"""A `Tunable` for the Triton engine: its parts are kernels, its alternatives are plans.

A kernel that several plans share, forward or backward, is one part. It is timed alone, on the
call's operands; the buffers that earlier kernels would have filled hold noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..codegen.config import Config, Dims, KernelConfig, Printer, dims_of
from ..codegen.gluon.emit import module
from ..codegen.gluon.kernel import print_gluon
from ..codegen.interface import loaded
from ..codegen.plan import Kernel, Plan, Program, backward_plans, forward_plans
from ..codegen.programs import (
    backward_program,
    chunk_program,
    forward_program,
    saved_by,
    savings,
)
from ..codegen.saves import saving
from ..codegen.triton import offline
from ..codegen.triton.kernel import STORAGE
from ..runtime.cache import import_source
from ..runtime.call import Call, values_of
from ..runtime.engine import Task, task_of
from ..runtime.engines import EngineName
from ..runtime.prepared import Request, Way
from ..runtime.printed import dtypes_of
from ..runtime.saves import Saved
from ..runtime.triton import engine as triton_engine
from ..runtime.triton.launch import Launch
from ..runtime.triton.launch_plan import LoadedKernel, New
from ..runtime.triton.printed import buffer_of, kernel_of
from ..runtime.triton.segments import in_parts
from ..runtime.tuned.artifact import Configuration
from ..runtime.tuned.selection import call_size_of
from .call_tunable import WholeCalls
from .capture import specialisations
from .deadline import Deadline
from .gpu import Gpu
from .kernel_space import (
    RULES,
    SOME_PLAN,
    Choice,
    Traits,
    axes,
    point_of,
    printed,
    tiles_of,
    traits,
)
from .predict import bound_us, predict
from .space import Point, broken
from .tunable import Alternative, Chosen, Job, Part, Run
from .validation import ConfiguredEngine, ValidationSuite, cases

CHUNKS = (32, 64, 128)
_FORWARD, _BACKWARD = "forward", "backward"


@dataclass(frozen=True, slots=True)
class _PartKernel:
    """A part's kernel and chunk length, and the parameters that change the printed kernel."""

    kernel: Kernel
    chunk: int
    found: Traits


class TritonTunable(WholeCalls):
    """The plans and tiles of one recurrence for calls like `call`."""

    def __init__(
        self,
        call: Call,
        gpu: Gpu,
        suite: Callable[[Deadline], ValidationSuite],
        *,
        chunks: tuple[int, ...] = CHUNKS,
        plans: int | None = None,
        neighbours: tuple[Config, ...] = (),
    ) -> None:
        """`plans` limits the plans per direction and chunk length, known ones first (None: all).

        `neighbours` are configurations of other sizes; for `suite`, see `WholeCalls`.
        """
        super().__init__(call, EngineName.TRITON, suite)
        self._gpu = gpu
        self._dims = Dims(call.K, call.V)
        self._segment, self._size = in_parts(
            call.form, self._dims, call_size_of(call), gpu.multiprocessors
        )
        self._signature = triton_engine.signature(self._dims, call.dtype, dtypes_of(call))
        default = triton_engine.configuration(call.form, self._dims, call.dtype, gpu.shared_program)
        self.default, self._known = default, (default, *neighbours)
        self._subjects: dict[str, _PartKernel] = {}
        self._keys: dict[Hashable, str] = {}
        self._plans: dict[Alternative, Plan] = {}
        self._arena = _Arena(call.device)
        for chunk in dict.fromkeys((*chunks, default.chunk)):
            self._add(chunk)
        self.alternatives = tuple(self._plans) if plans is None else self._fewer(plans)
        self._given = cache(self._alone)

    def _alone(self, chunk: int) -> tuple[Task, list[Any]]:
        """What a kernel by itself is given: all that a backward has, and so a forward; noise of
        what a forward keeps.
        """
        call, saved = self._call, Saved(savings(self._call.form)[-1], chunk)
        cotangents, kept = (self._do, *(None for _ in call.initial)), saved.names(call)
        request = Request(call, Way.BACKWARD, cotangents, saved=saved if kept else None)
        noise = self._arena.noise(saved.shape(call), call.dtype).unbind(0) if kept else ()
        return task_of(request.bare()), [*values_of(call, cotangents), *noise]

    def _add(self, chunk: int) -> None:
        form, segments = self._call.form, self._segment > 0
        body = chunk_program(form)
        ahead, back = forward_plans(body), backward_plans(body)
        for kinds in savings(form):
            for forward in saving(ahead, kinds) if kinds else ahead:
                program = forward_program(form, forward, segments=segments)
                self._plan(_FORWARD, chunk, forward, program)
            for backward in saving(back, kinds) if kinds else back:
                program = backward_program(form, backward, segments=segments)
                self._plan(_BACKWARD, chunk, backward, program)

    def _fewer(self, plans: int) -> tuple[Alternative, ...]:
        """`plans` alternatives of each role and group: known ones, then by their lower bound."""
        kept: dict[tuple[str, str], list[Alternative]] = {}
        for a in sorted(self._plans, key=lambda a: (not a.known, a.bound_us)):
            among = kept.setdefault((a.group, a.role), [])
            if len(among) < plans:
                among.append(a)
        return tuple(a for a in self._plans if a in kept[a.group, a.role])

    def _plan(self, role: str, chunk: int, plan: Plan, program: Program) -> None:
        named = tuple((k.name, self._key(k, chunk)) for k in program.kernels)
        least = 0.0
        for kernel in program.kernels:
            choice = Choice(kernel, KernelConfig(), chunk, self._signature, self._gpu)
            least += bound_us(kernel, choice, self._size)
        names, keys = zip(*named, strict=True)
        known = any(
            c.chunk == chunk and plan == (c.forward if role == _FORWARD else c.backward)
            for c in self._known
        )
        kept = ", ".join(str(name.of) for name, _ in saved_by(self._call.form, plan.saves))
        group = f"C={chunk}, keeping {kept}" if kept else f"C={chunk}"
        alternative = Alternative(group, role, plan.label, keys, names, least, known)
        self._plans[alternative] = plan

    def _key(self, kernel: Kernel, chunk: int) -> str:
        """The key of the kernel's part, equal for kernels of equal work, whatever the plan."""
        buffers = frozenset(kernel.buffers.items())
        same = (chunk, kernel.loop, kernel.stores, kernel.carried, kernel.segments, buffers)
        if same not in self._keys:
            unit = offline.unit(printed(kernel, KernelConfig(), chunk, self._signature))
            digest = hashlib.blake2b(unit.encode(), digest_size=5).hexdigest()
            key = f"C={chunk}/{kernel.name}-{digest}"
            self._keys[same] = key
            self._subjects[key] = _PartKernel(kernel, chunk, traits(kernel, chunk, self._signature))
        return self._keys[same]

    # ---- parts -----------------------------------------------------------------------------------

    def part(self, key: str) -> Part:
        subject = self._subjects[key]
        dims = dims_of(subject.kernel, self._dims)
        space = axes(subject.found, dims, hopper=self._gpu.hopper)
        known = [c.of(subject.kernel.name) for c in self._known]
        first = [point_of(tiles, space) for tiles in known]
        kept = tuple(dict.fromkeys(p for p in first if p is not None))
        return Part(key, f"{subject.kernel.name} C={subject.chunk}", space, kept)

    def excess(self, part: Part, point: Point) -> dict[str, float]:
        return broken(RULES, self._choice(part, point))

    def predicted_us(self, part: Part, point: Point) -> float:
        found = self._subjects[part.key].found
        return predict(self._choice(part, point), found, self._size).us

    def jobs(self, part: Part, point: Point) -> tuple[Job, ...]:
        return self._compilations(self.run(part, point))

    def run(self, part: Part, point: Point) -> Run:
        choice = self._choice(part, point)
        kernel = printed(choice.kernel, choice.tiles, choice.chunk, self._signature)
        unit = import_source(offline.unit(kernel))
        gluon = self._in_gluon(choice)
        alone = LoadedKernel(kernel_of(kernel), vars(unit)[offline.UNIT], gluon=gluon)
        reads = loaded(choice.kernel, self._signature, STORAGE)
        given = tuple(buffer_of(b) for b in reads if not b.is_saved)
        task, values = self._given(choice.chunk)
        launch = Launch(task, (alone,), choice.chunk, self._segment, given)
        tensors = launch.tensors(values)
        (spec,) = launch.plan.launches
        tensors += self._arena.take(launch.plan.new)
        return lambda: spec.run(tensors, aligned=True)

    def _in_gluon(self, choice: Choice) -> LoadedKernel | None:
        """The kernel in Gluon, if that is chosen and there is one."""
        if choice.tiles.printer is not Printer.GLUON or triton.knobs.runtime.interpret:
            return None
        config = Config(choice.chunk, SOME_PLAN, SOME_PLAN, choice.tiles)
        kernel = print_gluon(choice.kernel, self._signature, config)
        if isinstance(kernel, str):
            return None
        own = import_source(module([kernel]))
        return LoadedKernel(kernel_of(kernel), vars(own)[kernel.name])

    # ---- whole configurations --------------------------------------------------------------------

    def configuration(self, chosen: Mapping[str, Alternative], points: Chosen) -> Config:
        plans = {role: self._plans[a] for role, a in chosen.items()}
        kernels = tuple(
            (name, tiles_of(points[key]))
            for a in chosen.values()
            for name, key in zip(a.kernels, a.parts, strict=True)
        )
        (chunk,) = {self._subjects[key].chunk for a in chosen.values() for key in a.parts}
        return Config(chunk, plans[_FORWARD], plans[_BACKWARD], KernelConfig(), kernels)

    def whole_jobs(self, config: Configuration) -> tuple[Job, ...]:
        return self._compilations(self.whole(config))

    def validation_jobs(self, config: Configuration, deadline: Deadline) -> tuple[Job, ...]:
        engine = ConfiguredEngine(self._engine, config)

        def everything() -> None:
            for case, way in cases(self._suite(deadline), engine, deadline):
                way.forward(case.call)
                way.backward(case.call, case.do, case.dfinals)

        return self._compilations(everything)

    def _choice(self, part: Part, point: Point) -> Choice:
        subject = self._subjects[part.key]
        tiles = tiles_of(point)
        return Choice(subject.kernel, tiles, subject.chunk, self._signature, self._gpu)

    def _compilations(self, run: Run) -> tuple[Job, ...]:
        if triton.knobs.runtime.interpret:
            return ()  # the interpreter compiles nothing
        return specialisations(run, self._gpu.shared_program)


class _Arena:
    """Buffers of noise, which all parts share because only one part runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype, int], Tensor] = {}

    def noise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        drawn = torch.randn(shape, dtype=torch.float32, device=self._device)
        return (0.01 * drawn).to(dtype)

    def take(self, new: tuple[New, ...]) -> list[Tensor]:
        """A tensor for each of `new`, no two the same."""
        taken: list[Tensor] = []
        for b in new:
            count = sum((t.shape, t.dtype) == (b.shape, b.dtype) for t in taken)
            key = (b.shape, b.dtype, count)
            if key not in self._tensors:
                self._tensors[key] = self.noise(b.shape, b.dtype)
            taken.append(self._tensors[key])
        return taken
