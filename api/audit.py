"""Compiles every emitted kernel for every target without a GPU, and checks that it fits.

A kernel that compiles may still fail to launch, because it needs more shared memory than the target
has. The audit compiles the configuration that the runtime would choose: `fit` made it smaller by an
estimate of its memory, which is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .cli_progress import watched
from .codegen.config import Config, Dims
from .codegen.interface import Dtype
from .codegen.programs import Transition, transition_of
from .codegen.triton.emit import emit
from .codegen.triton.fit import untuned_config
from .codegen.triton.offline import Job, Outcome, run_jobs, signature_for
from .codegen.triton.resources import SERIALISED, Target
from .dsl import library
from .dsl.classify import DecayClass, LowRank, classify
from .dsl.normal_form import NormalForm
from .runtime.engine import chunk_refusal
from .runtime.tuned.machine import version

# ---- what is compiled ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """A normal form, and the dimensions, dtype, target and kind of call to compile it for.

    Attributes:
        packed: whether sequences are packed.
        directions: `forward` and `backward`, or one of them.
        segments: whether scans run in segments.
    """

    form: NormalForm
    dims: Dims
    dtype: Dtype
    target: Target
    packed: bool
    directions: tuple[str, ...] = ("forward", "backward")
    segments: bool = False

    @property
    def label(self) -> str:
        sizes = f"K={self.dims.K},V={self.dims.V}"
        tail = " packed" * self.packed + " in segments" * self.segments
        return f"{self.form.name} {sizes} {self.dtype.value} {self.target.name.lower()}{tail}"

    @property
    def default(self) -> Config:
        """The configuration that the runtime chooses on this target if nothing was tuned."""
        return untuned_config(self.form, self.dims, self.dtype, self.target.shared_limit)

    def jobs(self, config: Config | None = None) -> dict[str, Job]:
        """The compilation of each kernel by name, under `config` instead of the default."""
        signature = signature_for(self.form, self.dims, self.dtype, self.target)
        emitted = emit(self.form, signature, config or self.default, segments=self.segments)
        programs = {"forward": emitted.forward, "backward": emitted.backward}
        return {
            k.name: Job(k, tuple(emitted.buffers(k).items()), signature, self.target, self.packed)
            for direction in self.directions
            for k in programs[direction]
        }


class Audit:
    """The compilations of some subjects; those that are equal are done once."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._jobs = {s: s.jobs() for s in subjects}
        self._outcomes: dict[str, Outcome] = {}

    def run(self, workers: int) -> None:
        """Compile all of them, with a line of progress; what an interrupt leaves is kept."""
        jobs = {job.key: job for of in self._jobs.values() for job in of.values()}
        for key, outcome in watched(run_jobs(jobs, workers), "compiling", len(jobs), "kernel"):
            self._outcomes[key] = outcome

    def found(self, *, partial: bool = False) -> dict[Subject, dict[str, Outcome]]:
        """The outcomes of each subject's kernels by name.

        After an interrupt some lack: then the subject does too, unless `partial`.
        """
        done = self._outcomes
        return {
            subject: {name: done[job.key] for name, job in jobs.items() if job.key in done}
            for subject, jobs in self._jobs.items()
            if partial or all(job.key in done for job in jobs.values())
        }


# ---- which subjects ------------------------------------------------------------------------------


def lowered_forms() -> list[NormalForm]:
    """The library's normal forms that have a chunk form."""
    forms = (d.normal_form(d.default_micro) for d in library.all_declarations())
    return [form for form in forms if chunk_refusal(form) is None]


def one_per_class(forms: Iterable[NormalForm]) -> list[NormalForm]:
    """The first form of each (decay class, low-rank class)."""
    found: dict[tuple[tuple[DecayClass, LowRank], ...], NormalForm] = {}
    for form in forms:
        classes = tuple((s.decay, s.low_rank) for s in classify(form).states)
        if len(classes) == 1:
            found.setdefault(classes, form)
    return list(found.values())


def is_vector_gated(form: NormalForm) -> bool:
    return any(s.decay is DecayClass.KEY for s in classify(form).states)


def quick_subjects() -> list[Subject]:
    """One form per class in bfloat16, K = V = 128 (64 under a vector gate), to take minutes.

    Forward kernels are compiled for every target. Backward kernels, which are most of the work, are
    compiled for Hopper, and for the target that has the least shared memory and another back end.
    Scans in segments are compiled forward, for one form of each kind of transition (decays, or a
    matrix).
    """
    subjects = []
    in_segments: list[Transition] = []
    for form in one_per_class(lowered_forms()):
        dims = Dims(64, 64) if is_vector_gated(form) else Dims(128, 128)
        for target in Target:
            both = target in (Target.SM90, Target.GFX942)
            directions = ("forward", "backward") if both else ("forward",)
            subjects.append(Subject(form, dims, Dtype.BFLOAT16, target, False, directions))
        how = transition_of(form, dims)
        if how is not None and how not in in_segments:
            in_segments.append(how)
            subjects += [
                Subject(form, dims, Dtype.BFLOAT16, target, False, ("forward",), segments=True)
                for target in Target
            ]
    return subjects


def all_subjects(
    names: Sequence[str], dims: Sequence[Dims], dtypes: Sequence[Dtype], targets: Sequence[Target]
) -> list[Subject]:
    """Every form of those names (all, if none are given) for each size, dtype and target.

    Each is compiled packed and not, whole and, where possible, in segments.
    """
    forms = [f for f in lowered_forms() if not names or f.name in names]
    return [
        Subject(form, d, dtype, target, packed, segments=segments)
        for form in forms
        for d in dims
        for dtype in dtypes
        for target in targets
        for packed in (False, True)
        for segments in (False, True)
        if not segments or transition_of(form, d)
    ]


# ---- what was found ------------------------------------------------------------------------------


def fits(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether every kernel compiles and fits."""
    return all(o.fits for o in outcomes.values())


def report(found: Mapping[Subject, Mapping[str, Outcome]]) -> str:
    """One line per subject, then the compiler's errors and the number of findings."""
    lines, errors = [], []
    width = max((len(s.label) for s in found), default=0)
    for subject, outcomes in found.items():
        errors += [f"ERROR {subject.label} {n}: {o.error}" for n, o in outcomes.items() if o.error]
        compiled = {n: o.resources for n, o in outcomes.items() if o.resources}
        shared = max((r.shared for r in compiled.values()), default=0)
        registers = [r.registers for r in compiled.values() if r.registers is not None]
        spills = max((r.spills or 0 for r in compiled.values()), default=0)
        verdict = f"{shared / 1024:5.1f} of {subject.target.shared_limit // 1024} KiB, "
        verdict += f"registers {max(registers, default='unknown')}, spills {spills} B"
        slow = [n for n, r in compiled.items() if r.usage.is_serialised]
        large = [n for n, r in compiled.items() if not r.fits]
        for what, names in ((SERIALISED, slow), ("DOES NOT FIT", large)):
            verdict += f"   {what}: {', '.join(names)}" if names else ""
        lines.append(f"{subject.label:<{width}}  {verdict}")
    wrong = sum(not fits(outcomes) for outcomes in found.values())
    count = f"{len(found)} audited, {wrong} with findings (Triton {version('triton')})"
    return "\n".join([*lines, *errors, count])


def as_json(subject: Subject, outcomes: Mapping[str, Outcome]) -> dict[str, object]:
    """A subject as data: the resources and the configuration of each kernel."""
    jobs = subject.jobs()
    kernels = {}
    for name, outcome in outcomes.items():
        r, tiles = outcome.resources, jobs[name].kernel.config
        kernels[name] = {
            "v_tile": tiles.v_tile,
            "k_tile": tiles.k_tile,
            "warps": tiles.warps,
            "stages": tiles.stages,
            "shared": r.shared if r else None,
            "registers": r.registers if r else None,
            "spills": r.spills if r else None,
            "instructions": r.usage.instructions._asdict() if r and r.usage.instructions else None,
            "seconds": round(outcome.seconds, 2),
            "error": outcome.error,
        }
    return {
        "subject": subject.label,
        "triton": version("triton"),
        "passed": fits(outcomes),
        "chunk": subject.default.chunk,
        "kernels": kernels,
    }
