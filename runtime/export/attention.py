"""A recurrence as transformers and flash-linear-attention call it: scaled, its vectors of length 1.

Packages carry this file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def call(
    function: Callable[..., tuple[Tensor, Any]],
    operands: Mapping[str, Tensor],
    initial_state: Any,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    given: Mapping[str, Any],
) -> tuple[Tensor, Any]:
    """The output and the final state of `function`, whose output is linear in its operand q.

    Args:
        function: a recurrence of this package.
        operands: by name, in its order.
        initial_state: as it takes it.
        output_final_state: whether the final state is wanted.
        use_qk_l2norm_in_kernel: scale q and k to length 1 first, in float32.
        given: other arguments of a model's; `scale` (K^-0.5 where it is None) and `cu_seqlens` are
            taken, the rest is passed over.
    """
    made, scale = dict(operands), given.get("scale")
    scale = made["q"].shape[-1] ** -0.5 if scale is None else scale
    for name, factor in (("q", scale), ("k", 1.0)):
        x = wide = made[name].float()
        if use_qk_l2norm_in_kernel:
            x = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
        made[name] = (x * factor).to(operands[name].dtype)
    return function(
        *made.values(),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=given.get("cu_seqlens"),
    )
