"""The ops of an exported package: what a call must be, the kernels that serve it, its gradient.

Packages carry this file as it is, and so those that it imports; they need torch and triton only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import shapes
from ..rows import Rows, as_kernels_read, in_last_rows, last_rows
from ..triton.descriptors import multiprocessors
from ..triton.launch_plan import NO_TABLES, Layout, LoadedKernel, OperandLayout, plan_launches
from ..triton.segment_size import most_segments, segment_tokens

# how a fault that `shapes` found says what a tensor has
_HAS = {
    "shape": "has shape {}",
    "heads": "has {} heads",
    "layout": "has layout {}",
    "batch": "has batch size {}",
    "device": "is on {}",
    "cu_seqlens": "is {}",
}


@dataclass(frozen=True)
class Kernels:
    """The kernels for one dtype, K and V, in the order of their launches; the rows of a chunk.

    Attributes:
        segmented: the same whose scans run on segments of sequences; None if theirs cannot.
        least: segments that a sequence must have for those.
        channels: of the value axis, as scans hold it, padded.
    """

    chunk: int
    forward: tuple[LoadedKernel, ...]
    backward: tuple[LoadedKernel, ...]
    segmented: Kernels | None = None
    least: int = 0
    channels: int = 0


@dataclass(frozen=True)
class Recurrence:
    """What a package knows of its recurrence.

    Attributes:
        name: of the function that users call.
        command: what makes the package.
        axes: of every operand, in the letters of `shapes`, with blanks between them.
        states: the axes of every state.
        params: the names of its floats.
        narrow: operands in the dtype of products; the others are widened to float32.
        lead: the operand whose dtype the output has.
        outputs: the axes of every output.
        rows: rows of a kernel's tiles that a token takes: one for each micro-step.
        kernels: by dtype, K and V.
        apart: whether kernels take each entry of a tuple as a tensor of its own.
    """

    name: str
    command: str
    axes: Mapping[str, str]
    states: Mapping[str, str]
    params: tuple[str, ...]
    narrow: tuple[str, ...]
    lead: str
    outputs: Mapping[str, str]
    rows: int
    kernels: Mapping[tuple[torch.dtype, int, int], Kernels]
    apart: bool = False

    def refuse(self, fault: shapes.Fault) -> Exception:
        """The error of a fault that `shapes` found."""
        error = TypeError if fault.kind == "layout" else ValueError
        got = list(fault.got) if isinstance(fault.got, torch.Size) else fault.got
        has = _HAS[fault.kind].format(got)
        return error(f"{self.name}: {fault.name} {has}, expected {fault.expected}")

    def layout_of(self, operand: str) -> Rows:
        """How kernels take an operand."""
        letters = self.axes[operand].split()
        micro = None if self.apart else self.entries_of(operand)
        return Rows(self.rows, micro, per_head=letters[0] == "HV")

    def entries_of(self, operand: str) -> int | None:
        """How many entries the operand's tuple has; None where it is no tuple."""
        return next((int(a) for a in self.axes[operand].split() if a.isdigit()), None)


class _Call:
    """A checked call of the ops, from their inputs."""

    def __init__(self, of: Recurrence, inputs: Sequence[Any]) -> None:
        """Check shapes, dtypes and places, and choose the kernels.

        Raises:
            ValueError, TypeError: they name the tensor, what it is and what was expected.
            RuntimeError: the package has no kernels for such a call.
        """
        self.of = of
        self.operands: dict[str, Tensor] = dict(zip(of.axes, inputs, strict=False))
        count, bounds = len(of.axes), len(of.axes) + len(of.states)
        self.starts: dict[str, Tensor | None] = dict(
            zip(of.states, inputs[count:bounds], strict=True)
        )
        self.cu_seqlens: Tensor | None = inputs[bounds]
        self.params: list[float] = list(inputs[bounds + 1 :])
        self.lead = self.operands[of.lead]
        self._check_dtypes()
        form = shapes.Form.of
        self.sizes = shapes.measure(
            {name: letters.split() for name, letters in of.axes.items()},
            [form(x) for x in self.operands.values()],
            {name: letters.split() for name, letters in of.states.items()},
            [None if x is None else form(x) for x in self.starts.values()],
            None if self.cu_seqlens is None else form(self.cu_seqlens),
            of.refuse,
        )
        x = self.cu_seqlens
        if x is not None and x.device.type == "cpu" and type(x) is Tensor:  # costs no wait
            shapes.check_boundaries(x, self.sizes["T"], of.refuse)
        dtype, K, V = self.lead.dtype, self.sizes["K"], self.sizes["V"]
        kernels = of.kernels.get((dtype, K, V))
        if kernels is None:
            raise RuntimeError(
                f"{of.name}: no kernels for K={K}, V={V}, {dtype}; "
                f"this package has {list(of.kernels)}, and is made by: {of.command}"
            )
        self.kernels = kernels

    def _check_dtypes(self) -> None:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        states = {f"initial_state ({n})": x for n, x in self.starts.items() if x is not None}
        for name, x in {**self.operands, **states}.items():
            expected = "float32, bfloat16 or float16"
            if name in self.of.narrow and x.dtype != self.lead.dtype:
                expected = f"{self.lead.dtype}, the dtype of its Values"
            elif x.dtype in floats:
                continue
            raise TypeError(f"{self.of.name}: {name} is {x.dtype}, expected {expected}")

    def output_shape(self, output: str) -> list[int]:
        """`[B,T,HV,V]` for an output that is a Value."""
        return [self.sizes[a] for a in self.of.outputs[output].split()]

    def state_shape(self, state: str) -> tuple[int, ...]:
        """`[N,HV,K,V]`, or `[N,HV,K]`."""
        return tuple(self.sizes[a] for a in self.of.states[state].split())

    @property
    def is_empty(self) -> bool:
        """Whether the call has no token: the final states are the initial ones."""
        return 0 in (self.sizes[a] for a in ("B", "T", "HV"))

    def check_device(self) -> None:
        """That kernels run here: on an NVIDIA GPU, or in Triton's interpreter.

        Raises:
            RuntimeError: they do not.
        """
        op, device = self.of.name, self.lead.device
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
        if interpreted and self.lead.dtype == torch.bfloat16:
            raise RuntimeError(
                f"{op}: Triton's interpreter computes bfloat16 products wrongly; "
                "export float32 or float16 to test on a CPU"
            )

    def in_rows(self, name: str) -> list[tuple[str, Tensor]]:
        """An operand as kernels take it, in the dtype that they were printed for, by name.

        Of a tuple whose entries are apart it is one tensor for each.
        """
        x, rows = self.operands[name], self.of.layout_of(name)
        x = x if name in self.of.narrow else x.float()
        x = x if rows.make is None else rows.make(x)
        named = [(name, x)]
        if self.of.apart and self.of.entries_of(name) is not None:
            named = [(f"{name}_at{n}", entry) for n, entry in enumerate(x.unbind(2))]
        return [
            (n, y if as_kernels_read(y, per_head=rows.per_head) else y.contiguous())
            for n, y in named
        ]

    def _chosen(self) -> tuple[Kernels, int]:
        """The kernels that serve the call, and the chunks of a segment; 0: no segments."""
        kernels, sizes = self.kernels, self.sizes
        if kernels.segmented is None:
            return kernels, 0
        tokens = -(-sizes["B"] * sizes["T"] // sizes["N"]) * self.of.rows
        rows, available = sizes["N"] * sizes["HV"], multiprocessors(self.lead.device)
        segments = most_segments(kernels.channels, rows, tokens, available)
        segment = segment_tokens(kernels.least, segments, tokens)
        return (kernels.segmented if segment else kernels), -(-segment // kernels.chunk)

    def run(
        self,
        way: str,
        operands: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """Launch the kernels of a way, forward or backward; what they leave, by name.

        `operands`: in rows; `cotangents`: of the final states.
        """
        of, sizes, bounds = self.of, self.sizes, self.cu_seqlens
        chosen, segment = self._chosen()
        if bounds is not None:
            bounds = bounds.to(self.lead.device, non_blocking=True).contiguous() * of.rows
        starts = {
            name: None if x is None else x.contiguous()
            for name, x in {**self.starts, **cotangents}.items()
        }
        layout = Layout(
            *(sizes["B"], sizes["T"] * of.rows, sizes["HV"], sizes["K"], sizes["V"], sizes["N"]),
            chunk=chosen.chunk,
            segment=segment,
            packed=None if bounds is None else bounds.dtype,
            device=self.lead.device,
            operands=tuple(
                OperandLayout.of(n, x, per_head=n in of.axes and of.layout_of(n).per_head)
                for n, x in operands.items()
            ),
            carries=tuple(
                (n, self.state_shape(n.removeprefix("d_")), None if x is None else x.dtype)
                for n, x in starts.items()
            ),
            params=of.params,
        )
        tables = NO_TABLES if bounds is None else layout.tables(bounds)
        tensors: list[Any] = [*operands.values(), *starts.values(), *tables, *self.params]
        plan = plan_launches(getattr(chosen, way), layout)
        plan.run(tensors)
        return {name: tensors[n] for name, n in plan.results.items()}


def register(of: Recurrence, namespace: str) -> torch.library.Library:
    """Register the ops `forward` and `backward` of a recurrence; they live as long as the library.

    Their inputs are operands, initial states, cu_seqlens and floats; those of a backward begin
    with the cotangents of the outputs and of the final states.
    """
    count, given = len(of.axes) + len(of.states), len(of.outputs) + len(of.states)
    parts = [f"Tensor x{n}" for n in range(len(of.axes))]
    parts += [f"Tensor? initial{n}" for n in range(len(of.states))]
    parts += ["Tensor? cu_seqlens", *(f"float p{n}" for n in range(len(of.params)))]
    schema = ", ".join(parts)
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(f"forward({schema}) -> ({', '.join(['Tensor'] * given)})")
    cotangents = ", ".join(f"Tensor? d{n}" for n in range(given))
    library.define(f"backward({cotangents}, {schema}) -> Tensor[]")
    ops = getattr(torch.ops, namespace)

    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        call = _Call(of, inputs)
        call.check_device()
        if call.is_empty:
            new = call.lead.new_zeros
            ends = (
                new(call.state_shape(name), dtype=torch.float32)
                if x is None
                else x.to(torch.float32, copy=True)
                for name, x in call.starts.items()
            )
            return *(new(call.output_shape(name)) for name in of.outputs), *ends
        rows = dict(x for name in of.axes for x in call.in_rows(name))
        made = call.run("forward", rows, {})
        outputs = (last_rows(made[name], of.rows) for name in of.outputs)
        return *outputs, *(made[name] for name in of.states)

    def forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
        call = _Call(of, inputs)
        new = call.lead.new_empty
        ends = (new(call.state_shape(name), dtype=torch.float32) for name in of.states)
        return *(new(call.output_shape(name)) for name in of.outputs), *ends

    def backward(*args: Any) -> list[Tensor]:
        cotangents, inputs = args[:given], args[given:]
        douts, dfinals = cotangents[: len(of.outputs)], cotangents[len(of.outputs) :]
        call = _Call(of, inputs)
        ends = {f"d_{name}": d for name, d in zip(of.states, dfinals, strict=True)}
        if call.is_empty:
            gradients = [torch.zeros_like(x) for x in call.operands.values()]
        else:
            rows = {name: call.in_rows(name) for name in of.axes}
            operands = dict(x for named in rows.values() for x in named)
            for name, d in zip(of.outputs, douts, strict=True):
                whole = call.lead.new_zeros(call.output_shape(name)) if d is None else d
                operands[f"d_{name}"] = in_last_rows(whole.contiguous(), of.rows)
            ends = call.run("backward", operands, ends)
            gradients = []
            for name, named in rows.items():
                own = [
                    of.layout_of(name)
                    .gradient(ends.get(f"d_{n}"), x.shape, x.dtype, x.device, call.sizes["HV"])
                    .to(call.operands[name].dtype)
                    for n, x in named
                ]
                gradients.append(torch.stack(own, 2) if named[0][0] != name else own[0])
        for name, x in call.starts.items():
            if x is not None:
                d = ends[f"d_{name}"]
                gradients.append(
                    torch.zeros_like(x) if d is None else d.to(x.dtype, copy=True).contiguous()
                )
        return gradients

    def backward_shapes(*args: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in args[given : given + count] if x is not None]

    def save(ctx: Any, inputs: Sequence[Any], output: object) -> None:
        ctx.save_for_backward(*inputs[: count + 1])
        ctx.params = inputs[count + 1 :]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = iter(ops.backward(*cotangents, *saved, *ctx.params))
        differentiable = [None if x is None else next(gradients) for x in saved[:count]]
        return (*differentiable, *(None,) * (1 + len(of.params)))  # boundaries and numbers

    def save_nothing(ctx: Any, inputs: Sequence[Any], output: object) -> None:
        pass

    def refuse(ctx: Any, *cotangents: object) -> None:
        raise RuntimeError(
            f"the gradient of {of.name} was differentiated again, and its kernels have no "
            f"derivative; differentiate once, or take higher derivatives of reference.{of.name}"
        )

    for name, run, fake, pull_back, keep in (
        ("forward", forward, forward_shapes, differentiate, save),
        ("backward", backward, backward_shapes, refuse, save_nothing),
    ):
        op = f"{namespace}::{name}"
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(op, fake, lib=library)
        torch.library.register_autograd(op, pull_back, setup_context=keep, lib=library)
    return library


def call(
    of: Recurrence,
    forward: Callable[..., Any],
    operands: Sequence[Tensor],
    initial_state: Any,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    *params: float,
) -> tuple[Any, Any]:
    """The output, and the final state or None (a tuple each of several), by the op `forward`.

    Raises:
        ValueError: the number of initial states is wrong.
        RuntimeError: a transform of torch.func or a tangent is at work, which the op would lose.
    """
    several = len(of.states) > 1
    starts = (None,) * len(of.states) if initial_state is None else (initial_state,)
    if several and initial_state is not None:
        starts = tuple(initial_state)
    if len(starts) != len(of.states):
        expected = f"{len(of.states)}: {', '.join(of.states)}"
        raise ValueError(f"{of.name}: initial_state has {len(starts)} entries, expected {expected}")
    _check_transforms(of.name, (*operands, *starts))
    made = forward(*operands, *starts, cu_seqlens, *map(float, params))
    outputs, ends = made[: len(of.outputs)], made[len(of.outputs) :]
    o = outputs[0] if len(outputs) == 1 else tuple(outputs)
    if not output_final_state:
        return o, None
    return o, tuple(ends) if several else ends[0]


def _check_transforms(op: str, tensors: Iterable[Tensor | None]) -> None:
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
