"""The TVM engine within a process: its threads, forks, torch.compile, its cache, its imports."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
import tvm_ffi
from chunkwise.codegen.config import Dims, Precision
from chunkwise.codegen.interface import Dtype, Signature
from chunkwise.codegen.programs import forward_program
from chunkwise.codegen.tir.kernel import print_tir
from chunkwise.runtime.prepared import Records
from chunkwise.runtime.tvm import allocator
from chunkwise.runtime.tvm import build as tvm_build
from chunkwise.runtime.tvm import engine as tvm_engine
from chunkwise.runtime.tvm import threads as tvm_threads
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

OP = cw.library.linear_attention
Threads = Callable[[int], None]


def _operands(B: int = 3, T: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, 2, 8, generator=random) for _ in range(3))
    return q, k, v


def _output() -> Tensor:
    o: Tensor = OP(*_operands(), engine="tvm")[0]
    return o


def test_results_do_not_depend_on_the_number_of_threads(set_threads: Threads) -> None:
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(_output())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_more_threads_than_torch_has(
    monkeypatch: pytest.MonkeyPatch, set_threads: Threads
) -> None:
    seen: list[int] = []
    run = tvm_engine.run

    def watched(works: Any, items: int, threads: int) -> None:
        seen.append(threads)
        run(works, items, threads)

    monkeypatch.setattr(tvm_engine, "run", watched)
    set_threads(3)
    _output()
    assert seen == [3]


def test_under_torch_compile() -> None:
    """One node, no break; gradients as without."""
    q, k, v = (x.requires_grad_() for x in _operands())

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OP(2 * q, k, v, engine="tvm")[0].square().sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), want, strict=True):
        assert torch.equal(got, expected)


class _Outputs(Dataset[Tensor]):
    """Calls the op where the worker is."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> Tensor:
        del n
        return _output()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12: it is the point
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_workers(method: str) -> None:
    """After the parent's threads have run: none of them is there in a forked child."""
    torch.set_num_threads(2)
    want = _output()
    context = multiprocessing.get_context(method)
    for got in DataLoader(
        _Outputs(), batch_size=None, num_workers=1, multiprocessing_context=context
    ):
        assert torch.equal(got, want)


def test_threads_are_torchs_own(monkeypatch: pytest.MonkeyPatch, set_threads: Threads) -> None:
    """Ours would compete with them for the cores; ours only where torch has none of OpenMP's."""
    set_threads(2)
    shared: list[int] = []
    share = tvm_threads.share

    def watched(items: int, threads: int, work: Any) -> None:
        shared.append(threads)
        share(items, threads, work)

    monkeypatch.setattr(tvm_threads, "share", watched)
    want = _output()
    openmp = sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info()
    openmp = openmp and any(map(shutil.which, ("cc", "gcc", "clang", "ld")))
    assert bool(shared) != openmp
    monkeypatch.setattr(tvm_threads, "_team", lambda: None)
    assert torch.equal(_output(), want)
    assert shared[-1] == 2


def _output_of_two_threads() -> Tensor:
    torch.set_num_threads(2)
    return _output()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_threads_in_a_child(method: str, set_threads: Threads) -> None:
    """Of a parent whose threads have run: an OpenMP loop would wait for those for ever."""
    set_threads(2)
    want = _output()
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert torch.equal(pool.apply_async(_output_of_two_threads).get(), want)


@pytest.mark.parametrize("team", [True, False])
def test_an_error_in_a_thread_reaches_the_caller(
    team: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(begin: int, end: int) -> None:
        raise RuntimeError(f"{begin} {end} failed")

    if not team:
        monkeypatch.setattr(tvm_threads, "_team", lambda: None)
    with pytest.raises(RuntimeError, match="failed"):
        tvm_threads.run([tvm_threads.Work(tvm_ffi.convert(kernel), ())], 8, 2)
    assert _output().isfinite().all()


def test_every_item_is_done_once_by_each_of_several_kernels() -> None:
    done: list[tuple[str, int, int]] = []

    def kernel(name: str) -> tvm_threads.Work:
        def items(scale: float, begin: int, end: int) -> None:
            assert scale == 0.5
            done.append((name, begin, end))

        each = 2 if name == "second" else 1
        return tvm_threads.Work(tvm_ffi.convert(items), (0.5,), each=each)

    works = [kernel("first"), kernel("second")]
    tvm_threads.run(works, 50, 3)
    assert sorted(done) == sorted(
        [("first", n, n + 1) for n in range(50)] + [("second", 2 * n, 2 * n + 2) for n in range(50)]
    )
    tvm_threads.run(works[:1], 0, 3)
    assert len(done) == 100


_OTHER_OPENMP = """
static long begin, end;

void GOMP_parallel_loop_dynamic(void (*run)(void *), void *data, unsigned threads, long start,
                                long stop, long step, long size, unsigned flags) {
  begin = start;
  end = stop;
  run(data);
}

char GOMP_loop_dynamic_next(long *first, long *last) {
  *first = begin;
  *last = end;
  begin = end;
  return *first < *last;
}

void GOMP_loop_end_nowait(void) {}
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler"
)
def test_another_openmp_library_in_the_process(tmp_path: Path) -> None:
    """One whose names come first (torch's run_cpu preloads one) starts the loop and shares it out.

    A team of one library that asked another for its pieces would crash.
    """
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(_OTHER_OPENMP, encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = "import torch\nimport chunkwise as cw\nx = torch.ones(4, 3, 1, 4)\n"
    code += "torch.set_num_threads(2)\n"
    code += "print(float(cw.library.linear_attention(x, x, x, engine='tvm')[0].sum()))\n"
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == 4 * 96.0


@pytest.mark.parametrize("order", ["import torch, tvm", "import tvm, torch"])
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    code = f"{order}\nimport chunkwise as cw\nx = torch.ones(1, 3, 1, 4)\n"
    code += "print(float(cw.library.linear_attention(x, x, x, engine='tvm')[0].sum()))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 96.0  # 4 channels, each 4 times 1 + 2 + 3


def _kernels() -> list[Any]:
    config = tvm_engine.configuration()
    program = forward_program(OP.declaration.normal_form(), config.forward)
    signature = Signature(Dims(4, 4), Dtype.FLOAT32, (), Precision.IEEE)
    return [print_tir(k, signature, config) for k in program.kernels]


def test_damaged_libraries_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    cpu = tvm_build.host_cpu()
    tvm_build.functions(_kernels(), cpu)
    (library,) = (tmp_path / "tvm").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # another file, for this process has mapped the first
    library.write_bytes(whole[: len(whole) // 2])
    tvm_build.functions(_kernels(), cpu)
    assert "damaged" in caplog.text
    assert library.stat().st_size == len(whole)
    written = library.stat().st_mtime_ns
    tvm_build.functions(_kernels(), cpu)
    assert library.stat().st_mtime_ns == written
    assert not [p for p in library.parent.iterdir() if p.is_dir()]


def test_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled into memory, with the same results."""
    want = _output()
    monkeypatch.setenv("CHUNKWISE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", os.devnull)
    tvm_engine.compiled.cache_clear()
    Records.forget()
    assert torch.equal(_output(), want)
    tvm_engine.compiled.cache_clear()
    assert not list((tmp_path / "tvm").glob("*.so"))


def test_what_it_refuses() -> None:
    x = torch.ones(1, 3, 1, 4, dtype=torch.float64)
    with pytest.raises(cw.errors.NotLowered, match=r"q is torch.float64"):
        OP(x, x, x, engine="tvm")


def test_float64_is_computed_by_torch() -> None:
    x = torch.ones(1, 3, 1, 4, dtype=torch.float64)
    assert OP(x, x, x)[0].dtype is torch.float64


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import chunkwise as cw
q, k, v = (torch.ones(1, 3, 1, 8, requires_grad=True) for _ in range(3))
cw.library.linear_attention(q, k, v, engine="tvm")[0].sum().backward()
assert q.grad is not None
"""


def test_no_triton_is_needed() -> None:
    """Triton exists for Linux only."""
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


_TOUCHED = """
import resource
import torch
from chunkwise.runtime.tvm import allocator

allocator.keep_freed_memory()
for n in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [allocator.empty({numbers}).fill_(1) for _ in range({count})]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _touched(numbers: int, count: int) -> list[int]:
    """New pages that come with so many blocks of float32 numbers, time after time."""
    code = _TOUCHED.format(numbers=numbers, count=count)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc keeps what it is told to")
def test_calls_find_the_memory_that_calls_before_them_freed() -> None:
    """20 blocks of 10 MiB have 51200 pages, which the kernel would clear again for every call."""
    assert min(_touched(10 << 18, 20)[1:]) < 1000


_LARGE_PAGES = """
import mmap, resource
block = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.madvise(mmap.MADV_HUGEPAGE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for page in range(0, 64 << 20, 4096):
    block[page] = 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_is_new_in_any_case_comes_in_large_pages() -> None:
    """A block of 64 MiB, which the C library maps anew each time, has 16384 small pages."""
    probe = subprocess.run(
        [sys.executable, "-c", _LARGE_PAGES], capture_output=True, text=True, check=True
    )
    # as few as the machine gives whoever asks; one without large pages gives the small ones
    assert min(_touched(16 << 20, 1)) < int(probe.stdout) + 2000


def test_large_results_are_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(tvm_engine, "LARGE_BLOCK", 1000)
    monkeypatch.setattr(tvm_engine, "in_large_pages", lambda x: made.append(x.data_ptr()))
    o = _output()
    assert o.data_ptr() in made
    assert allocator.keep_freed_memory.cache_info().currsize == 1
