"""The shipped artifacts are readable, were validated, and are for today's library."""

from __future__ import annotations

import re
from pathlib import Path

import chunkwise.runtime
import pytest
from chunkwise import library
from chunkwise.runtime.tuned import selection
from chunkwise.runtime.tuned.artifact import Artifact

FOLDER = Path(chunkwise.runtime.__file__).parent / "artifacts"
FOUND = dict(selection.scan((FOLDER,)))
FORMS = {
    op.declaration.normal_form(op.declaration.default_micro).digest
    for op in (getattr(library, name) for name in library.names())
}


def test_there_are_some() -> None:
    kinds = {a.key.machine.kind for a in FOUND.values() if isinstance(a, Artifact)}
    assert kinds == {"cuda", "cpu"}


@pytest.mark.parametrize("path", FOUND, ids=lambda p: f"{p.parent.name}/{p.stem[:24]}")
def test_sound_and_current(path: Path) -> None:
    artifact = FOUND[path]
    assert isinstance(artifact, Artifact), artifact
    assert artifact.key.form in FORMS, "its normal form has changed: tune it again"
    assert not artifact.quarantine
    for tuned in artifact.tuned:
        assert tuned.certificate.ok
        assert tuned.certificate.errors
        # no path of the machine that made it
        assert not re.search(r"(^|\W)/\w", tuned.study.storage.replace("://", ""))
