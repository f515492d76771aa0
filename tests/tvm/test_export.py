"""Exported libraries: from Python with apache-tvm-ffi alone, and from C++ without Python."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import tvm_ffi
from chunkwise.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
K, V = 32, 48  # as in the example


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library of the gated delta rule, and what its functions take, by the command line."""
    path = tmp_path_factory.mktemp("export") / "libgdr.so"
    command = ["export", "gated_delta_rule", "-o", str(path), "--target", "llvm"]
    with redirect_stdout(StringIO()) as printed:
        assert main([*command, "--dims", f"K={K},V={V}"]) == 0
    return path, printed.getvalue()


def test_it_says_what_it_takes(library: tuple[Path, str]) -> None:
    _, text = library
    lines = text.splitlines()
    assert lines[0].startswith(f"gated_delta_rule: K={K} V={V} float32")
    assert [x.split(":")[0] for x in lines if x.startswith(("forward", "backward"))] == [
        "forward_scan",
        "backward_states",
        "backward_reverse",
    ]
    assert any(x.split()[:3] == ["k", f"[*,*,*,{K}]", "float32"] for x in lines)


@pytest.mark.parametrize("cpu", ["x86_64_v3", "pentium"])
def test_unknown_cpus(cpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLVM would take the first for a generic CPU, and end the process at the second."""
    command = ["export", "gated_delta_rule", "-o", str(tmp_path / "x.so"), "--target", "llvm"]
    assert main([*command, "--cpu", cpu]) == 2
    assert f"--cpu {cpu}: LLVM knows no such CPU" in capsys.readouterr().err


ALONE = """
import sys
import numpy, tvm_ffi
library = tvm_ffi.load_module(sys.argv[1])
random = numpy.random.default_rng(0)
draw = lambda *shape: random.standard_normal(shape, dtype=numpy.float32)
T, K, V = 40, 32, 48
q, k, v = draw(1, T, 1, K), draw(1, T, 1, K) / 6, draw(1, T, 1, V)
g, beta = -draw(1, T, 1) ** 2, draw(1, T, 1)
o, last = numpy.empty((T, 1, V), "float32"), numpy.empty((1, 1, K, V), "float32")
scratch = numpy.empty(library.forward_scan_scratch(), "float32")
sequences = numpy.array([[0, 0, T, 0, 0]])
chunks = numpy.array([[0, c] for c in range(-(-T // library.chunk()))])
tables = [sequences, chunks, scratch]
state = draw(1, 1, K, V)
tensors = [state, g, q, k, beta, v, o, last, *tables]
library.forward_scan(*map(tvm_ffi.from_dlpack, tensors), 1, 0, 1)
state = state[0, 0].astype("float64")
for t in range(T):
    state *= numpy.exp(g[0, t, 0])
    state += beta[0, t, 0] * numpy.outer(k[0, t, 0], v[0, t, 0] - k[0, t, 0] @ state)
    assert numpy.allclose(o[t, 0], q[0, t, 0] @ state, atol=1e-4)
assert numpy.allclose(last[0, 0], state, atol=1e-4)
assert not {"tvm", "chunkwise"} & set(sys.modules)
"""


def test_from_python_with_tvm_ffi_alone(library: tuple[Path, str]) -> None:
    path, _ = library
    subprocess.run([sys.executable, "-c", ALONE, str(path)], check=True)


def test_a_wrong_argument_is_an_error(library: tuple[Path, str]) -> None:
    path, _ = library
    scan = tvm_ffi.load_module(str(path))["forward_scan"]
    x = torch.empty(1, 4, 1, K)
    with pytest.raises(TypeError, match="Expected 14 arguments"):
        scan(x, 0, 1)
    gates, values = torch.empty(1, 4, 1), torch.empty(1, 4, 1, V)
    ends = [torch.empty(4, 1, V), torch.empty(1, 1, K, V)]
    tables = [torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)]
    given = [torch.empty(0, 1, K, V), gates, x, x, gates, values, *ends, *tables]
    with pytest.raises(ValueError, match="scratch"):
        scan(*given, torch.empty(8), 1, 0, 1)


def test_from_cpp(library: tuple[Path, str], tmp_path: Path) -> None:
    """The example builds, runs on two threads, and equals the token loop that it holds."""
    path, _ = library
    cmake = [sys.executable, "-m", "tvm_ffi.config", "--cmakedir"]
    folder = subprocess.run(cmake, capture_output=True, text=True, check=True).stdout.strip()
    configure = ["cmake", "-S", EXAMPLE, "-B", tmp_path, f"-Dtvm_ffi_DIR={folder}"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = [tmp_path / "gated_delta", path]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest error" in done.stdout
