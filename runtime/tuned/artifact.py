"""What tuning leaves behind: configurations by size of call, with the evidence for each.

One artifact per normal form, engine, machine, dtype and dimensions. This file is its only schema:
the tuner writes these dataclasses (`autotune.store`), a call reads them
(`runtime.tuned.selection`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...codegen.config import Config, Dims, EagerConfig
from ...codegen.limits import Form, Within
from ...codegen.tir.config import TvmConfig
from ...dsl import errors
from ..engines import EngineName
from .json import from_plain, parse, render, to_plain
from .machine import Machine

# raised when what is written means something else than before; a new field needs only a default
SCHEMA = 1
LARGEST = 1 << 22  # bytes of a file: a thousand times what a tuned size takes
Count = Annotated[int, Within(0, 1 << 53)]
Amount = Annotated[float, Within(0, 1e18)]
Share = Annotated[float, Within(0, 1)]
Digest = Annotated[str, Form("[0-9a-f]{1,64}", "a digest in hexadecimal digits")]
_DTYPES = ("float32", "bfloat16", "float16", "float64")
DtypeName = Annotated[str, Form("|".join(_DTYPES), f"one of {', '.join(_DTYPES)}")]

# what a configuration can be, by engine; a new engine joins both
Configuration = Config | EagerConfig | TvmConfig
CONFIGURATIONS: dict[EngineName, type[Configuration]] = {
    EngineName.TRITON: Config,
    EngineName.EAGER: EagerConfig,
    EngineName.TVM: TvmConfig,
}


@dataclass(frozen=True, slots=True)
class Key:
    """What an artifact is for. `form`: the normal form's digest; `dtype`: of Keys and Values.

    No B, T or N: they belong to the configurations inside.
    """

    form: Digest
    engine: EngineName
    dtype: DtypeName
    dims: Dims
    machine: Machine

    @property
    def path(self) -> str:
        """Where it lies below a folder of artifacts: those of one form stand side by side."""
        dims = f"K{self.dims.K}-V{self.dims.V}"
        name = f"{self.engine.value}-{self.dtype}-{dims}-{self.machine.label}"
        return f"{self.form}/{name}.json"

    def __str__(self) -> str:
        dims = f"K={self.dims.K} V={self.dims.V}"
        return f"{self.engine.value}, {self.dtype}, {dims}, {self.machine}"


@dataclass(frozen=True, slots=True)
class Versions:
    """What compiled and ran it; None where there is no such thing. `backend`: triton, or tvm."""

    chunkwise: str
    torch: str
    backend: str | None = None
    assembler: str | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel of a configuration. `spills`, `shared`: bytes; None where nobody knows."""

    time_us: Amount | None = None
    registers: Count | None = None
    spills: Count | None = None
    shared: Count | None = None


@dataclass(frozen=True, slots=True)
class Error:
    """The worst error of one result over all inputs tried: relative RMS, maximum, RMS allowed."""

    rms: Amount
    maximum: Amount
    limit: Amount


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a configuration was checked for, and how it did.

    Attributes:
        errors: by result (`o`, `final S`, `d q`, `d initial S`), against the float64 oracle.
        inputs: the families of inputs tried.
        faults: why it is not trusted, sentences; empty if it is.
    """

    errors: tuple[tuple[str, Error], ...]
    inputs: tuple[str, ...]
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that was checked held."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class Study:
    """How it was found. `date`: ISO, UTC; `storage`: where the trials are, without secrets."""

    date: str
    trials: Count
    seconds: Amount
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size of call: sequences times value heads, and tokens per sequence."""

    rows: Count
    tokens: Count


@dataclass(frozen=True, slots=True)
class Tuned:
    """The configuration that won for calls about as large as `bucket`.

    Attributes:
        time_us: the median of a forward and a backward; `low_us`, `high_us`: its interval.
        default_us: the same of the configuration that serves untuned calls, measured beside it.
        kernels: what each kernel takes, by name.
    """

    bucket: Bucket
    config: Configuration
    time_us: Amount
    low_us: Amount
    high_us: Amount
    default_us: Amount | None
    kernels: tuple[tuple[str, KernelReport], ...]
    certificate: Certificate
    versions: Versions
    study: Study


@dataclass(frozen=True, slots=True)
class Rejected:
    """A configuration that must not serve on this machine, what it was built by, and why."""

    config: Configuration
    versions: Versions
    reason: str


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where the forward in chunks begins to beat the token loop, for `rows` sequences times heads.

    Up to `low` tokens the token loop is faster, from `high` on the chunks, with the stated
    confidence, found by so many paired timings. None: at no length that was tried.
    """

    rows: Count
    low: Count | None
    high: Count | None
    confidence: Share
    timings: Count


@dataclass(frozen=True, slots=True)
class Artifact:
    """Everything known of one key. `recurrence`: a name for readers, no part of the key."""

    recurrence: str
    key: Key
    tuned: tuple[Tuned, ...] = ()
    quarantine: tuple[Rejected, ...] = ()
    crossovers: tuple[Crossover, ...] = ()


def to_text(artifact: Artifact) -> str:
    """The file's contents: sorted, and the same for equal artifacts."""
    plain = to_plain(ordered(artifact))
    assert isinstance(plain, dict)
    return render({"schema": SCHEMA, **plain})


def from_text(text: str, file: str) -> Artifact:
    """The artifact that a file's contents say.

    Raises:
        BadArtifact: truncated, garbled, of a newer schema, out of its fields' limits, or of
            another engine's configurations.
    """
    try:
        plain = parse(text)
    except ValueError as why:
        raise errors.BadArtifact(file, f"it is not JSON ({why}); was it cut off?") from None
    if not isinstance(plain, dict) or type(plain.get("schema")) is not int:
        raise errors.BadArtifact(file, "it does not say which schema it has")
    schema = plain.pop("schema")
    if schema != SCHEMA:
        raise errors.BadArtifact(file, f"its schema is {schema}, this version reads {SCHEMA}")
    try:
        artifact = from_plain(Artifact, plain)
    except ValueError as why:
        raise errors.BadArtifact(file, str(why)) from None
    kind = CONFIGURATIONS.get(artifact.key.engine)
    for config in (*(x.config for x in artifact.tuned), *(x.config for x in artifact.quarantine)):
        if kind is None or not isinstance(config, kind):
            engine = artifact.key.engine.value
            raise errors.BadArtifact(file, f"it holds what is no configuration of {engine!r}")
    return artifact


def merged(old: Artifact, new: Artifact) -> Artifact:
    """Both artifacts of one key in one, sorted.

    Of two configurations for one bucket the faster stays where both were measured under the same
    versions, else the new one. A configuration leaves the quarantine when it is found right under
    other versions than those that were wrong; no bucket keeps one that is in it.
    """
    right = [(t.config, t.versions) for t in new.tuned]
    quarantine = {
        (r.config, r.versions): r
        for r in (*old.quarantine, *new.quarantine)
        if not any(config == r.config and versions != r.versions for config, versions in right)
    }
    rejected = {config for config, _ in quarantine}
    tuned: dict[Bucket, Tuned] = {}
    for t in (*old.tuned, *new.tuned):
        known = tuned.get(t.bucket)
        better = known is None or known.versions != t.versions or t.time_us < known.time_us
        if better and t.config not in rejected:
            tuned[t.bucket] = t
    crossovers = {c.rows: c for c in (*old.crossovers, *new.crossovers)}
    return ordered(
        Artifact(
            new.recurrence,
            new.key,
            tuple(tuned.values()),
            tuple(quarantine.values()),
            tuple(crossovers.values()),
        )
    )


def ordered(artifact: Artifact) -> Artifact:
    """`artifact` with its lists sorted: by size, and by what they say."""
    return Artifact(
        artifact.recurrence,
        artifact.key,
        tuple(sorted(artifact.tuned, key=lambda x: (x.bucket.rows, x.bucket.tokens))),
        tuple(sorted(artifact.quarantine, key=lambda x: (repr(x.config), repr(x.versions)))),
        tuple(sorted(artifact.crossovers, key=lambda x: x.rows)),
    )
