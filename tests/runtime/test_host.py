"""What Python does for a call whose layout is known: few calls of functions, in few files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import chunkwise as cw
import pytest
import torch
import triton
from chunkwise.runtime.triton import engine as triton_engine
from torch import Tensor

from tests.offline_driver import Driver

FILES, CALLS = 7, 14  # on the way of a tensor from the op to the launch, what is kept included
OP = cw.library.gated_delta_rule


def _ours(frame: FrameType | None) -> bool:
    """Whether a frame is of a file of this package, not of source that is generated."""
    if frame is None or frame.f_code.co_filename.startswith("<"):
        return False
    return str(frame.f_globals.get("__name__")).startswith("chunkwise.")


def way(run: Callable[[], object]) -> list[tuple[str, str]]:
    """The file and name of every function of ours that is called until the first launch.

    Without those that torch calls back (kernels of an op).
    """
    run(), run(), run()  # type: ignore[func-returns-value]
    found: list[tuple[str, str]] = []
    launched = False

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal launched
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if event == "call":
            launched |= file.startswith("<chunkwise") or name == "launch"
        elif event == "return":  # of TVM's kernels, which are no Python, all is done by then
            launched |= name in ("__call__", "run") and file.endswith("tvm/engine.py")
        called_back = bool(found) and not _ours(frame.f_back)
        inlined = name.startswith("<")  # comprehensions, since Python 3.12
        if event == "call" and _ours(frame) and not (inlined or launched or called_back):
            found.append((file, name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def _few(run: Callable[[], object]) -> None:
    found = way(run)
    text = "\n".join(f"{Path(file).name} {name}" for file, name in found)
    assert len(found) <= CALLS, text
    assert len({file for file, _ in found}) <= FILES, text


def _operands(T: int) -> list[Tensor]:
    q, k, v = (torch.randn(2, T, 2, 16) for _ in range(3))
    return [q, k, v, -torch.rand(2, T, 2), torch.rand(2, T, 2)]


@pytest.mark.parametrize("engine", ["tvm", "eager"])
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_call_on_a_cpu(engine: str, T: int, gradients: bool) -> None:
    x = [t.requires_grad_(gradients) for t in _operands(T)]
    _few(lambda: OP(*x, engine=engine))


def test_a_call_on_several_threads() -> None:
    torch.set_num_threads(2)
    x = _operands(40)
    _few(lambda: OP(*x, engine="tvm"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """Has the Triton engine launch nothing, on tensors of the CPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(triton_engine, "_no_device", lambda device: None)
    return made


@torch.no_grad()
def test_triton(driver: Driver) -> None:
    x = _operands(40)
    _few(lambda: OP(*x, engine="triton"))
    assert driver.launches > 4
    token = [t[:, 0] for t in x]
    state: Any = torch.zeros(2, 2, 16, 16)
    _few(lambda: OP.step(*token, state=state, engine="triton"))


@torch.no_grad()
def test_a_step() -> None:
    token, state = [t[:, 0] for t in _operands(1)], torch.zeros(2, 2, 16, 16)
    _few(lambda: OP.step(*token, state=state))


@torch.no_grad()
def test_a_step_by_a_name_of_fla() -> None:
    x, state = _operands(1), torch.zeros(2, 2, 16, 16)
    run = cw.fla.fused_recurrent_gated_delta_rule
    names = ("q", "k", "v", "g", "beta")
    _few(lambda: run(**dict(zip(names, x, strict=True)), initial_state=state))
