"""Selects the tuned configuration for a call: a pure function of its size and the files found.

Files are read once per process. Nothing is timed, and of a device only the name is used, so that
all ranks of a job choose alike: an artifact of the same machine, else one of its architecture, else
none, in which case the engine uses its default.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from ...codegen.config import Dims
from ...dsl import errors
from ...dsl.normal_form import NormalForm
from ..cache import cache_folder, danger, do_without, read_file
from ..engines import EngineName
from .artifact import LARGEST, Artifact, CallSize, Configuration, Key, Tuned, from_text, merged
from .machine import Machine, machine_of

if TYPE_CHECKING:
    from ..call import Call

_LOG = logging.getLogger("chunkwise")
SHIPPED = Path(__file__).parent.parent / "artifacts"
C = TypeVar("C", bound=Configuration)


class Nearness(Enum):
    """How near to this machine the artifact was tuned; the nearest serves."""

    MACHINE = "tuned on this kind of machine"
    ARCHITECTURE = "tuned on another machine of this architecture"
    NONE = "nothing was tuned: the default serves"


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The artifacts found for a key.

    Attributes:
        artifact: the configurations of all `files`, and the quarantine and the crossovers of all
            machines of this architecture; None if there are none of these.
        files: the files whose configurations serve the key.
        misses: for each artifact of this recurrence that does not serve, how its key differs.
    """

    nearness: Nearness
    artifact: Artifact | None = None
    files: tuple[Path, ...] = ()
    misses: tuple[str, ...] = ()


def folders() -> tuple[Path, ...]:
    """The folders with artifacts, the later the stronger: the shipped ones, the user's own."""
    return _folders(cache_folder())


@lru_cache(maxsize=64)
def _folders(own: Path) -> tuple[Path, ...]:
    return (SHIPPED, own / "artifacts")


def key_here(
    form: NormalForm, engine: EngineName, dtype: torch.dtype, dims: Dims, device: torch.device
) -> Key:
    """The key of calls on `device`, as it is now (on a CPU: with this number of threads)."""
    name = str(dtype).removeprefix("torch.")
    return Key(form.digest, engine, name, dims, machine_of(device))


def call_size_of(call: Call) -> CallSize:
    """The size of a call; packed sequences count by their mean length, which needs no sync."""
    return CallSize(call.N * call.HV, -(-call.B * call.T // call.N))


def select_config(
    kind: type[C],
    key: Key,
    size: CallSize,
    default: Callable[[], C],
    fewer: Callable[[C], C] = lambda config: config,
) -> C:
    """The configuration for calls of `key` about as large as `size`: tuned, else `default`.

    `fewer` adapts a configuration to a call of fewer rows, or a machine of other threads, than it
    was tuned for.

    Raises:
        EngineUnavailable: nothing was tuned, and the default was found wrong on this machine.
    """
    found = find(key, folders())
    rejected = {} if found.artifact is None else {r.config: r for r in found.artifact.quarantine}
    chosen = _chosen(found, size)
    if chosen is None:
        config = default()
        if config in rejected:
            raise errors.EngineUnavailable(
                key.engine.value,
                "its default configuration was found wrong on "
                f"{key.machine}: {rejected[config].reason}",
                help='tune it for one that is right (`chunkwise tune`), or name engine="eager"',
            )
    else:
        assert isinstance(chosen.config, kind)  # `from_text` reads no others for this engine
        config = chosen.config
        if found.nearness is Nearness.MACHINE and chosen.bucket.rows <= size.rows:
            return config
    fitted = fewer(config)
    return config if fitted in rejected else fitted


@lru_cache(maxsize=8192)
def _chosen(found: Found, size: CallSize) -> Tuned | None:
    return None if found.artifact is None else nearest(found.artifact, size)


def token_loop_wins(key: Key, size: CallSize) -> bool:
    """Whether the token loop was found faster than chunks in the forward of such calls."""
    artifact = find(key, folders()).artifact
    if artifact is None or not artifact.crossovers:
        return False
    measured = min(artifact.crossovers, key=lambda c: (_far(c.rows, size.rows), c.rows))
    return measured.low is not None and size.tokens <= measured.low


def nearest(artifact: Artifact, size: CallSize) -> Tuned | None:
    """The trusted configuration whose size is nearest to a call's; None if there is none.

    The distance is |log(rows/rows')| + |log(tokens/tokens')|, compared exactly as the product of
    the two ratios; of equals the smaller size. A configuration in quarantine never serves.
    """
    right = _right(artifact)
    if not right:
        return None
    return min(right, key=lambda t: (_ratio(t.bucket, size), t.bucket.rows, t.bucket.tokens))


def _right(artifact: Artifact) -> list[Tuned]:
    rejected = {r.config for r in artifact.quarantine}
    return [t for t in artifact.tuned if t.certificate.ok and t.config not in rejected]


def _ratio(a: CallSize, b: CallSize) -> Fraction:
    return _far(a.rows, b.rows) * _far(a.tokens, b.tokens)


def _far(x: int, y: int) -> Fraction:
    x, y = max(x, 1), max(y, 1)
    return Fraction(max(x, y), min(x, y))


@lru_cache(maxsize=1024)
def find(key: Key, where: tuple[Path, ...]) -> Found:
    """The artifacts below the folders `where` that serve `key`, merged, and why others do not.

    Warns of a file that cannot be trusted, once per process.
    """
    read: list[tuple[Path, Artifact]] = []
    for folder in where:
        for path in _files(folder, key.form):
            artifact = _trusted(path)
            if artifact is not None:
                read.append((path, artifact))
    alike = [(p, a) for p, a in read if _alike(a.key, key)]
    others = [(p, a) for p, a in read if not _alike(a.key, key)]
    misses = tuple(f"{p}: it is for {', '.join(differences(a.key, key))}" for p, a in others)
    tuned = _of_nearest_machine(alike, key, lambda a: bool(_right(a)))
    timed = _of_nearest_machine(alike, key, lambda a: bool(a.crossovers))
    nearness = Nearness.NONE
    if tuned:
        exact = tuned[0][1].key.machine == key.machine
        nearness = Nearness.MACHINE if exact else Nearness.ARCHITECTURE
    _LOG.info("%s: %s", key, nearness.value)
    if not alike:
        return Found(nearness, misses=misses)
    together = reduce(merged, (a for _, a in tuned)) if tuned else Artifact("", key)
    crossovers = {c.rows: c for _, a in timed for c in a.crossovers}
    # a configuration that failed on one machine is not tried on another of its architecture
    wrong = dict.fromkeys(r for _, a in alike for r in a.quarantine)
    artifact = replace(together, quarantine=tuple(wrong), crossovers=tuple(crossovers.values()))
    return Found(nearness, artifact, tuple(p for p, _ in tuned), misses)


def _of_nearest_machine(
    alike: list[tuple[Path, Artifact]], key: Key, useful: Callable[[Artifact], bool]
) -> list[tuple[Path, Artifact]]:
    """The useful artifacts of the one machine that is nearest to the key's."""
    some = [(p, a) for p, a in alike if useful(a)]
    machines = sorted({a.key.machine for _, a in some}, key=lambda m: _distance(m, key.machine))
    return [(p, a) for p, a in some if a.key.machine == machines[0]]


def differences(have: Key, want: Key) -> list[str]:
    """How an artifact's key differs from a call's, as in `dtype float16, not bfloat16`."""
    pairs = (
        ("form", have.form, want.form),
        ("engine", have.engine.value, want.engine.value),
        ("dtype", have.dtype, want.dtype),
        ("dimensions", _dims(have), _dims(want)),
        ("machine", str(have.machine), str(want.machine)),
    )
    return [f"{what} {x}, not {y}" for what, x, y in pairs if x != y]


def _files(folder: Path, forms: str) -> list[Path]:
    """The artifact files below `folder`; warns of files that others may write, and skips them."""
    try:
        found = sorted(folder.glob(f"{forms}/*.json"))
        faults = {} if folder == SHIPPED else {p: danger(folder) or danger(p.parent) for p in found}
    except OSError:  # the folder cannot be read
        return []
    for fault in filter(None, faults.values()):
        do_without(errors.BadCache(str(folder), fault))
    return [p for p in found if not faults.get(p)]


def scan(where: tuple[Path, ...]) -> Iterator[tuple[Path, Artifact | errors.BadArtifact]]:
    """Every artifact below `where`, or the error that refuses it."""
    for folder in where:
        for path in _files(folder, "*"):
            try:
                yield path, read(path)
            except errors.BadArtifact as why:
                yield path, why


def read(path: Path) -> Artifact:
    """The artifact at `path`.

    Raises:
        BadArtifact: it cannot be read, is damaged, of another schema, or lies under the name of
            another key (a copy for another GPU, say).
    """
    try:
        text = read_file(path, LARGEST).decode()
    except (OSError, UnicodeDecodeError) as why:
        raise errors.BadArtifact(str(path), f"it cannot be read: {why}") from None
    artifact = from_text(text, str(path))
    if Path(*path.parts[-2:]) != Path(artifact.key.path):
        what = f"it is for {artifact.key.machine}, and should be called {artifact.key.path}"
        raise errors.BadArtifact(str(path), what)
    return artifact


@lru_cache(maxsize=4096)
def _trusted(path: Path) -> Artifact | None:
    try:
        return read(path)
    except errors.BadArtifact as why:
        warnings.warn(why.render(), RuntimeWarning, stacklevel=2)
        return None


def _alike(have: Key, want: Key) -> bool:
    """Whether all but the machine is equal, and the machine is of the same architecture."""
    here = (want.machine.kind, want.machine.arch)
    return replace(have, machine=want.machine) == want and here == (
        have.machine.kind,
        have.machine.arch,
    )


def _distance(have: Machine, want: Machine) -> tuple[bool, bool, int, str]:
    """The order of preference: the same machine, the same model, similar threads, the name."""
    return (
        have != want,
        have.model != want.model,
        abs(have.threads - want.threads),
        have.label,
    )


def _dims(key: Key) -> str:
    return f"K={key.dims.K} V={key.dims.V}"
