"""Tensor parallelism of layers: a style for torch's `parallelize_module` that splits heads.

A layer has one matrix for several operands, side by side, and each rank wants its heads of every
one. So rows of such weights are put in another order first, rank by rank; torch's styles for linear
layers then split them. State dicts have them in the order of the whole layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from .parts import Split


class HeadsParallel(ParallelStyle):
    """Splits a `RecurrentLayer` or attention by heads, a `SwiGLU` by channels."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            got = f"got one of shape {tuple(device_mesh.shape)}"
            raise ValueError(f"a layer is split over a mesh of one axis: {got}")
        if not hasattr(module, "split"):
            name = type(module).__name__
            raise TypeError(f"{name} is not split by heads: a RecurrentLayer, Attention, SwiGLU is")
        if any(isinstance(x, DTensor) for x in module.parameters()):
            raise ValueError(f"{type(module).__name__} is split already")
        ranks = device_mesh.size()
        splits: dict[str, Split | None] = module.split(ranks)  # type: ignore[operator]
        known = dict(module.named_parameters())
        orders = {n: (x.axis, _order(x.parts, ranks)) for n, x in splits.items() if x and x.parts}
        for name, (axis, order) in orders.items():
            weight = known[name]
            weight.data = weight.data.index_select(axis, order.to(weight.device))
        plan: dict[str, ParallelStyle] = {}
        for path, part in module.named_children():
            split = splits.get(f"{path}.weight")
            if isinstance(part, nn.Linear) and split is not None:
                plan[path] = RowwiseParallel() if split.axis else ColwiseParallel()
        source = self.src_data_rank
        parallelize_module(module, device_mesh, plan, src_data_rank=source)
        for name in splits:  # in one order on all ranks
            if name.removesuffix(".weight") in plan:
                continue
            whole = known[name]
            place = [_place(splits[name])]
            value = distribute_tensor(whole.data, device_mesh, place, src_data_rank=source)
            *owner, own = name.split(".")
            module.get_submodule(".".join(owner)).register_parameter(
                own, nn.Parameter(value, requires_grad=whole.requires_grad)
            )
        places = {name: _place(split) for name, split in splits.items()}
        module.register_state_dict_post_hook(partial(_as_one, orders, places))
        module.register_load_state_dict_pre_hook(partial(_by_ranks, orders, places, device_mesh))
        return module


def _place(split: Split | None) -> Placement:
    return Replicate() if split is None else Shard(split.axis)


def _order(parts: Sequence[int], ranks: int) -> Tensor:
    """Which entries of an axis each rank has, one rank after the other."""
    starts = [0, *accumulate(parts)]
    order = [
        i
        for n in range(ranks)
        for a, size in zip(starts, parts, strict=False)
        for i in range(a + n * size // ranks, a + (n + 1) * size // ranks)
    ]
    return torch.tensor(order, dtype=torch.int64, device="cpu")


def _as_one(
    orders: Mapping[str, tuple[int, Tensor]],
    places: Mapping[str, Placement],
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: object,
) -> None:
    """Put the entries of weights in a state dict into the order of the whole layer."""
    for name, (axis, order) in orders.items():
        given = state[prefix + name]
        if isinstance(given, DTensor):
            back = order.argsort().to(given.device)
            whole: Tensor = given.full_tensor().detach().index_select(axis, back)
            state[prefix + name] = distribute_tensor(
                whole, given.device_mesh, [places[name]], src_data_rank=None
            )


def _by_ranks(
    orders: Mapping[str, tuple[int, Tensor]],
    places: Mapping[str, Placement],
    mesh: DeviceMesh,
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_: object,
) -> None:
    """Split the weights of a state dict as the module's are: plain tensors, or in order."""
    for name, place in places.items():
        x = state.get(prefix + name)
        if x is None or (name not in orders and isinstance(x, DTensor)):
            continue
        whole: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
        if whole.shape != module.get_parameter(name).shape:
            continue  # which load_state_dict reports
        if name in orders:
            axis, order = orders[name]
            whole = whole.index_select(axis, order.to(whole.device))
        state[prefix + name] = distribute_tensor(whole, mesh, [place], src_data_rank=None)
