"""The ops under torch's transforms: reverse mode at any level of torch.func, vmap, no forward mode.

torch.library's own registration of a gradient loses tangents without a word and refuses torch.func,
so that the kernel of the Autograd key is written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad

from ..dsl import errors

Outputs = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, slots=True)
class Derivative:
    """What torch has to know of an op to differentiate it.

    Attributes:
        title: the recurrence's name, for messages.
        save: `(ctx, inputs, *kept)`, keeps what `pull_back` needs.
        pull_back: `(ctx, *cotangents)`, a gradient or None for every input.
        in_torch: the op as torch operations.
        by_torch: whether these operations serve a call with such inputs. Torch then
            differentiates them for tangents, and for gradients too if `records_itself`.
        keeping: what is kept for the gradient of a call with such inputs; None: its inputs alone.
    """

    title: str
    save: Callable[..., None]
    pull_back: Callable[..., tuple[Tensor | None, ...]]
    in_torch: Callable[..., Outputs]
    by_torch: Callable[[Sequence[Any]], bool]
    records_itself: bool = False
    keeping: Callable[[Sequence[Any]], Keeping | None] = lambda inputs: None


@dataclass(frozen=True, slots=True)
class Keeping:
    """An op that returns one tensor more than another, which is kept for the gradient.

    Attributes:
        op: it takes what the other takes, and `more` behind that.
        pull_back: `(ctx, *cotangents)`, as that of a `Derivative`; the tensor is saved last.
    """

    op: torch._ops.OpOverload
    more: tuple[object, ...]
    pull_back: Callable[..., tuple[Tensor | None, ...]]


def register_derivative(
    library: torch.library.Library, op: torch._ops.OpOverload, derivative: Derivative
) -> None:
    """Have torch differentiate `op` so, under torch.func too.

    Raises, when the op is called: NoTransform, for forward mode where nothing computes tangents.
    """

    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
            # a Function switches recording off: here, and not at the levels below of torch.func
            with (
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
                torch._C._AutoDispatchBelowAutograd(),
            ):
                return tuple(op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            derivative.save(ctx, inputs[1:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *derivative.pull_back(ctx, *cotangents))

    class Kept(torch.autograd.Function):
        """The same at the level of torch itself, by an op that keeps a tensor."""

        @staticmethod
        def forward(keyset: Any, keeping: Keeping, *inputs: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                below = keyset & torch._C._after_autograd_keyset
                return tuple(keeping.op.redispatch(below, *inputs, *keeping.more))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _, ctx.keeping, *rest = inputs
            derivative.save(ctx, rest, output[-1])
            ctx.mark_non_differentiable(output[-1])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, None, *ctx.keeping.pull_back(ctx, *cotangents[:-1]))

    returns_list = len(op._schema.returns) == 1  # Tensor[]

    def kernel(keyset: Any, *inputs: Any) -> Outputs:
        levels = torch._C._are_functorch_transforms_active()
        # graphs of torch.compile enter levels of forward mode that Python's count does not know
        if levels or forward_ad._current_level >= 0:
            inputs = unwrap_dead_wrappers(inputs)  # what a level saved before it ended
            if any(map(_has_tangent, inputs)):
                if not derivative.by_torch(inputs):
                    raise errors.NoTransform(derivative.title, "forward-mode differentiation")
                return derivative.in_torch(*inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            with torch._C._AutoDispatchBelowAutograd():
                below: Outputs = op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            return below
        if derivative.records_itself and derivative.by_torch(inputs):
            return derivative.in_torch(*inputs)
        keeping = None if levels else derivative.keeping(inputs)
        if keeping is not None:
            *made, _ = Kept.apply(keyset, keeping, *inputs)  # type: ignore[no-untyped-call]
            return tuple(made)
        if levels:  # one of which has been entered
            with enable_single_level_autograd_function():
                outputs = Recorded.apply(keyset, *inputs)  # type: ignore[attr-defined]
        else:
            outputs = Recorded.apply(keyset, *inputs)  # type: ignore[attr-defined]
        return list(outputs) if returns_list else tuple(outputs)

    def refuse_batches(*inputs: Any) -> None:
        raise errors.NoTransform(derivative.title, "is_grads_batched (or vectorize) of autograd")

    name = op._schema.name
    library.impl(name, kernel, "Autograd", with_keyset=True)
    library.impl(name, refuse_batches, "Batched")


def _has_tangent(x: object) -> bool:
    is_number = isinstance(x, Tensor) and x.is_floating_point()
    return is_number and torch._VF._unpack_dual(x, level=0)[1] is not None  # type: ignore[arg-type]


class Along(Enum):
    """What of an op's argument a batch can be laid along."""

    SEQUENCES = "its first axis counts sequences of the batch"
    NOTHING = "it is shared by all sequences, or no tensor"


def register_batches(
    library: torch.library.Library, op: torch._ops.OpOverload, along: Sequence[Along], *, fold: bool
) -> None:
    """Have torch.vmap lay batches along the op's own, or call it once for each item.

    Args:
        along: for every argument.
        fold: whether that may be: results are per sequence. (A packed batch never is.)
    """
    packing = next(n for n, a in enumerate(op._schema.arguments) if a.name == "cu_seqlens")

    def rule(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        n = info.batch_size
        shared = all(d is None for d, a in zip(dims, along, strict=True) if a is Along.NOTHING)
        if not (fold and shared and inputs[packing] is None):
            rows = [
                op(*(x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)))
                for i in range(n)
            ]
            made = [torch.stack(items) for items in zip(*rows, strict=True)]
        else:

            def laid(x: Any, dim: int | None, a: Along) -> Any:
                if x is None or a is Along.NOTHING:
                    return x
                x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
                return x.flatten(0, 1)

            outputs = op(*map(laid, inputs, dims, along))
            made = [x.unflatten(0, (n, x.shape[0] // n)) for x in outputs]
        returns_list = len(op._schema.returns) == 1
        return (made if returns_list else tuple(made)), ([0] if returns_list else (0,)) * len(made)

    torch.library.register_vmap(op, rule, lib=library)
