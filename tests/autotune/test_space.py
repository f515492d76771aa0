"""The axes of a kernel's space, the rules of its points, and the cost model's predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chunkwise.autotune.explain_cost import explain_cost
from chunkwise.autotune.gpu import GPUS
from chunkwise.autotune.kernel_space import RULES, Choice, axes, point_of, printed, tiles_of, traits
from chunkwise.autotune.predict import bound_us, predict
from chunkwise.autotune.space import Axis, broken, points, text
from chunkwise.codegen.config import Dims, KernelConfig
from chunkwise.codegen.interface import Dtype
from chunkwise.codegen.plan import Kernel
from chunkwise.codegen.programs import backward_program, chunk_program, forward_program
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.codegen.triton.offline import signature_for
from chunkwise.codegen.triton.resources import Target
from chunkwise.dsl.library import by_name
from chunkwise.runtime.tuned.artifact import CallSize

DIMS, SIZE = Dims(128, 128), CallSize(64, 4096)
TILES = KernelConfig(64, 4, 2, 128)


def kernels(name: str) -> dict[str, Kernel]:
    form = by_name(name).normal_form()
    config = default_config(chunk_program(form), DIMS, wide_dtype=False)
    programs = (forward_program(form, config.forward), backward_program(form, config.backward))
    return {k.name: k for p in programs for k in p.kernels}


def choice(name: str, kernel: str, tiles: KernelConfig = TILES, chunk: int = 64) -> Choice:
    form = by_name(name).normal_form()
    signature = signature_for(form, DIMS, Dtype.BFLOAT16, Target.SM90)
    return Choice(kernels(name)[kernel], tiles, chunk, signature, GPUS["h100"])


def test_points_are_every_choice_in_order() -> None:
    space = (Axis("a", (1, 2)), Axis("b", (3,)))
    assert list(points(space)) == [(("a", 1), ("b", 3)), (("a", 2), ("b", 3))]
    assert text((("a", 1), ("b", 3))) == "a=1 b=3"


@pytest.mark.parametrize(
    ("name", "kernel", "wanted"),
    [
        # a scan is split along values by its grid, and pipelined
        ("gated_delta_rule", "forward_scan", {"v_tile", "warps", "stages"}),
        # no value axis, nothing along K after a sum over K: it can loop over keys
        ("gated_delta_rule", "forward_prep", {"k_tile", "warps", "stages"}),
        # it sums over values, in a loop
        ("gated_delta_rule", "backward_gradients", {"v_tile", "warps", "stages"}),
        # along values, without a sum over them: programs, no loop
        ("kda", "backward_values", {"v_tile", "warps"}),
    ],
)
def test_only_what_changes_the_kernel_is_an_axis(name: str, kernel: str, wanted: set[str]) -> None:
    c = choice(name, kernel)
    found = traits(c.kernel, c.chunk, c.signature)
    space = axes(found, DIMS)
    assert {a.name for a in space} == wanted
    sources = set()
    for point in points(tuple(a for a in space if a.name != "warps")):
        tiles = tiles_of((*point, ("warps", 4)))
        made = printed(c.kernel, tiles, c.chunk, c.signature)
        sources.add((made.source, made.constants, tiles.stages))
    count = 1
    for a in space:
        count *= 1 if a.name == "warps" else len(a.choices)
    assert len(sources) == count


def test_a_point_is_the_configuration_that_it_came_from() -> None:
    c = choice("gated_delta_rule", "forward_scan")
    space = axes(traits(c.kernel, c.chunk, c.signature), DIMS)
    point = point_of(replace(TILES, v_tile=256), space)
    assert point == (("v_tile", 128), ("warps", 4), ("stages", 2))  # as wide as there are channels
    assert point_of(replace(TILES, warps=16), space) is None
    for p in points(space):
        assert point_of(tiles_of(p), space) == p


@pytest.mark.parametrize(
    ("rule", "tiles", "chunk"),
    [
        ("shared memory", KernelConfig(128, 8, 4), 128),
        ("registers", KernelConfig(128, 2, 1), 64),  # 128 x 128 float32 in 64 threads
        ("warps", KernelConfig(16, 8, 1), 32),  # rows for two warps
    ],
)
def test_rules_say_what_is_broken(rule: str, tiles: KernelConfig, chunk: int) -> None:
    assert rule in broken(RULES, choice("gated_delta_rule", "forward_scan", tiles, chunk))
    assert not broken(RULES, choice("gated_delta_rule", "forward_scan"))
    assert all(r.reason for r in RULES)


def test_no_prediction_is_below_the_bound() -> None:
    for name in ("gated_delta_rule", "linear_attention"):
        for kernel in kernels(name).values():
            c = choice(name, kernel.name)
            found = traits(kernel, c.chunk, c.signature)
            for point in points(axes(found, DIMS)):
                tried = replace(c, tiles=tiles_of(point))
                assert predict(tried, found, SIZE).us >= bound_us(kernel, tried, SIZE) > 0


@pytest.mark.parametrize(
    ("name", "kernel", "tiles", "measured"),
    [  # microseconds on an H100 (docs/measured.md), within a factor of two
        ("gated_delta_rule", "forward_prep", KernelConfig(64, 4, 1, 256), 132),
        ("gated_delta_rule", "forward_scan", KernelConfig(32, 4, 2, 256), 218),
        ("gated_delta_rule", "backward_gradients", KernelConfig(64, 8, 3, 256), 641),
        ("linear_attention", "forward_scan", KernelConfig(64, 4, 3, 256), 99),
        ("linear_attention", "backward_reverse_rows", KernelConfig(64, 4, 3, 256), 99),
    ],
)
def test_predictions_are_of_the_right_size(
    name: str, kernel: str, tiles: KernelConfig, measured: float
) -> None:
    c = choice(name, kernel, tiles)
    predicted = predict(c, traits(c.kernel, c.chunk, c.signature), SIZE).us
    assert measured / 2 < predicted < measured * 2


def test_the_account_names_kernels_limits_and_rules() -> None:
    form = by_name("gated_delta_rule").normal_form()
    account = explain_cost(form, DIMS, Dtype.BFLOAT16, SIZE, GPUS["h100"])
    for word in ("forward_scan", "backward_gradients", "waits for", "shared memory", "plans ahead"):
        assert word in account
    small = explain_cost(form, DIMS, Dtype.BFLOAT16, SIZE, GPUS["rtx5090"])
    assert small != account
