"""What all tests share: Hypothesis draws the same examples everywhere, and a faster interpreter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

# deterministic, so that a change is judged by itself; --hypothesis-profile=audit draws anew
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=False)
settings.register_profile("audit", deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/codegen/golden"
    )
    parser.addoption(
        "--every-plan", action="store_true", help="every plan of every class in the interpreter"
    )


def _scan_by_rows(self: Any, arguments: Any) -> list[Any]:
    """An associative scan as the interpreter does it, but a row at a time, not an element."""
    import numpy as np

    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in arguments]
    types = [x.dtype for x in arguments]
    outputs = [np.zeros_like(a) for a in arrays]
    row = tuple(a[0] for a in arrays)
    for n in range(arrays[0].shape[0]):
        if n:
            before = [self.to_tensor(x, t) for x, t in zip(row, types, strict=True)]
            now = [self.to_tensor(a[n], t) for a, t in zip(arrays, types, strict=True)]
            combined = self.combine_fn.fn(*before, *now)
            combined = combined if isinstance(combined, tuple) else (combined,)
            row = tuple(
                x.handle.data.reshape(a[n].shape) for x, a in zip(combined, arrays, strict=True)
            )
        for out, x in zip(outputs, row, strict=True):
            out[n] = x
    return [
        self.to_tensor(np.moveaxis(x, 0, self.axis), t) for x, t in zip(outputs, types, strict=True)
    ]


@pytest.fixture(scope="module", autouse=True)
def _untuned(request: pytest.FixtureRequest) -> Iterator[None]:
    """What somebody tuned, here or for the package, must not change what the tests run."""
    from chunkwise.runtime import selection

    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in ("autotune", "runtime_export"):  # have folders of their own
            patch.setattr(selection, "SHIPPED", selection.SHIPPED / "none")
            selection._folders.cache_clear()
        else:
            patch.setattr(selection, "folders", lambda: ())
        yield
    selection._folders.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> None:
    """Two thirds of the time of Triton's interpreter go where a few lines of numpy do as well."""
    try:
        import triton
    except ModuleNotFoundError:
        return
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    interpreter.ScanOps.generic_scan = _scan_by_rows
    original = interpreter._get_np_dtype
    of_scalar = functools.lru_cache(maxsize=None)(original)

    def np_dtype(t: Any) -> Any:  # blocks and pointers do not hash
        return original(t) if t.scalar.is_ptr() else of_scalar(t.scalar)

    interpreter._get_np_dtype = np_dtype


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a worker per core: more threads would only wait for one another
