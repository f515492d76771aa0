"""The list of packages matches the tree (an omission would be silent), and the import is light."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGES = {"tests", "benchmarks", "examples", "docs", "build", "dist", "out"}


def _section(name: str) -> str:
    """The text of one table of pyproject.toml (tomllib came with Python 3.11)."""
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(rf"^\[{re.escape(name)}\]$(.*?)(?=^\[|\Z)", text, re.M | re.S)
    assert match is not None, f"pyproject.toml has no [{name}]"
    return match[1]


def _package_dirs() -> dict[str, str]:
    """Package name to top-level folder, as declared."""
    pattern = r'^"?([\w.]+)"? = "([\w/]+)"'
    return dict(re.findall(pattern, _section("tool.setuptools.package-dir"), re.M))


def _packages() -> set[str]:
    listed = re.search(r"^packages = \[(.*?)\]", _section("tool.setuptools"), re.M | re.S)
    assert listed is not None
    return set(re.findall(r'"([\w.]+)"', listed[1]))


def _tree() -> set[str]:
    """Every folder that holds an __init__.py, as the name it would be imported by."""
    folders = {folder: name for name, folder in _package_dirs().items()}
    found = set()
    for init in ROOT.glob("*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[0].startswith(".") or parts[0] in NOT_PACKAGES:
            continue
        top = folders.get(parts[0], f"undeclared:{parts[0]}")
        found.add(".".join((top, *parts[1:])))
    return found


def test_every_package_of_the_tree_is_declared() -> None:
    assert _packages() == _tree()


def test_no_file_is_longer_than_450_lines() -> None:
    """But the catalogue of errors, which is a list: what does two things becomes two files."""
    folders = [*_package_dirs().values(), "benchmarks", "docs", "examples"]
    files = [f for folder in dict.fromkeys(folders) for f in (ROOT / folder).rglob("*.py")]
    lines = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in files}
    assert "dsl/declaration_errors.py" in lines
    too_long = {f: n for f, n in lines.items() if n > 450 and not f.endswith("_errors.py")}
    assert not too_long


def test_every_declared_package_has_a_folder() -> None:
    dirs = _package_dirs()
    for package in _packages():
        top = max((d for d in dirs if f"{package}.".startswith(f"{d}.")), key=len)
        below = package.removeprefix(top).strip(".").replace(".", "/")
        assert (ROOT / dirs[top] / below / "__init__.py").is_file(), package


def test_no_top_folder_shadows_the_import_name() -> None:
    assert not (ROOT / "chunkwise").exists()


def test_import_is_light() -> None:
    # a fresh process: pytest's own has imported half of them
    heavy = ["triton", "optuna", "sympy", "tvm", "matplotlib"]
    code = f"""
import sys, torch
before = set(sys.modules)
import chunkwise
print([m for m in {heavy} if m in sys.modules and m not in before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"importing chunkwise imports {done.stdout}"


def test_a_folder_is_not_importable_by_itself() -> None:
    """A folder imported under its own name would hold a second copy of every class."""
    code = "import dsl"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "import chunkwise.dsl" in done.stderr


def test_the_oldest_stack_is_the_least_that_is_allowed() -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", _section("project"), re.M | re.S)
    assert listed is not None
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)', listed[1]))
    pins = (ROOT / "requirements" / "oldest.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", pins, re.M))
    assert pinned.keys() == least.keys()
    for name, version in least.items():
        assert f"{pinned[name]}.".startswith(f"{version}."), name


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", ["cpu", "interpreter", "neither"])
def test_make_runs_both_halves_and_says_whether_one_failed(failing: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").touch()
    (tools / "pytest").write_text(
        "#!/bin/sh\n"
        "test $TRITON_INTERPRET = 1 && half=interpreter || half=cpu\n"
        f"echo $half >> {tmp_path}/halves\n"
        f"test $half != {failing}\n"
    )
    (tools / "pytest").chmod(0o755)
    (tmp_path / ".ready").touch()
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path}"],
        cwd=ROOT,
        env={**outside, "TRITON_INTERPRET": "0"},
        capture_output=True,
        check=False,
    )
    assert (tmp_path / "halves").read_text().split() == ["cpu", "interpreter"]
    assert (done.returncode == 0) == (failing == "neither")
