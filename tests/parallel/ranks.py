"""What the processes of a test run: a recurrence split over ranks, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import chunkwise as cw
import torch
import torch.distributed as dist
from chunkwise.codegen.config import Config, Dims
from chunkwise.codegen.programs import chunk_program
from chunkwise.codegen.triton.defaults import default_config
from chunkwise.dsl.ir import Per
from chunkwise.dsl.normal_form import NormalForm
from chunkwise.nn import (
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    RecurrentConfig,
    RecurrentLayer,
)
from chunkwise.nn import tensor_parallel as tensor_parallel_style
from chunkwise.runtime import rank_scan
from chunkwise.runtime.call import Call
from chunkwise.runtime.triton import engine as triton_engine
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.harness import Inputs, Sizes, make_inputs
from tests.interpreted import CHUNK, hasten, served_under, small
from tests.parallel.mistakes import mistakes


def run(
    work: Callable[..., Any], ranks: int, folder: Path, *given: Any, backend: str = "gloo"
) -> list[Any]:
    """What `work(*given)` returns on each of so many ranks; what one raises is raised here."""
    torch.multiprocessing.start_processes(
        _rank, (work, ranks, str(folder), given, backend), nprocs=ranks, start_method="spawn"
    )
    return [torch.load(folder / f"{n}.pt", weights_only=False) for n in range(ranks)]


def _rank(
    rank: int, work: Callable[..., Any], ranks: int, folder: str, given: Any, backend: str
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    # a rank that hangs would otherwise hang the test
    limit = timedelta(seconds=120)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store, world_size=ranks, rank=rank, timeout=limit)
    torch.save(work(*given), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def errors_of(names: list[str], sizes: dict[str, Any], engine: str, parts: list[int]) -> Any:
    """By recurrence and result, the largest difference from one process over the result's size."""
    if engine == "triton" and "device" not in sizes:
        hasten()
        triton_engine._compiled_for = _interpreted  # type: ignore[assignment]
    return {name: _compared(name, Sizes(**sizes), engine, parts) for name in names}


def _interpreted(call: Call, joined: int | None = None) -> Any:
    """What serves calls in the interpreter: of parts of sequences, segments of one chunk."""
    return served_under(_as_of_16_bits, 0 if joined is None else CHUNK)(call)


@cache
def _as_of_16_bits(form: NormalForm) -> Config:
    """`small`, under the plans of 16-bit operands: some have scans on either side of a meeting."""
    plans = default_config(chunk_program(form), Dims(16, 16), wide_dtype=False)
    return replace(small(form), forward=plans.forward, backward=plans.backward)


def _compared(name: str, sizes: Sizes, engine: str, parts: list[int]) -> dict[str, float]:
    op = getattr(cw.library, name)
    inputs = make_inputs(op, sizes)
    options = inputs.options
    alone = "eager" if engine == "triton" and sizes.device == "cpu" else engine
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
    return torch.randn(o.shape, generator=random).to(o), [
        torch.randn(x.shape, generator=random).to(x) for x in _each(finals)
    ]


def _loss(o: Tensor, finals: Any, weights: tuple[Tensor, list[Tensor]]) -> Tensor:
    states = zip(_each(finals), weights[1], strict=True)
    return (o * weights[0]).sum() + sum((x * w).sum() for x, w in states)


def _far(x: Tensor, y: Tensor) -> float:
    x, y = x.detach(), y.detach()
    return float((x - y).abs().max() / y.abs().max().clamp(min=1.0))


class Layer(torch.nn.Module):
    """A residual layer around the gated delta rule, of projections that can be split by heads."""

    def __init__(self, hidden: int, heads: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        wide = heads * channels
        sizes = {"q": wide, "k": wide, "v": wide, "g": heads, "beta": heads}
        self.of = torch.nn.ModuleDict(
            {n: torch.nn.Linear(hidden, size, bias=False) for n, size in sizes.items()}
        )
        self.out = torch.nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made = {n: f(x) for n, f in self.of.items()}
        q, k, v = (made[n].unflatten(-1, (-1, self.channels)) for n in "qkv")
        g, beta = made["g"].sigmoid().log(), made["beta"].sigmoid()
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        o, _ = cw.library.gated_delta_rule(q, k, v, g, beta)
        y: Tensor = self.out(o.flatten(-2))
        return x + y


def tensor_parallel() -> dict[str, float]:
    """A model of two layers split by heads, against one process; and calls of other layouts."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(Layer(12, 4, 4), Layer(12, 4, 4)), torch.randn(2, 9, 12)
    want = model(x)
    want.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("heads",))
    columns = ColwiseParallel(use_local_output=False)
    plan = {f"of.{n}": columns for n in ("q", "k", "v", "g", "beta")}
    for layer in model:
        parallelize_module(layer, mesh, {**plan, "out": RowwiseParallel()})
    got = model(x)
    got.square().sum().backward()
    found = {"o": _far(got, want)}
    for n, p in model.named_parameters():
        found[f"d {n}"] = _far(p.grad.full_tensor(), grads[n])
    return found | _layouts(mesh)


def layers_by_heads() -> dict[str, float]:
    """A hybrid whose layers are split over all ranks: a training step, prefill and a token."""
    mixers = (
        RecurrentConfig("gated_delta_rule", 4, 4, 4, value_heads=8, gated=True),
        RecurrentConfig("rwkv7", 4, 4, 4),
        RecurrentConfig("delta_product", 4, 4, 4, micro_steps=2),
        AttentionConfig(4),
    )
    config = ModelConfig(11, 16, mixers, width=12)
    torch.manual_seed(0)
    alone = LanguageModel.from_config(config)
    model = LanguageModel.from_config(config)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    style = tensor_parallel_style()
    frozen = {"blocks.0.mixer.norm.weight", "blocks.0.mixer.project.weight"}
    for net in (alone, model):
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
    parallelize_module(model, mesh, {"blocks.*.mixer": style, "blocks.*.mlp": style})
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    model.load_state_dict(alone.state_dict())
    tokens = torch.randint(11, (2, 9))
    found, x = {}, torch.randn(2, 9, 16)
    first = [net.get_submodule("blocks.0.mixer") for net in (alone, model)]
    compiled = torch.compile(first[1], backend="eager", fullgraph=True)
    found["compiled"] = _far(compiled(x), first[0](x))
    rank, different = dist.get_rank(), RecurrentLayer(cw.library.kda, 8, 4, 4, 4)
    for p in different.parameters():
        torch.nn.init.constant_(p, rank)
    parallelize_module(different, mesh, style, src_data_rank=None)  # each rank's own weights
    for name, p in different.named_parameters():
        found[f"own {name}"] = float((p.to_local() - rank).abs().max())
    with torch.no_grad():
        made = []
        for net in (alone, model):
            logits, states = net.prefill(tokens)
            made.append((logits, net.step(tokens[:, 0], states)[0]))
    found["prefill"], found["step"] = (_far(y, x) for x, y in zip(*made, strict=True))
    for net in (alone, model):
        net(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    state = model.state_dict()
    for name, x in alone.state_dict().items():
        y = state[name]
        found[name] = _far(y.full_tensor() if isinstance(y, DTensor) else y, x)
    return found


def linears_in_parts() -> dict[str, float]:
    """A model whose linear layers FSDP splits one by one, against one process."""
    mixers = (RecurrentConfig("gated_delta_rule", 2, 4, 4, gated=True),)
    torch.manual_seed(0)
    alone = LanguageModel.from_config(ModelConfig(11, 8, mixers, width=12))
    model = deepcopy(alone)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [x for x in model.modules() if isinstance(x, torch.nn.Linear)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens = torch.randint(11, (2, 9))
    for net in (alone, model):
        net(tokens).square().sum().backward()
    pairs = zip(alone.named_parameters(), model.parameters(), strict=True)
    return {f"d {n}": _far(y.grad.full_tensor(), x.grad) for (n, x), y in pairs}


def _layouts(line: DeviceMesh) -> dict[str, float]:
    """Calls whose operands are split over sequences, over heads, over time, and not at all."""
    op, sizes = cw.library.mamba2, Sizes(B=2, T=7, H=1, HV=4, initial=True, dtype=torch.float32)
    inputs = make_inputs(op, sizes)
    o, final = op(**inputs.operands, **inputs.options, output_final_state=True)
    weights = _weights(o, final)
    want = torch.autograd.grad(_loss(o, final, weights), list(inputs.leaves.values()))
    found = {}
    heads = {x.name: -1 - len(x.kind.axes) for x in op.declaration.operands}
    tokens = {x.name for x in op.declaration.operands if x.per is Per.TOKEN}
    ways: dict[str, Callable[[str, int], Placement]] = {
        "sequences": lambda n, axis: Shard(0) if n in tokens else Replicate(),
        "heads": lambda n, axis: Shard(axis) if inputs.leaves[n].shape[axis] > 1 else Replicate(),
        "time": lambda n, axis: Shard(1) if n in tokens else Replicate(),
        "nothing": lambda n, axis: Replicate(),
    }
    square = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    for way, place in ways.items():
        for mesh in (line, square):
            leaves = {}
            for n, x in inputs.leaves.items():
                first = place(n, heads.get(n, 1) % x.ndim)
                places = (
                    [first] if mesh is line else [first, ways["heads"](n, heads.get(n, 1) % x.ndim)]
                )
                leaves[n] = distribute_tensor(x.detach(), mesh, places).requires_grad_()
            got_o, got_final = op(
                **{n: leaves[n] for n in inputs.operands},
                **{**inputs.options, **_states(leaves, inputs)},
                output_final_state=True,
            )
            whole = got_o.full_tensor(), got_final.full_tensor()
            grads = torch.autograd.grad(_loss(*whole, weights), list(leaves.values()))
            label = f"{way}, {mesh.ndim}"
            found[f"{label}: o"] = max(_far(whole[0], o), _far(whole[1], final))
            for n, d, w in zip(leaves, grads, want, strict=True):
                found[f"{label}: d {n}"] = _far(d.full_tensor(), w)
    return found


def models(parts: list[int], lengths: tuple[int, ...] | None) -> dict[str, float]:
    """A hybrid over tokens of several ranks, against one process."""
    torch.manual_seed(0)
    mixers = (
        RecurrentConfig("gated_delta_rule", 2, 4, 4),
        AttentionConfig(2),
        AttentionConfig(2, window=3),
        AttentionConfig(2, window=40),
    )
    model = LanguageModel.from_config(ModelConfig(11, 8, mixers))
    tokens = torch.randint(11, (1 if lengths else 2, sum(parts)))
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    want = model(tokens, bounds)
    weights = torch.randn(want.shape)
    (want * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    begin = sum(parts[: dist.get_rank()])
    mine = slice(begin, begin + parts[dist.get_rank()])
    got = model(tokens[:, mine], bounds, group=dist.group.WORLD)
    (got * weights[:, mine]).sum().backward()
    found = {"logits": _far(got, want[:, mine])}
    for n, p in model.named_parameters():
        total = p.grad.clone()
        dist.all_reduce(total)
        found[f"d {n}"] = _far(total, grads[n])
    return found


def received(tokens: int) -> tuple[int, int]:
    """Bytes that this rank receives of states, in a forward and in a backward."""
    taken = []
    swap = rank_scan.swap

    def counting(group: Any, given: Tensor | None, to: int, x: Tensor | None) -> None:
        taken.append(0 if x is None else x.numel() * x.element_size())
        swap(group, given, to, x)

    sizes = Sizes(B=1, T=tokens, H=2, HV=2, K=4, V=4, dtype=torch.float32)
    op = cw.library.gated_delta_rule
    rank_scan.swap = counting
    try:
        o, _ = op(**make_inputs(op, sizes).operands, group=dist.group.WORLD)
        forward = sum(taken)
        o.sum().backward()
    finally:
        rank_scan.swap = swap
    return forward, sum(taken) - forward


def of_two(parts: list[int], sizes: dict[str, Any]) -> dict[str, Any]:
    """All that two ranks do, in processes that start once."""
    os.environ["CHUNKWISE_ENGINE"] = "eager"
    names = ["gated_delta_rule", "mlstm"]
    return {
        "recurrences": errors_of(names, sizes, "eager", parts),
        "models": {
            "whole": models([7, 2], None),
            "packed": models([9, 8], (4, 0, 11, 2)),
            "tensor parallel": tensor_parallel(),
            "layers by heads": layers_by_heads(),
            "linears in parts": linears_in_parts(),
        },
        "mistakes": mistakes(),
        "received": [received(6), received(60)],
    }


def models_of_four() -> dict[str, dict[str, float]]:
    """Parts that are shorter than a convolution's halo; heads over four ranks."""
    os.environ["CHUNKWISE_ENGINE"] = "eager"
    return {
        "whole": models([5, 1, 2, 4], None),
        "packed": models([5, 1, 2, 4], (3, 6, 0, 3)),
        "tensor parallel": tensor_parallel(),
        "layers by heads": layers_by_heads(),
    }
