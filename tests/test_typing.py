"""What a user's type checker sees of the built wheel: our types, where it matters most not Any."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "dsl", "codegen", "autotune", "runtime", "report")
USER = """
import chunkwise as cw
import torch
from chunkwise import Key, Scalar, State, Value


@cw.recurrence
def gated(S: State, q: Key, k: Key, v: Value, g: Scalar) -> tuple[State, Value]:
    S = cw.exp(g) * S + cw.outer(k, v)
    return S, q @ S


@cw.recurrence(engine="reference")
def slow(S: State, q: Key, k: Key, v: Value) -> tuple[State, Value]:
    S = S + cw.outer(k, cw.tanh(v))
    return S, cw.l2norm(q) @ S


q, g, x = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2), torch.zeros(1, 4, 64)
o, state = gated(q, q, q, g, output_final_state=True)
layer = cw.nn.RecurrentLayer(cw.library.gated_delta_rule, 64, heads=2, key_dim=8, value_dim=8)
model = cw.nn.LanguageModel(256, 64, [layer, cw.nn.GlobalAttention(64, 2)])
"""
RECURRENCE, TENSOR = "chunkwise.runtime.recurrence.Recurrence", "torch._tensor.Tensor"
SEEN = {
    "gated": RECURRENCE,
    "slow": RECURRENCE,
    "cw.library.gated_delta_rule": RECURRENCE,
    "o": TENSOR,
    "state": f"{TENSOR} | tuple[{TENSOR}, ...] | None",
    "gated.step(q[:, 0], q[:, 0], q[:, 0], g[:, 0])[0]": TENSOR,
    "cw.library.gated_delta_rule(q, q, q, g, g)[0]": TENSOR,
    "cw.library.names()": "tuple[str, ...]",
    "layer(x)": TENSOR,
    "layer.prefill(x)[0]": TENSOR,
    "model(torch.zeros(1, 4, dtype=torch.int64))": TENSOR,
    "cw.fla.chunk_gla(q, q, q, q)[0]": TENSOR,
    "cw.exp(1.0)": "chunkwise.dsl.traced.Traced",
    "cw.errors.NotLowered.__mro__": "tuple[type, ...]",
    "cw.__version__": "str",
}


def _wheel(folder: Path) -> Path:
    """The wheel of this tree, built in a copy of it: building leaves files beside the sources."""
    source = folder / "source"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_a_user_sees_types(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy")
    pytest.importorskip("setuptools")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(_wheel(tmp_path)) as wheel:
        wheel.extractall(installed)
    user = tmp_path / "user.py"
    user.write_text(USER + "".join(f"reveal_type({expression})\n" for expression in SEEN))
    # torch's types take mypy ten seconds, once
    cache = pytestconfig.cache.mkdir("mypy-of-users") if pytestconfig.cache else tmp_path / "cache"
    # on Python's own path the wheel counts as installed: without py.typed mypy would refuse it
    environment = {k: v for k, v in os.environ.items() if k != "MYPYPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), user.name],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert dict(zip(SEEN, found, strict=True)) == SEEN
