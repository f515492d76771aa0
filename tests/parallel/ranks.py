"""What the processes of a test run: a recurrence split over ranks, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import chunkwise as cw
import torch
import torch.distributed as dist
from chunkwise.dsl.ir import Per
from chunkwise.runtime.call import Call
from chunkwise.runtime.triton import engine as triton_engine
from torch import Tensor

from tests.harness import Inputs, Sizes, make_inputs
from tests.interpreted import CHUNK, hasten, served_under, small


def run(work: Callable[..., Any], ranks: int, folder: Path, *given: Any) -> list[Any]:
    """What `work(*given)` returns on each of so many ranks; what one raises is raised here."""
    torch.multiprocessing.start_processes(
        _rank, (work, ranks, str(folder), given), nprocs=ranks, start_method="spawn"
    )
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(ranks)]


def _rank(rank: int, work: Callable[..., Any], ranks: int, folder: str, given: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    # a rank that hangs would otherwise hang the test
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", store, world_size=ranks, rank=rank, timeout=limit)
    torch.save(work(*given), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def mistakes() -> dict[str, str]:
    """The errors of calls that do not fit together, which end on every rank."""
    op, rank = cw.library.delta_rule, dist.get_rank()

    def given(T: int = 6, V: int = 4, **changes: Tensor) -> dict[str, Tensor]:
        sizes = Sizes(B=1, T=T, K=4, V=V, dtype=torch.float32)
        return {**make_inputs(op, sizes).operands, **changes}

    momentum = make_inputs(cw.library.momentum_delta, Sizes(dtype=torch.float32)).operands
    alone = dist.new_group([0])
    bounds = torch.tensor([0, 4, 12])
    cases: dict[str, Callable[[], Any]] = {
        "sizes": lambda: op(**given(V=4 + rank), group=dist.group.WORLD),
        "refused": lambda: op(
            **given(**({"v": torch.zeros(1, 2)} if rank else {})), group=dist.group.WORLD
        ),
        "dtype": lambda: op(
            **given(**({"beta": torch.rand(1, 6, 2).half()} if rank else {})),
            group=dist.group.WORLD,
        ),
        "boundaries": lambda: op(
            **given(), cu_seqlens=bounds - torch.tensor([0, rank, 0]), group=dist.group.WORLD
        ),
        "total": lambda: op(**given(5), cu_seqlens=bounds, group=dist.group.WORLD),
        "no tokens": lambda: op(**given(rank), group=dist.group.WORLD),
        "mixed states": lambda: cw.library.momentum_delta(**momentum, group=dist.group.WORLD),
        "no group": lambda: op(**given(), group="gloo"),
        "mesh": lambda: op(
            **given(), group=dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
        ),
    }
    if rank:
        cases["outside"] = lambda: op(**given(), group=alone)
    found = {}
    for name, make in cases.items():
        try:
            make()
            found[name] = "nothing"
        except cw.errors.ChunkwiseError as why:
            found[name] = f"{type(why).__name__}: {why}"
    return found


def errors_of(names: list[str], sizes: dict[str, Any], engine: str, parts: list[int]) -> Any:
    """By recurrence and result, the largest difference from one process over the result's size."""
    if engine == "triton":
        hasten()
        triton_engine._compiled_for = _interpreted  # type: ignore[assignment]
    return {name: _compared(name, Sizes(**sizes), engine, parts) for name in names}


def _interpreted(call: Call, joined: int | None = None) -> Any:
    """What serves calls in the interpreter: of parts of sequences, segments of one chunk."""
    return served_under(small, 0 if joined is None else CHUNK)(call)


def _compared(name: str, sizes: Sizes, engine: str, parts: list[int]) -> dict[str, float]:
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    options = inputs.options
    alone = "eager" if engine == "triton" else engine
    o, finals = op(**inputs.operands, **options, engine=alone, output_final_state=True)
    weights = _weights(o, finals)
    want = torch.autograd.grad(_loss(o, finals, weights), list(inputs.leaves.values()))
    rank, begin = dist.get_rank(), sum(parts[: dist.get_rank()])
    mine = slice(begin, begin + parts[rank])
    own, leaves = _own(op, inputs, mine)
    got_o, got_finals = op(
        **own,
        **{**options, **_states(leaves, inputs)},
        engine=engine,
        output_final_state=True,
        group=dist.group.WORLD,
    )
    bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    ends = _ending(bounds, sum(parts), mine, sizes.N)
    loss = (got_o * weights[0][:, mine]).sum()
    for x, w in zip(_each(got_finals), weights[1], strict=True):
        loss = loss + (x * w)[ends].sum()
    got = torch.autograd.grad(loss, list(leaves.values()))
    found = {"o": _far(got_o, o[:, mine])}
    for n, (x, y) in enumerate(zip(_each(got_finals), _each(finals), strict=True)):
        found[f"final {n}"] = _far(x[ends], y[ends]) if ends.any() else 0.0
    tokens = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    for key, d, whole in zip(leaves, got, want, strict=True):
        if key in tokens:
            found[f"d {key}"] = _far(d, whole[:, mine])
        else:  # each rank has its part of the gradient
            total = d.clone()
            dist.all_reduce(total)
            found[f"d {key}"] = _far(total, whole)
    return found


def _own(
    op: cw.Recurrence, inputs: Inputs, mine: slice
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    leaves = {
        n: (x[:, mine] if n in tokens else x).detach().clone().requires_grad_()
        for n, x in inputs.leaves.items()
    }
    return {n: leaves[n] for n in inputs.operands}, leaves


def _states(leaves: dict[str, Tensor], inputs: Inputs) -> dict[str, Any]:
    if inputs.initial is None:
        return {}
    states = tuple(leaves.get(f"initial {n}") for n in range(len(inputs.initial)))
    return {"initial_state": states[0] if len(states) == 1 else states}


def _ending(bounds: list[int] | None, T: int, mine: slice, N: int) -> Tensor:
    """Which sequences end on this rank."""
    if bounds is None:
        return torch.full((N,), mine.stop == T)
    ends = []
    for a, b in pairwise(bounds):
        if a < b:
            ends.append(mine.start < b <= mine.stop)
        else:  # an empty one
            ends.append(mine.start <= a < mine.stop or a == mine.stop == T)
    return torch.tensor(ends)


def _each(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _weights(o: Tensor, finals: Any) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(7)
    return torch.randn(o.shape, generator=random), [
        torch.randn(x.shape, generator=random) for x in _each(finals)
    ]


def _loss(o: Tensor, finals: Any, weights: tuple[Tensor, list[Tensor]]) -> Tensor:
    states = zip(_each(finals), weights[1], strict=True)
    return (o * weights[0]).sum() + sum((x * w).sum() for x, w in states)


def _far(x: Tensor, y: Tensor) -> float:
    x, y = x.detach(), y.detach()
    return float((x - y).abs().max() / y.abs().max().clamp(min=1.0))
