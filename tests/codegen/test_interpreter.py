"""The Triton kernels, run by Triton's interpreter: every class, every plan, every feature.

Chunks of 16 tokens, so that a few tokens make several chunks; buffers start as NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Config
from chunkwise.codegen.plan import Plan
from chunkwise.dsl.library import all_declarations, by_name
from chunkwise.runtime.triton import engine as triton_engine
from chunkwise.runtime.triton import launch_plan

from tests.classes import CLASSES, costly, lowered, plan_pairs
from tests.harness import Gates, Layout, Sizes, engine_results, make_inputs, oracle_results
from tests.interpreted import CHUNK, TILES, Poisoned, served_under, small
from tests.tolerances import BY_DTYPE, FLOAT32_HARD, Tolerance, assert_agree

pytestmark = pytest.mark.interpreter

C = CHUNK
Serve = Callable[..., None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Has every call of the Triton engine served under one configuration, with NaN in buffers."""
    monkeypatch.setattr(launch_plan, "torch", Poisoned())

    def under(config: Config, segment: int = 0) -> None:
        compiled_for = served_under(lambda form: config, segment)
        monkeypatch.setattr(triton_engine, "_compiled_for", compiled_for)

    return under


NAMES = [d.name for d in all_declarations() if lowered(d)]


def _agree(name: str, sizes: Sizes, tolerance: Tolerance) -> None:
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    assert_agree(engine_results(op, inputs, "triton"), oracle_results(op, inputs), tolerance)


def _config(name: str) -> Config:
    return small(by_name(name).normal_form())


# three calls cover the features: what could interact is together, what could hide is apart
CASES: dict[str, tuple[Sizes, Tolerance]] = {
    # ends of sequences at every position of a chunk; two tiles of V, padded tiles of K and V
    "packed, grouped, K != V": (
        Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float32).packed(0, C - 1, C + 1),
        BY_DTYPE[torch.float32],
    ),
    # a read beyond an operand is NaN; gates that overflow if factorised; no initial state
    "views, hard gates": (
        Sizes(
            B=1,
            T=2 * C,
            H=1,
            HV=1,
            K=17,
            V=4,
            dtype=torch.float32,
            gates=Gates.HARD,
            layout=Layout.VIEWS,
        ),
        FLOAT32_HARD,
    ),
    # half precision: what is rounded, and what must not be
    "float16": (
        Sizes(
            B=2,
            T=C + 3,
            H=1,
            HV=1,
            K=8,
            V=8,
            initial=True,
            dtype=torch.float16,
            gate_dtype=torch.float32,
        ),
        BY_DTYPE[torch.float16],
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", costly(NAMES))
def test_kernels_are_the_token_loop(name: str, case: str, serve: Serve) -> None:
    serve(_config(name))
    _agree(name, *CASES[case])


# a state passes several segments; one is empty, one begins as another ends
IN_SEGMENTS = Sizes(H=1, HV=2, K=5, V=19, initial=True, dtype=torch.float32).packed(4 * C + 1, 0, C)


@pytest.mark.parametrize("name", CLASSES)
def test_scans_of_segments_are_the_token_loop(name: str, serve: Serve) -> None:
    serve(_config(name), segment=C)
    _agree(name, IN_SEGMENTS, BY_DTYPE[torch.float32])


def test_segments_of_several_chunks(serve: Serve) -> None:
    """Of two, the last of one; batches that are not packed, keys of more than one tile."""
    serve(_config("gated_delta_rule"), segment=2 * C)
    sizes = Sizes(B=2, T=5 * C - 3, H=1, HV=1, K=17, V=4, initial=True, dtype=torch.float32)
    _agree("gated_delta_rule", sizes, BY_DTYPE[torch.float32])


@pytest.mark.parametrize("name", ["simple_gla", "kda", "linear_attention_normalised"])
@pytest.mark.parametrize("T", [0, 1, C - 1, C])  # around nothing, one token, a whole chunk
def test_short_sequences(name: str, T: int, serve: Serve) -> None:
    serve(_config(name))
    sizes = Sizes(B=1, T=T, H=1, HV=1, K=3, V=4, initial=True, dtype=torch.float32)
    _agree(name, sizes, BY_DTYPE[torch.float32])


@pytest.mark.parametrize("name", ["gla", "gated_delta_rule"])
def test_the_default_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as long as on a GPU, K = 100: a tile that is wider than its operand."""
    monkeypatch.setattr(launch_plan, "torch", Poisoned())
    sizes = Sizes(B=1, T=70, H=1, HV=2, K=100, V=36, initial=True, dtype=torch.float32)
    _agree(name, sizes, BY_DTYPE[torch.float32])


# every plan of one recurrence; of the others every fifth, which has every kind of choice
# (all of them: pytest --every-plan; in float64, eagerly, test_agreement.py always runs them all)
def test_plans(planned: tuple[str, Plan, Plan, Sizes], serve: Serve) -> None:
    name, forward, backward, sizes = planned
    serve(Config(C, forward, backward, TILES))
    _agree(name, sizes, BY_DTYPE[torch.float32])


# kernels that loop over tiles of the keys, of the values
TALL = Sizes(B=1, T=C + 4, H=1, HV=1, K=19, V=5, initial=True, dtype=torch.float32)
WIDE = Sizes(B=1, T=C + 4, H=1, HV=1, K=5, V=19, initial=True, dtype=torch.float32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "planned" not in metafunc.fixturenames:
        return
    thin = not metafunc.config.getoption("--every-plan")
    cases = {}
    for name in CLASSES:
        step = 5 if thin and name != "gated_delta_rule" else 1
        for n, pair in plan_pairs(name):
            if n % step == 0:
                # kinds of hoisting repeat every 8 plans: each meets both sizes
                cases[f"{name}-{n}"] = (name, *pair, WIDE if (n + n // 8) % 2 else TALL)
    metafunc.parametrize("planned", list(cases.values()), ids=list(cases))


@pytest.mark.parametrize("at", [3, C])  # within a chunk; at the seam of two
@pytest.mark.parametrize("name", ["gla", "kda"])
def test_the_future_does_not_change_the_past(name: str, at: int, serve: Serve) -> None:
    """Bit for bit, with gates that differ by orders of magnitude."""
    serve(_config(name))
    op = getattr(cw.library, name)
    sizes = Sizes(B=1, T=C + 2, H=1, HV=1, K=4, V=4, dtype=torch.float32, gates=Gates.HARD)
    operands = {n: x.detach() for n, x in make_inputs(op, sizes).operands.items()}
    before, _ = op(**operands, engine="triton")
    changed = {n: x.clone() for n, x in operands.items()}
    for x in changed.values():
        x[:, at:] *= 0.5
    after, _ = op(**changed, engine="triton")
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])
