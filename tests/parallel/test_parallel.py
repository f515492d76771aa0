"""Recurrences split over ranks are those of one process, and mistakes end on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chunkwise as cw
import pytest
import torch
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import transition_of

from tests.parallel import ranks

LIMIT = 1e-5
# tokens of each rank; whole sequences, and packed ones of which one spans ranks and one is empty
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "two": ([9, 11], {"T": 20, "HV": 4, "initial": True}),
    "two, packed": ([6, 14], {"B": 1, "T": 20, "lengths": (3, 0, 15, 2), "initial": True}),
    "four": ([5, 6, 4, 5], {"T": 20, "initial": True}),
    "four, packed": ([7, 6, 7, 8], {"B": 1, "T": 28, "lengths": (3, 0, 20, 2, 3)}),
    "a border between sequences": ([5, 15], {"B": 1, "T": 20, "lengths": (5, 0, 15)}),
}
# of chunks of 16 tokens, each a segment
SEGMENTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "segments": ([40, 30], {"B": 1, "T": 70, "H": 1, "lengths": (17, 0, 53), "initial": True}),
    "segments, whole": ([40, 30], {"B": 2, "T": 70, "H": 1, "V": 9, "initial": True}),
    "segments, packed": ([40, 70, 20], {"B": 1, "T": 130, "H": 1, "lengths": (3, 0, 100, 20, 7)}),
    "segments, four": ([20, 40, 17, 33], {"B": 1, "T": 110, "H": 1, "HV": 1}),
}


def _names() -> list[str]:
    """The library's recurrences whose segments are derived."""
    found = []
    for name in dir(cw.library):
        op = getattr(cw.library, name)
        if isinstance(op, cw.Recurrence):
            form = op.declaration.normal_form(op.declaration.default_micro)
            try:
                if transition_of(form, Dims(8, 8)) is not None:
                    found.append(name)
            except cw.errors.NotLowered:
                continue
    return found


def _compare(case: str, names: list[str], engine: str, folder: Path) -> None:
    parts, sizes = {**CASES, **SEGMENTS}[case]
    given = {**sizes, "dtype": torch.float32}
    _assert_near(ranks.run(ranks.errors_of, len(parts), folder, names, given, engine, parts))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    parts, sizes = CASES["two"]
    given = {**sizes, "dtype": torch.float32}
    return ranks.run(ranks.of_two, 2, tmp_path_factory.mktemp("two"), parts, given)


def _assert_near(found: list[dict[str, dict[str, float]]]) -> None:
    for rank, by_name in enumerate(found):
        for name, differences in by_name.items():
            for result, far in differences.items():
                assert far <= LIMIT, (rank, name, result, far)


def test_two_ranks_are_one_process(two: list[dict[str, Any]]) -> None:
    """A matrix, and two states that fade; over a border within a sequence, with gradients."""
    _assert_near([found["recurrences"] for found in two])


def test_models_over_ranks_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    """Tokens split, with the halo of short convolutions; heads and batch split, as DTensors."""
    _assert_near([found["models"] for found in two])


def test_what_ranks_receive_does_not_grow_with_tokens(two: list[dict[str, Any]]) -> None:
    state = 4 * 2 * 4 * 4
    assert two[0]["received"] == [(0, state)] * 2
    assert two[1]["received"] == [(state, 0)] * 2


@pytest.mark.long
def test_models_over_four_ranks(tmp_path: Path) -> None:
    _assert_near(ranks.run(ranks.models_of_four, 4, tmp_path))


@pytest.mark.interpreter
def test_a_part_in_segments_is_joined_within_one_call(tmp_path: Path) -> None:
    """The engine whose scans of segments compute the map of a rank's part on their way."""
    _compare("segments", ["gated_delta_rule", "linear_attention"], "triton", tmp_path)


@pytest.mark.interpreter
@pytest.mark.long
@pytest.mark.parametrize("case", ["segments, whole", "segments, packed", "segments, four"])
def test_every_recurrence_is_joined_within_one_call(case: str, tmp_path: Path) -> None:
    _compare(case, _names(), "triton", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["eager", "tvm"])
@pytest.mark.parametrize("case", CASES)
def test_every_recurrence(case: str, engine: str, tmp_path: Path) -> None:
    _compare(case, _names(), engine, tmp_path)


MISTAKES = {
    "sizes": "RankMismatch: on rank 1 V is 5, expected 4 as on rank 0",
    "dtype": "RankMismatch: on rank 1 its call is delta_rule of q float32, k float32, v float32, "
    "beta float16",
    "boundaries": "RankMismatch: on rank 1 cu_seqlens (a checksum) is",
    "total": "BadCuSeqlens: cu_seqlens is 12 at [2], expected T = 10",
    "mixed states": "NotLowered: momentum_delta on several ranks",
    "transform": "NoTransform: delta_rule was called under torch.func or forward mode",
    "transform of a convolution": "NoTransform: a short convolution was called under torch.func",
    "layers": "RankMismatch: on rank 1 B is 2, expected 1 as on rank 0",
    "a layer's total": "BadCuSeqlens: cu_seqlens is 12 at [2], expected T = 10",
    "no group": "BadOption: option 'group' is 'gloo', expected a process group",
    "heads": "ValueError: heads is 3, expected a multiple of the 2 ranks",
    "split twice": "ValueError: Attention is split already",
    "weights of more heads": "size mismatch for project.weight",
    "weights in parts": "ValueError: ranks have parts of the weights",
    "no layer": "TypeError: GELU is not split by heads",
    "mesh": "BadOption: option 'group' is 'a mesh of shape (1, 2)', expected a process group, or a "
    "mesh of one axis: mesh['cp']",
}


def test_mistakes_end_on_every_rank(two: list[dict[str, Any]]) -> None:
    first, second = (found["mistakes"] for found in two)
    for found in (first, second):
        for case, message in MISTAKES.items():
            assert message in found[case]
    assert "on rank 1 its call is refused (BadShape: operand 'v'" in first["refused"]
    assert second["refused"].startswith("BadShape: operand 'v'")
    assert "on rank 1 its call is refused (BadCuSeqlens: cu_seqlens" in first["a layer refused"]
    assert second["a layer refused"].startswith("BadCuSeqlens: cu_seqlens is a list")
    assert first["no tokens"].startswith("BadBatch: operand 'tokens' has batch size 0")
    assert "on rank 0 its call is refused (BadBatch" in second["no tokens"]
    assert "'one of other ranks', expected one with rank 1" in second["outside"]
