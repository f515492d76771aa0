"""Scratch memory: every region within it, and no two that are needed at once on one another."""

from __future__ import annotations

import pytest
from chunkwise.codegen.config import Dims, Precision
from chunkwise.codegen.interface import Dtype, Signature
from chunkwise.codegen.programs import backward_program, forward_program
from chunkwise.codegen.tir import kernel as print_tir
from chunkwise.codegen.tir.config import default_config
from chunkwise.codegen.tir.frame import Place, Shapes, allocate
from chunkwise.codegen.tir.schedule import ChunkSchedule, Region
from chunkwise.dsl.library import by_name


def _checked(schedule: ChunkSchedule, shapes: Shapes) -> tuple[dict[Region, Place], int]:
    places, top = allocate(schedule, shapes)
    ends = {r: p.offset + shapes.size(p.axes) for r, p in places.items()}
    assert all(end <= top for end in ends.values())
    first: dict[Region, int] = {Region(t): -1 for t in schedule.held}
    last: dict[Region, int] = {Region(t): len(schedule.steps) for t in schedule.held}
    for n, step in enumerate(schedule.steps):
        for region in (*step.reads, *((step.writes,) if step.writes else ())):
            first.setdefault(region, n)
            last[region] = max(n, last.get(region, n))
    regions = [r for r in places if r in first]
    for n, a in enumerate(regions):
        for b in regions[:n]:
            together = first[a] <= last[b] and first[b] <= last[a]
            apart = ends[a] <= places[b].offset or ends[b] <= places[a].offset
            shared = places[a].offset == places[b].offset and bool(
                {a.tile, b.tile} & set(schedule.in_place)
            )
            assert apart or shared or not together, (a.tile.hint, b.tile.hint)
    return places, top


@pytest.mark.parametrize("sizes", [(64, 128), (128, 64), (64, 48), (128, 256), (5, 3)], ids=str)
@pytest.mark.parametrize("name", ["linear_attention", "delta_rule", "gated_delta_rule", "kda"])
def test_regions_do_not_meet(
    name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(print_tir, "allocate", _checked)
    form = by_name(name).normal_form()
    signature = Signature(Dims(*sizes), Dtype.FLOAT32, (), Precision.IEEE)
    for lanes in (8, 16):
        config = default_config(lanes)
        for program in (
            forward_program(form, config.forward),
            backward_program(form, config.backward),
        ):
            for kernel in program.kernels:
                print_tir.print_tir(kernel, signature, config)
