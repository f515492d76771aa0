"""Builds sdist and wheel, installs the wheel in a fresh environment, and uses it.

`python -m tests.wheel` (`make wheel`) leaves both files in dist/. The wheel is built from the
sdist, so that both are known to be whole. The fresh environment borrows torch and all else from
this one by a path, which does not show this one's own chunkwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# folders of the sources, by their place in the wheel
SOURCES = {"api": "", **{name: f"{name}/" for name in ("dsl", "codegen", "runtime", "autotune")}}
CALL = """
import torch, chunkwise as cw, chunkwise.integrations.transformers
q, k, v = (torch.randn(1, 50, 2, 8, requires_grad=True) for _ in range(3))
o, _ = cw.library.delta_rule(q, k, v, torch.rand(1, 50, 2))
o.sum().backward()
assert o.isfinite().all() and v.grad.abs().sum() > 0
print(cw.__version__, cw.__file__)
"""


def built(folder: Path) -> Path:
    """The wheel, made from the sdist by the tools of this environment."""
    for old in (*folder.glob("chunkwise-*.whl"), *folder.glob("chunkwise-*.tar.gz")):
        old.unlink()
    command = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (wheel,) = folder.glob("chunkwise-*.whl")
    return wheel


def missing(wheel: Path) -> list[str]:
    """The sources, artifacts and other files of the packages that the wheel lacks."""
    held = set(zipfile.ZipFile(wheel).namelist())
    kept = (".py", ".md", ".json", ".typed")
    wanted = [
        f"chunkwise/{below}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, below in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kept or path.name == "py.typed"
    ]
    return sorted(set(wanted) - held)


def environment(folder: Path, wheel: Path) -> Path:
    """The programs of a fresh environment with the wheel, and this one's packages on its path."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def main() -> int:
    """Build, install, use; 0 if all of it works."""
    started = time.perf_counter()
    wheel = built(ROOT / "dist")
    lacking = missing(wheel)
    if lacking:
        raise SystemExit(f"{wheel.name} lacks {', '.join(lacking)}")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        programs = environment(home / "venv", wheel)
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        clean |= {"HOME": name, "XDG_CACHE_HOME": f"{name}/cache"}
        for command in (
            ["chunkwise", "--version"],
            ["chunkwise", "list"],
            ["chunkwise", "new", "first_rule"],
            ["chunkwise", "explain", "first_rule/first_rule.py"],
            ["chunkwise", "doctor"],
            ["python", "-c", CALL],
        ):
            done = subprocess.run(
                [programs / command[0], *command[1:]],
                cwd=home,
                env=clean,
                capture_output=True,
                text=True,
                check=False,
            )
            print("$", *(command if len(command) < 4 and command[1] != "-c" else command[:2]))
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
        if str(home) not in done.stdout:
            raise SystemExit(f"another chunkwise was imported: {done.stdout}")
    print(f"{wheel.relative_to(ROOT)} works, in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
