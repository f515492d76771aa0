"""What the launchers of an exported package need beside kernels: checks that name what is wrong.

Axes are written in letters: `B T H K` is a Key, whose heads H divide those of the Values, HV.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from triton.runtime.errors import OutOfResources


def measure(op: str, axes: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a call by letter (B, T, HV, K, V), from its operands.

    Raises:
        ValueError: an operand has other axes than `axes` says, or does not agree with another.
    """
    sizes: dict[str, int] = {}
    witness: dict[str, str] = {}
    groups: dict[str, int] = {}
    for name, x in tensors.items():
        letters = axes[name].split()
        pattern = f"[{','.join(letters)}]"
        if x.dim() != len(letters):
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {pattern}")
        for axis, letter in enumerate(letters):
            size = x.shape[axis]
            if letter == "H":
                groups[name] = size
                continue
            if letter.isdigit():  # micro-steps, as many as kernels were printed for
                sizes[letter], witness[letter] = int(letter), "every call"
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has shape {list(x.shape)}, expected {pattern} with "
                    f"{letter} = {sizes[letter]} as in {witness[letter]}"
                )
            witness.setdefault(letter, name)
    if "HV" not in sizes:
        sizes["HV"] = max(groups.values())
    for name, heads in groups.items():
        if heads == 0 or sizes["HV"] % heads:
            raise ValueError(
                f"{op}: {name} has {heads} heads, expected {sizes['HV']} or a divisor of that"
            )
    if len(set(groups.values()) - {sizes["HV"]}) > 1:
        raise ValueError(f"{op}: Keys have {groups} heads, expected {sizes['HV']} or one divisor")
    return sizes


def check_tensors(
    op: str, tensors: Mapping[str, Tensor], narrow: Sequence[str], dtype: torch.dtype
) -> None:
    """That dtypes and devices agree: `narrow` operands in `dtype`, the others in any float dtype.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: an operand lies on another device.
    """
    devices = {name: x.device for name, x in tensors.items()}
    first = next(iter(devices))
    for name, x in tensors.items():
        if name in narrow and x.dtype != dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, expected {dtype}, the dtype of its Values")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{op}: {name} is {x.dtype}, expected float32, bfloat16 or float16")
        if x.device != devices[first]:
            raise ValueError(f"{op}: {name} is on {x.device}, but {first} on {devices[first]}")
        if x.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {x.layout}, expected a dense tensor")


def check_packing(
    op: str, cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device
) -> None:
    """That `cu_seqlens` can be boundaries; on the host (only there it costs no wait) what it holds.

    Raises:
        TypeError: its dtype is not an integer's.
        ValueError: its shape, the batch, or what it holds is wrong; it is neither on `device` nor
            on the host.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens is {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected [N+1]")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, expected {device}")
    if batch != 1:
        raise ValueError(f"{op}: the batch is {batch}, expected 1, as cu_seqlens packs sequences")
    if cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(f"{op}: cu_seqlens is {bounds}, expected a rise from 0 to {tokens}")


def check_state(
    op: str, name: str, state: Tensor | None, shape: Sequence[int], device: torch.device
) -> None:
    """That an initial state, if there is one, is a float tensor of `shape` on `device`.

    Raises:
        TypeError: its dtype is wrong.
        ValueError: its shape or its device is wrong.
    """
    if state is None:
        return
    if state.layout != torch.strided:
        raise TypeError(f"{op}: initial_state ({name}) has layout {state.layout}, expected strided")
    if not state.dtype.is_floating_point or state.dtype == torch.float64:
        raise TypeError(f"{op}: initial_state ({name}) is {state.dtype}, expected float32")
    if list(state.shape) != list(shape):
        raise ValueError(
            f"{op}: initial_state ({name}) has shape {list(state.shape)}, expected {list(shape)}"
        )
    if state.device != device:
        raise ValueError(f"{op}: initial_state ({name}) is on {state.device}, expected {device}")


def check_transforms(op: str, tensors: Iterable[Tensor | None]) -> None:
    """That no transform of torch.func and no tangent is at work: the ops here would lose them.

    Raises:
        RuntimeError: one is.
    """
    if torch._C._are_functorch_transforms_active():
        what = "torch.func (grad, vmap, jvp, ...)"
    elif forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        what = "forward-mode differentiation"
    else:
        return
    raise RuntimeError(
        f"{op}: its kernels compute outputs, and gradients for torch.autograd, but cannot be "
        f"called under {what}; reference.{op} of this package can"
    )


def check_device(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """That kernels run here: on a GPU, or in Triton's interpreter.

    Raises:
        RuntimeError: they do not.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and torch.version.hip:
        raise RuntimeError(
            f"{op}: these kernels were printed for NVIDIA GPUs (tf32 products); "
            f"reference.{op} computes the same, slowly, on any device"
        )
    if device.type != "cuda" and not interpreted:
        raise RuntimeError(
            f"{op}: its kernels need a GPU, and the operands are on {device}; "
            f"reference.{op} of this package computes the same, token by token, on any device "
            "(TRITON_INTERPRET=1 runs the kernels themselves on a CPU, for tests)"
        )
    if interpreted and dtype == torch.bfloat16:
        raise RuntimeError(
            f"{op}: Triton's interpreter computes bfloat16 products wrongly; "
            "export float32 or float16 to test on a CPU"
        )


def launch(kernel: Any, grid: int, stages: int, /, **arguments: Any) -> None:
    """Launch `grid` programs of `kernel`, its loop pipelined in `stages`.

    In fewer, where the GPU's shared memory is smaller than that of the one they were chosen for.
    Fused multiply-adds are asked for, because their default changes with Triton 3.10.
    """
    while True:
        if "STAGES" in kernel.arg_names:  # a scan
            arguments["STAGES"] = stages
        try:
            kernel[(grid,)](**arguments, num_stages=stages, enable_fp_fusion=True)
        except OutOfResources:
            if stages == 1:
                raise
            stages -= 1
        else:
            return


def passed_on(state: Tensor | None, like: Tensor, shape: Sequence[int]) -> Tensor:
    """The state after no token at all: the initial one, or zero."""
    if state is None:
        return like.new_zeros(shape, dtype=torch.float32)
    return state.to(torch.float32, copy=True)


def rows(x: Tensor) -> Tensor:
    """`x` with its channels side by side, as kernels read them; copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def key_gradient(x: Tensor, heads: int) -> Tensor:
    """Room for the gradient of a Key, per value head; float32 where groups are added up."""
    dtype = x.dtype if x.shape[2] == heads else torch.float32
    return x.new_empty((*x.shape[:2], heads, x.shape[3]), dtype=dtype)
