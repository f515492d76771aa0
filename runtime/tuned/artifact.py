"""Artifacts, the results of tuning: configurations by size of call, with the evidence for each.

There is one artifact per normal form, engine, machine, dtype and dimensions. The dataclasses of
this module are its schema: the tuner writes them (`autotune.store`), and a call reads them
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

# increased when the meaning of a field changes; a new field only needs a default
SCHEMA = 1
LARGEST = 1 << 22  # bytes of a file: a thousand times those of one tuned configuration
Count = Annotated[int, Within(0, 1 << 53)]
Amount = Annotated[float, Within(0, 1e18)]
Share = Annotated[float, Within(0, 1)]
Digest = Annotated[str, Form("[0-9a-f]{1,64}", "a digest in hexadecimal digits")]
_DTYPES = ("float32", "bfloat16", "float16", "float64")
DtypeName = Annotated[str, Form("|".join(_DTYPES), f"one of {', '.join(_DTYPES)}")]

# the type of each engine's configurations; a new engine is added to both
Configuration = Config | EagerConfig | TvmConfig
CONFIGURATIONS: dict[EngineName, type[Configuration]] = {
    EngineName.TRITON: Config,
    EngineName.EAGER: EagerConfig,
    EngineName.TVM: TvmConfig,
}


@dataclass(frozen=True, slots=True)
class Key:
    """The recurrence, engine, dtype, dimensions and machine that an artifact is for.

    `form` is the digest of the normal form, `dtype` that of Keys and Values. The size of a call is
    not part of the key, because each configuration in the artifact has a size.
    """

    form: Digest
    engine: EngineName
    dtype: DtypeName
    dims: Dims
    machine: Machine

    @property
    def path(self) -> str:
        """The artifact's path below a folder of artifacts; those of one form share a folder."""
        dims = f"K{self.dims.K}-V{self.dims.V}"
        name = f"{self.engine.value}-{self.dtype}-{dims}-{self.machine.label}"
        return f"{self.form}/{name}.json"

    def __str__(self) -> str:
        dims = f"K={self.dims.K} V={self.dims.V}"
        return f"{self.engine.value}, {self.dtype}, {dims}, {self.machine}"


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions that compiled and ran a configuration; None where there is no such software.

    `backend` is Triton or TVM, `assembler` is ptxas, `driver` is NVIDIA's.
    """

    chunkwise: str
    torch: str
    backend: str | None = None
    assembler: str | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The time and resources of a kernel, None where unknown; `spills`, `shared` are in bytes."""

    time_us: Amount | None = None
    registers: Count | None = None
    spills: Count | None = None
    shared: Count | None = None


@dataclass(frozen=True, slots=True)
class Error:
    """The worst error of a result over all inputs: relative RMS and maximum, and allowed RMS."""

    rms: Amount
    maximum: Amount
    limit: Amount


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result of validating a configuration.

    Attributes:
        errors: the worst errors by result (`o`, `final S`, `d q`, `d initial S`), against the
            float64 oracle.
        inputs: the families of inputs tried.
        faults: sentences that say why the configuration is not trusted; empty if it is.
    """

    errors: tuple[tuple[str, Error], ...]
    inputs: tuple[str, ...]
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class Study:
    """The search that found a configuration: `date` in ISO and UTC, `storage` without secrets."""

    date: str
    trials: Count
    seconds: Amount
    storage: str | None = None


@dataclass(frozen=True, slots=True)
class CallSize:
    """The size of a call: `rows` is sequences times value heads, `tokens` are per sequence."""

    rows: Count
    tokens: Count


@dataclass(frozen=True, slots=True)
class Tuned:
    """The configuration that won for calls about as large as `bucket`.

    Attributes:
        time_us: the median time of a forward and a backward in microseconds; `low_us` and
            `high_us` are its 95 % confidence interval.
        default_us: the median time of the default configuration, measured in the same race.
        kernels: the time and resources of each kernel, by name.
    """

    bucket: CallSize
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
    """A configuration that must not serve on this machine, the versions that built it, and why."""

    config: Configuration
    versions: Versions
    reason: str


@dataclass(frozen=True, slots=True)
class Crossover:
    """The length at which the forward in chunks begins to beat the token loop.

    For calls of `rows` sequences times heads, the token loop is faster up to `low` tokens and the
    chunks are faster from `high` tokens on (None: at no length tried). Both hold with probability
    `confidence`, by `timings` paired timings.
    """

    rows: Count
    low: Count | None
    high: Count | None
    confidence: Share
    timings: Count


@dataclass(frozen=True, slots=True)
class Artifact:
    """All results for one key; `recurrence` is a name for readers and not part of the key."""

    recurrence: str
    key: Key
    tuned: tuple[Tuned, ...] = ()
    quarantine: tuple[Rejected, ...] = ()
    crossovers: tuple[Crossover, ...] = ()


def to_text(artifact: Artifact) -> str:
    """The file's text, sorted, so that equal artifacts have equal texts."""
    plain = to_plain(ordered(artifact))
    assert isinstance(plain, dict)
    return render({"schema": SCHEMA, **plain})


def from_text(text: str, file: str) -> Artifact:
    """The artifact in `text`; errors name `file`.

    Raises:
        BadArtifact: the text is truncated, garbled or of another schema, exceeds a field's limits,
            or holds configurations of another engine.
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
    """The union of two artifacts of one key, sorted.

    Of two configurations for one size of call, the faster one stays if both were measured under the
    same versions, else the new one. A configuration leaves the quarantine when it passes validation
    under other versions than those that failed. A configuration in quarantine serves no size.
    """
    right = [(t.config, t.versions) for t in new.tuned]
    quarantine = {
        (r.config, r.versions): r
        for r in (*old.quarantine, *new.quarantine)
        if not any(config == r.config and versions != r.versions for config, versions in right)
    }
    rejected = {config for config, _ in quarantine}
    tuned: dict[CallSize, Tuned] = {}
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
    """`artifact` with its lists sorted, by size or by text."""
    return Artifact(
        artifact.recurrence,
        artifact.key,
        tuple(sorted(artifact.tuned, key=lambda x: (x.bucket.rows, x.bucket.tokens))),
        tuple(sorted(artifact.quarantine, key=lambda x: (repr(x.config), repr(x.versions)))),
        tuple(sorted(artifact.crossovers, key=lambda x: x.rows)),
    )
