"""What all tests share: Hypothesis draws the same examples everywhere, and a faster interpreter."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(scope="module", autouse=True)
def _untuned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tuned artifacts, shipped or the user's, must not change the kernels that tests run."""
    from chunkwise.runtime.tuned import selection

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
    """Replace functions that take two thirds of the interpreter's time by a few lines of NumPy."""
    try:
        import triton
    except ModuleNotFoundError:
        return
    if not triton.knobs.runtime.interpret:
        return
    from tests.interpreted import hasten

    hasten()


@pytest.fixture(autouse=True)
def _nothing_prepared() -> None:
    """A test may change what serves a layout."""
    from chunkwise.runtime.prepared import Records

    Records.forget()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a worker per core: more threads would only wait for one another
