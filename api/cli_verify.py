"""The command `chunkwise verify`: validate the configurations of artifacts on this machine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import library
from .autotune.store import save, versions_here
from .autotune.validation import ConfiguredEngine, ValidationSuite, validate, validation_suite
from .cli_command import TARGET, Command, UsageError, add_json, find, print_json
from .cli_progress import Progress
from .dsl.declaration import Declaration
from .runtime.cannot_run import CannotRun
from .runtime.tuned.artifact import Artifact, Certificate, Configuration, Error, Rejected
from .runtime.tuned.machine import Machine, machine_of
from .runtime.tuned.selection import folders, read, scan


@dataclass(frozen=True, slots=True)
class _Checked:
    """A configuration of an artifact, the sizes of call that it serves, and its certificate."""

    config: Configuration
    serves: tuple[str, ...]
    certificate: Certificate

    @property
    def worst(self) -> tuple[str, Error] | None:
        """The result with the largest error relative to its limit; None without results."""
        errors = self.certificate.errors
        return max(errors, key=lambda e: e[1].rms / e[1].limit, default=None)


@dataclass(frozen=True, slots=True)
class _Page:
    """The outcome for one artifact; `refused` says why it was not checked."""

    path: Path
    artifact: Artifact
    refused: str | None
    checked: tuple[_Checked, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all configurations were checked and are right."""
        return self.refused is None and all(c.certificate.ok for c in self.checked)


def _verify(arguments: argparse.Namespace) -> int:
    pages = []
    chosen = list(_chosen(arguments.target))
    for n, (path, artifact) in enumerate(chosen, 1):
        what = f"validating {artifact.recurrence}, artifact {n} of {len(chosen)}"
        with Progress(what, quiet=arguments.json):
            page = _page(path, artifact, arguments.recurrence or arguments.target)
        pages.append(page)
        if not arguments.json:
            _print(page)
    if arguments.json:
        print_json([_plain(page) for page in pages])
    elif not pages:
        print("no artifact is for this machine; `chunkwise doctor` says what there is")
    return 0 if all(page.ok for page in pages) else 1


def _page(path: Path, artifact: Artifact, target: str | None) -> _Page:
    foreign = _foreign(artifact)
    if foreign is not None:
        return _Page(path, artifact, foreign)
    declared = _declared(artifact, target)
    if declared is None:
        why = f"no recurrence of the library has its normal form, {artifact.key.form}"
        return _Page(path, artifact, f"{why}; name it: --recurrence FILE.py:NAME")
    checked = _check(artifact, declared)
    _record(artifact, checked)
    return _Page(path, artifact, None, checked)


def _chosen(target: str | None) -> Iterator[tuple[Path, Artifact]]:
    """The artifact of a file, or all artifacts for this machine (and for the recurrence TARGET).

    Raises:
        BadArtifact: the file cannot be trusted.
    """
    if target is not None and target.endswith(".json"):
        if not Path(target).is_file():
            raise UsageError(f"no file {target}")
        yield Path(target), read(Path(target))
        return
    form = None
    if target is not None:
        declared = find(target).declaration
        form = declared.normal_form(declared.default_micro).digest
    for path, found in scan(folders()):
        if isinstance(found, Artifact) and form in (None, found.key.form) and not _foreign(found):
            yield path, found


def _declared(artifact: Artifact, target: str | None) -> Declaration | None:
    """The declaration whose normal form the artifact is for."""
    named = [] if target is None or target.endswith(".json") else [find(target)]
    for op in [*named, *(getattr(library, name) for name in library.names())]:
        declared: Declaration = op.declaration
        form = declared.normal_form(declared.default_micro)
        if form.digest == artifact.key.form:
            return declared
    return None


def _foreign(artifact: Artifact) -> str | None:
    """Why the artifact cannot be checked on this machine; None if it can."""
    tuned_on = artifact.key.machine
    here = _here(tuned_on.kind)
    if here is not None and (here.kind, here.arch) == (tuned_on.kind, tuned_on.arch):
        return None
    return f"it was tuned on {tuned_on}, and this machine has {here or 'no GPU'}"


def _here(kind: str) -> Machine | None:
    if kind == "cpu":
        return machine_of(torch.device("cpu"))
    return machine_of(torch.device("cuda")) if torch.cuda.is_available() else None


def _check(artifact: Artifact, declared: Declaration) -> tuple[_Checked, ...]:
    key = artifact.key
    device = torch.device("cpu" if key.machine.kind == "cpu" else "cuda")
    sizes: dict[Configuration, list[str]] = {}
    for t in artifact.tuned:
        sizes.setdefault(t.config, []).append(f"{t.bucket.rows} x {t.bucket.tokens}")
    suite = validation_suite(declared, key.dims, getattr(torch, key.dtype), device)
    return tuple(
        _Checked(config, tuple(serves), _certificate(suite, ConfiguredEngine(key.engine, config)))
        for config, serves in sizes.items()
    )


def _certificate(suite: ValidationSuite, runs: ConfiguredEngine) -> Certificate:
    """As `validate`, but a configuration that cannot run has a fault that says so."""
    try:
        return validate(suite, runs)
    except CannotRun as why:
        return Certificate((), (), (f"it does not run: {str(why).splitlines()[0]}",))


def _record(artifact: Artifact, checked: tuple[_Checked, ...]) -> None:
    """Put the configurations that failed into quarantine, in the user's own folder."""
    versions = versions_here(artifact.key.engine)
    failed = tuple(
        Rejected(c.config, versions, "; ".join(c.certificate.faults))
        for c in checked
        if not c.certificate.ok
    )
    if failed:
        save(Artifact(artifact.recurrence, artifact.key, quarantine=failed))


def _plain(page: _Page) -> dict[str, object]:
    rows = []
    for c in page.checked:
        worst = None
        if c.worst is not None:
            name, error = c.worst
            rms = error.rms if math.isfinite(error.rms) else None  # JSON has no NaN
            worst = {"result": name, "rms": rms, "limit": error.limit}
        faults = c.certificate.faults
        rows.append({"serves": c.serves, "ok": c.certificate.ok, "worst": worst, "faults": faults})
    about = {"file": str(page.path), "recurrence": page.artifact.recurrence}
    return {**about, "refused": page.refused, "configurations": rows}


def _print(page: _Page) -> None:
    print(page.path, flush=True)
    print(f"  {page.artifact.recurrence}: {page.artifact.key}")
    if page.refused is not None:
        print(f"  not checked: {page.refused}")
    for c in page.checked:
        verdict = "ok   " if c.certificate.ok else "WRONG"
        errors = ""
        if c.worst is not None:
            name, error = c.worst
            errors = f": worst error {error.rms:.1e} of {error.limit:.1e} ({name})"
        print(f"  {verdict} {', '.join(c.serves)}{errors}")
        for fault in c.certificate.faults:
            print(f"        {fault}")
        if not c.certificate.ok:
            print("        put into quarantine: it serves no more; `chunkwise tune` finds another")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        metavar=TARGET,
        help="an artifact's file (`tune` names it), or a recurrence; default: all for this machine",
    )
    parser.add_argument(
        "--recurrence", metavar="FILE.py:NAME", help="the recurrence of FILE, if not of the library"
    )
    add_json(parser)


VERIFY = Command(
    "verify",
    "Validate the configurations of artifacts on this machine; quarantine those that fail.",
    (
        "chunkwise verify",
        "chunkwise verify gated_delta_rule",
        "chunkwise verify FORM/KEY.json --recurrence my_rules.py:my_rule",
    ),
    _arguments,
    _verify,
)
