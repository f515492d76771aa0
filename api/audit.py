"""Compiles every emitted kernel for every target without a GPU, and checks that it fits.

A kernel that compiles may still fail to launch, because it needs more shared memory than the target
has. For each declaration, dtype and target, the audit therefore compiles the configuration that the
runtime would choose (`fit` estimates its memory without a compiler). If a kernel does not fit, the
audit descends a short ladder of smaller tiles and reports the first configuration that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .cli_progress import watched
from .codegen.config import Config, Dims, KernelConfig
from .codegen.interface import Dtype
from .codegen.programs import Transition, chunk_program, transition_of
from .codegen.triton.emit import Emitted, emit
from .codegen.triton.fit import untuned_config
from .codegen.triton.offline import Job, Outcome, run_jobs, signature_for
from .codegen.triton.resources import SERIALISED, Target
from .dsl import library
from .dsl.classify import DecayClass, LowRank, classify
from .dsl.errors import NotLowered
from .dsl.normal_form import NormalForm
from .runtime.tuned.machine import version

_CHUNKS = (64, 32, 16)

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

    def emitted(self, config: Config) -> Emitted:
        signature = signature_for(self.form, self.dims, self.dtype, self.target)
        return emit(self.form, signature, config, segments=self.segments)

    def job(self, kernel: str, config: Config) -> Job:
        """The compilation of the kernel of that name under `config`, or of one that calls it."""
        emitted = self.emitted(config)
        launched = (*emitted.forward, *emitted.backward)
        found = next(k for k in launched if kernel in (k.name, *k.calls))
        buffers = tuple(emitted.buffers(found).items())
        signature = signature_for(self.form, self.dims, self.dtype, self.target)
        return Job(found, buffers, signature, self.target, self.packed)

    def kernels(self, config: Config) -> dict[str, tuple[str, ...]]:
        """The names of launched kernels, each with those under which `config` has its tiles."""
        emitted = self.emitted(config)
        chosen = [emitted.forward] if "forward" in self.directions else []
        chosen += [emitted.backward] if "backward" in self.directions else []
        return {k.name: k.calls or (k.name,) for program in chosen for k in program}


def ladder(config: KernelConfig) -> tuple[KernelConfig, ...]:
    """The tiles tried for one kernel, from the given ones down: stages first, then widths."""
    rungs = [config, replace(config, stages=1)]
    for size in (32, 16):
        v_tile, k_tile = min(size, config.v_tile), min(size, config.k_tile)
        rungs += [
            replace(config, stages=1, v_tile=v_tile),
            replace(config, stages=1, v_tile=v_tile, k_tile=k_tile),
        ]
    return tuple(dict.fromkeys(rungs))


def chunks_below(chunk: int) -> tuple[int, ...]:
    """The chunk lengths tried, the given one first."""
    return (chunk, *(c for c in _CHUNKS if c < chunk))


@dataclass(slots=True, eq=False)
class Search:
    """The descent of one subject to tiles that fit: a rung per kernel, for each chunk length.

    Attributes:
        names: of each launched kernel, the names under which a configuration has its tiles.
        attempt: the index of the chunk length being tried.
        rungs: the rung of each kernel being tried.
        found: the outcomes of the kernels that fit, at this chunk length.
        errors: the compiler's errors, by kernel.
        first: the outcome of each kernel in the default configuration.
        failed: a kernel that fits with no tiles; empty if there is none.
    """

    subject: Subject
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attempt: int = 0
    rungs: dict[str, int] = field(default_factory=dict)
    found: dict[str, Outcome] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    first: dict[str, Outcome] = field(default_factory=dict)
    failed: str = ""

    def __post_init__(self) -> None:
        self.names = self.subject.kernels(self.subject.default)
        self.rungs = dict.fromkeys(self.names, 0)

    @property
    def config(self) -> Config:
        """The configuration being tried."""
        default = self.subject.default
        chunk = chunks_below(default.chunk)[self.attempt]
        rungs = ((n, rung) for name, rung in self.rungs.items() for n in self.names[name])
        kernels = tuple((n, ladder(default.of(n))[rung]) for n, rung in rungs)
        return replace(default, chunk=chunk, kernels=kernels)

    def pending(self) -> Iterator[tuple[str, Job]]:
        """The compilations that the next decision needs, with the kernels' names."""
        if self.failed:
            return
        for name in self.rungs:
            if name not in self.found:
                yield name, self.subject.job(name, self.config)

    def learn(self, name: str, outcome: Outcome) -> None:
        """Take the outcome of a pending kernel, and go down a rung if it did not fit."""
        if self.failed:
            return
        if name not in self.first:
            self.first[name] = outcome
            if outcome.error:  # even a kernel that does not fit must compile
                self.errors[name] = outcome.error
        if outcome.fits:
            self.found[name] = outcome
            return
        default = self.subject.default
        if self.rungs[name] + 1 < len(ladder(default.of(name))):
            self.rungs[name] += 1
            return
        if self.attempt + 1 < len(chunks_below(default.chunk)):
            self.attempt += 1
            self.rungs = dict.fromkeys(self.rungs, 0)
            self.found = {}
            return
        self.failed = name

    @property
    def finished(self) -> bool:
        """Whether a configuration that fits is found, or none is left to try."""
        return bool(self.failed) or self.found.keys() == self.rungs.keys()

    @property
    def passed(self) -> bool:
        """Whether every kernel compiles, and fits in the configuration that the runtime chooses."""
        return not (self.failed or self.errors or self.changes)

    @property
    def changes(self) -> list[str]:
        """How the configuration that fits differs from the default; empty if it does not."""
        default, config = self.subject.default, self.config
        changes = [] if config.chunk == default.chunk else [f"chunk={config.chunk}"]
        for name in self.rungs:
            old, new = default.of(name), config.of(name)
            if old != new:
                tiles = f"BV={new.v_tile} stages={new.stages}"
                tiles += f" BK={new.k_tile}" if new.k_tile != old.k_tile else ""
                changes.append(f"{name}: {tiles}")
        return changes


# ---- running -------------------------------------------------------------------------------------


def audit(searches: Sequence[Search], workers: int) -> None:
    """Compile until every search has a configuration that fits, or none is left to try."""
    known: dict[str, Outcome] = {}
    while any(not s.finished for s in searches):
        fresh: dict[str, Job] = {}
        waiting: dict[str, list[tuple[Search, str]]] = {}
        for search in searches:
            for name, job in list(search.pending()):
                if job.key in known:
                    search.learn(name, known[job.key])
                else:
                    fresh[job.key] = job
                    waiting.setdefault(job.key, []).append((search, name))
        outcomes = run_jobs(fresh, workers)
        for key, outcome in watched(outcomes, "compiling", len(fresh), "kernel"):
            known[key] = outcome
            for search, name in waiting[key]:
                search.learn(name, outcome)


# ---- which subjects ------------------------------------------------------------------------------


def lowered_forms() -> list[NormalForm]:
    """The library's normal forms that have a chunk form."""
    forms = []
    for declared in library.all_declarations():
        form = declared.normal_form(declared.default_micro)
        try:
            chunk_program(form)
        except NotLowered:
            continue
        forms.append(form)
    return forms


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


def report(searches: Sequence[Search]) -> str:
    """One line per subject, then the compiler's errors and the number of findings."""
    lines = []
    width = max((len(s.subject.label) for s in searches), default=0)
    for s in searches:
        if s.failed:
            verdict = f"DOES NOT FIT: {s.failed} under no configuration tried"
        else:
            shared = max(o.resources.shared for o in s.found.values() if o.resources)
            registers = [o.resources.registers for o in s.found.values() if o.resources]
            most = max((r for r in registers if r is not None), default="unknown")
            spills = [o.resources.spills or 0 for o in s.found.values() if o.resources]
            slow = [
                n for n, o in s.found.items() if o.resources and o.resources.usage.is_serialised
            ]
            limit = s.subject.target.shared_limit
            verdict = f"{shared / 1024:5.1f} of {limit // 1024} KiB, "
            verdict += f"registers {most}, spills {max(spills)} B"
            if slow:
                verdict += f"   {SERIALISED}: {', '.join(slow)}"
            if s.changes:
                verdict += f"   TOO MUCH AS CHOSEN, fits with {'; '.join(s.changes)}"
        lines.append(f"{s.subject.label:<{width}}  {verdict}")
    for s in searches:
        lines += [f"ERROR {s.subject.label} {n}: {e}" for n, e in s.errors.items()]
    good = [s for s in searches if s.passed]
    found = f"{len(searches)} audited, {len(searches) - len(good)} with findings"
    lines.append(f"{found} (Triton {version('triton')})")
    return "\n".join(lines)


def as_json(search: Search) -> dict[str, object]:
    """A search as data: the resources and the configuration of each kernel."""
    config = search.config
    kernels = {}
    for name, outcome in search.first.items():
        last = search.found.get(name, outcome)
        r = last.resources
        tiles = config.of(name)
        kernels[name] = {
            "v_tile": tiles.v_tile,
            "k_tile": tiles.k_tile,
            "warps": tiles.warps,
            "stages": tiles.stages,
            "shared": r.shared if r else None,
            "shared_by_default": outcome.resources.shared if outcome.resources else None,
            "registers": r.registers if r else None,
            "spills": r.spills if r else None,
            "instructions": r.usage.instructions._asdict() if r and r.usage.instructions else None,
            "seconds": round(outcome.seconds, 2),
            "error": outcome.error,
        }
    return {
        "subject": search.subject.label,
        "triton": version("triton"),
        "passed": search.passed,
        "changes": search.changes,
        "chunk": config.chunk,
        "kernels": kernels,
    }
