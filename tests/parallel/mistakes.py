"""Calls of ranks that do not fit together: what each rank raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chunkwise as cw
import torch
import torch.distributed as dist
from chunkwise.nn import (
    Attention,
    AttentionConfig,
    LanguageModel,
    ModelConfig,
    RecurrentLayer,
    ShortConvolution,
    tensor_parallel,
)
from torch import Tensor
from torch.distributed.tensor.parallel import parallelize_module

from tests.harness import Sizes, make_inputs


def mistakes() -> dict[str, str]:
    """The errors of calls that do not fit together, which end on every rank."""
    op, rank = cw.library.delta_rule, dist.get_rank()

    def given(T: int = 6, V: int = 4, **changes: Tensor) -> dict[str, Tensor]:
        sizes = Sizes(B=1, T=T, K=4, V=V, dtype=torch.float32)
        return {**make_inputs(op, sizes).operands, **changes}

    plain = given()
    momentum = make_inputs(cw.library.momentum_delta, Sizes(dtype=torch.float32)).operands
    alone, twice = dist.new_group([0]), Attention(16, 4)
    mesh = dist.init_device_mesh("cpu", (2,))
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
        "transform": lambda: torch.func.grad(
            lambda v: op(**{**plain, "v": v}, group=dist.group.WORLD)[0].sum()
        )(torch.randn(1, 6, 2, 4)),
        "transform of a convolution": lambda: torch.func.grad(
            lambda x: ShortConvolution(3, 2)(x, group=dist.group.WORLD).sum()
        )(torch.randn(1, 6, 3)),
        "layers": lambda: Attention(4, 2)(torch.randn(1 + rank, 6, 4), group=dist.group.WORLD),
        "a layer refused": lambda: Attention(4, 2)(
            torch.randn(1, 6, 4), [0, 12] if rank else bounds, group=dist.group.WORLD
        ),
        "a layer's total": lambda: ShortConvolution(3, 2)(
            torch.randn(1, 5, 3), bounds, group=dist.group.WORLD
        ),
        "no group": lambda: op(**given(), group="gloo"),
        "heads": lambda: parallelize_module(Attention(6, 3), mesh, tensor_parallel()),
        "split twice": lambda: [
            parallelize_module(twice, mesh, tensor_parallel()) for _ in range(2)
        ],
        "weights of more heads": lambda: parallelize_module(
            _of_heads(2), mesh, tensor_parallel()
        ).load_state_dict(_of_heads(4).state_dict()),
        "weights in parts": lambda: parallelize_module(
            LanguageModel.from_config(ModelConfig(11, 8, (AttentionConfig(2),))),
            mesh,
            {"blocks.0.mixer": tensor_parallel()},
        ).save_pretrained("nowhere"),
        "no layer": lambda: parallelize_module(torch.nn.GELU(), mesh, tensor_parallel()),
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
        except (cw.errors.ChunkwiseError, ValueError, TypeError, RuntimeError) as why:
            found[name] = f"{type(why).__name__}: {why}"
    return found


def _of_heads(heads: int) -> torch.nn.Module:
    return RecurrentLayer(cw.library.linear_attention, 8, heads, 4, 4, conv_size=0)
