"""Prints the two custom ops of an exported package: checks, fakes, autograd, registration."""

from __future__ import annotations

from collections.abc import Iterator
from string import Template

from ...codegen.expressions import Names
from ..sizes import state_letters
from .contents import Package
from .text import filled, indented, wrapped

# what the printed ops call their own things
_OWN = (
    *("torch", "support", "cu_seqlens", "inputs", "operands", "serving", "sizes"),
    *("gradients", "o_shape", "x", "d", "B", "T", "HV", "K", "V", "N"),
)
_AUTOGRAD = """\
def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:$saved])
    ctx.params = inputs[$saved:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *cotangents):
    saved = ctx.saved_tensors
    gradients = iter(OPS.backward(*cotangents, *saved, *ctx.params))
    differentiable = [None if x is None else next(gradients) for x in saved[:$tensors]]
    return (*differentiable, $nothing)  # cu_seqlens and numbers have no gradient


def _save_nothing(ctx, inputs, output):
    pass


def _refuse(ctx, *cotangents):
    raise RuntimeError(
        "the gradient of $name was differentiated again, "
        "and its kernels have no derivative; "
        "differentiate once, or take higher derivatives of reference.$name"
    )


LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPS = getattr(torch.ops, NAMESPACE)"""
_REGISTER = """\
for _name, _run, _shapes, _gradient, _keep in (
    ("forward", _forward, _forward_shapes, _differentiate, _save),
    ("backward", _backward, _backward_shapes, _refuse, _save_nothing),
):
    _op = f"{NAMESPACE}::{_name}"
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _shapes, lib=LIBRARY)
    torch.library.register_autograd(_op, _gradient, setup_context=_keep, lib=LIBRARY)"""


class Ops:
    """The two custom ops, forward and backward, and what torch needs to know of them."""

    def __init__(self, package: Package) -> None:
        self._package = package
        names = Names(_OWN)
        self._known = {
            name: names.fresh(name if name.isascii() else "x")  # torch allows no other letters
            for name in (*package.operands, *package.states, *package.params)
        }
        self._cotangents = [names.fresh(f"d_{name}") for name in ("o", *self._states)]

    @property
    def _operands(self) -> list[str]:
        return [self._known[o] for o in self._package.operands]

    @property
    def _states(self) -> list[str]:
        return [self._known[s] for s in self._package.states]

    @property
    def _params(self) -> list[str]:
        return [self._known[p] for p in self._package.params]

    @property
    def _tensors(self) -> list[str]:
        return [*self._operands, *self._states, "cu_seqlens"]

    @property
    def _inputs(self) -> list[str]:
        return [*self._tensors, *self._params]

    @property
    def _schema(self) -> list[str]:
        """The inputs, as torch declares ops."""
        return [
            *(f"Tensor {x}" for x in self._operands),
            *(f"Tensor? {s}" for s in self._states),
            "Tensor? cu_seqlens",
            *(f"float {p}" for p in self._params),
        ]

    def lines(self) -> Iterator[str]:
        yield from self._serving()
        yield from ("", "")
        yield from self._forward()
        yield from ("", "")
        yield from self._backward()
        yield from ("", "")
        yield from self._autograd()

    @property
    def _shapes(self) -> list[str]:
        """Variables for the shapes of the output and of the states."""
        return ["o_shape", *(f"{s}_shape" for s in self._states)]

    def _serving(self) -> Iterator[str]:
        """The checks that op and fake implementation share, and the choice of kernels."""
        package, lead = self._package, self._known[self._package.lead]
        op = f'"{package.name}"'
        named = [f'"{name}": {self._known[name]}' for name in package.operands]
        body = [
            '"""The kernels that serve a call, and the shapes of its output and states."""',
            *wrapped("operands = {", named, "}"),
            f"support.check_tensors({op}, operands, NARROW, {lead}.dtype)",
            f"sizes = support.measure({op}, AXES, operands)",
            'B, T, HV, K, V = (sizes[letter] for letter in ("B", "T", "HV", "K", "V"))',
            "N = B",
            "if cu_seqlens is not None:",
            f"    support.check_packing({op}, cu_seqlens, B, T, {lead}.device)",
            "    N = cu_seqlens.shape[0] - 1",
            "o_shape = [B, T, HV, V]",
        ]
        for s in package.form.states:
            x = self._known[s.name]
            shape = ", ".join(state_letters(s))
            body.append(f"{x}_shape = [{shape}]")
            arguments = [op, f'"{s.name}"', x, f"{x}_shape", f"{lead}.device"]
            body += wrapped("support.check_state(", arguments, ")")
        body += [
            f"serving = KERNELS.get(({lead}.dtype, K, V))",
            "if serving is None:",
            "    raise RuntimeError(",
            f'        f"{package.name}: no kernels for K={{K}}, V={{V}}, {{{lead}.dtype}}; "',
            '        f"this package has {list(KERNELS)}, and is made by: {COMMAND}"',
            "    )",
            *wrapped("return (", ["serving", *self._shapes], ")"),
        ]
        yield from wrapped("def _serving(", self._tensors, "):")
        yield from indented(body)

    def _forward(self) -> Iterator[str]:
        package, lead = self._package, self._known[self._package.lead]
        chosen = f"serving, {', '.join(self._shapes)} = _serving("
        passed = [f"support.passed_on({s}, {lead}, {s}_shape)" for s in self._states]
        body = [
            *wrapped(chosen, self._tensors, ")"),
            f'support.check_device("{package.name}", {lead}.device, {lead}.dtype)',
            "if 0 in o_shape[:3]:  # no token",
            *wrapped("return (", [f"{lead}.new_zeros(o_shape)", *passed], ")", "    "),
            "if cu_seqlens is not None:",
            f"    cu_seqlens = cu_seqlens.to({lead}.device, non_blocking=True).contiguous()",
            *wrapped("return serving.forward(", self._inputs, ")"),
        ]
        yield from wrapped("def _forward(", self._inputs, "):")
        yield from indented(body)
        yield from ("", "")
        made = [f"{lead}.new_empty({s}_shape, dtype=torch.float32)" for s in self._states]
        yield from wrapped("def _forward_shapes(", self._inputs, "):")
        yield from wrapped(chosen.replace("serving,", "_,", 1), self._tensors, ")", "    ")
        yield from wrapped("return (", [f"{lead}.new_empty(o_shape)", *made], ")", "    ")

    def _backward(self) -> Iterator[str]:
        lead = self._known[self._package.lead]
        inputs = ", ".join([*self._operands, *self._states])
        d_o, *d_states = self._cotangents
        nothing = ["None"] * len(self._operands)
        passed = [f"None if {d} is None else {d}.clone()" for d in d_states]
        launched = [*self._inputs, f"{d_o}.contiguous()", *d_states]
        body = [
            *wrapped("serving, o_shape, *_ = _serving(", self._tensors, ")"),
            f"inputs = [{inputs}]",
            f"if {d_o} is None:",
            f"    {d_o} = {lead}.new_zeros(o_shape)",
            *(f"{d} = None if {d} is None else {d}.contiguous()" for d in d_states),
            "if 0 in o_shape[:3]:  # no token: the final states are the initial ones",
            *wrapped("gradients = [", [*nothing, *passed], "]", "    "),
            "else:",
            "    if cu_seqlens is not None:",
            f"        cu_seqlens = cu_seqlens.to({lead}.device, non_blocking=True).contiguous()",
            *wrapped("gradients = serving.backward(", launched, ")", "    "),
            "return [",
            "    torch.zeros_like(x) if d is None else d.to(x.dtype).contiguous()",
            "    for x, d in zip(inputs, gradients)",
            "    if x is not None",
            "]",
        ]
        yield from wrapped("def _backward(", [*self._cotangents, *self._inputs], "):")
        yield from indented(body)
        yield from ("", "")
        yield from wrapped("def _backward_shapes(", [*self._cotangents, *self._inputs], "):")
        yield f"    inputs = [{inputs}]"
        yield "    return [x.new_empty(x.shape) for x in inputs if x is not None]"

    def _autograd(self) -> Iterator[str]:
        package = self._package
        tensors = len(package.operands) + len(package.states)
        rest = ", ".join(["None"] * (len(package.params) + 1))
        printed = Template(_AUTOGRAD).substitute(
            name=package.name, saved=tensors + 1, tensors=tensors, nothing=rest
        )
        yield from printed.split("\n")
        returns = ", ".join(["Tensor"] * (1 + len(package.states)))
        cotangents = [f"Tensor? {d}" for d in self._cotangents]
        yield from _define("forward", self._schema, f"({returns})")
        yield from _define("backward", [*cotangents, *self._schema], "Tensor[]")
        yield from _REGISTER.split("\n")


def _define(name: str, inputs: list[str], returns: str) -> Iterator[str]:
    """Declares an op: its schema as text, cut where lines are full."""
    *lines, last = filled(inputs)
    yield "LIBRARY.define("
    yield f'    "{name}("'
    yield from (f'    "{line} "' for line in lines)
    yield f'    "{last.removesuffix(",")}"'
    yield f'    ") -> {returns}"'
    yield ")"
