"""Prints the op of an exported package: the function that users call, checks, autograd, a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from ..codegen.expressions import Names
from ..dsl.normal_form import Operand
from .export_package import Package, axes, indented, module, state_letters, wrapped

# what the printed ops call their own things
_OWN = (
    *("torch", "support", "Tensor", "cu_seqlens", "inputs", "operands", "serving", "sizes"),
    *("gradients", "o_shape", "x", "d", "B", "T", "HV", "K", "V", "N"),
)
_OPTIONS = ("initial_state", "output_final_state", "cu_seqlens")


def print_op(package: Package, sources: Mapping[str, str]) -> str:
    """The module `op.py`. `sources`: the others, whose digest makes the ops' namespace unique."""
    modules = [*(f"launch_{s.suffix}" for s in package.served), "support"]
    return module(
        [
            *package.header(f"{package.name} as a differentiable torch op over the kernels here."),
            "",
            "from typing import List, Optional, Tuple",
            "",
            "import torch",
            "from torch import Tensor",
            "",
            *(f"from . import {name}" for name in modules),
            "",
            *_tables(package, sources),
        ],
        _public(package),
        _Ops(package).lines(),
    )


def class_name(package: Package) -> str:
    """The layer's name: `GatedDeltaRule`."""
    return "".join(part[:1].upper() + part[1:] for part in package.name.split("_"))


def print_layer(package: Package) -> str:
    """The module `layers.py`: the op as a module without parameters, buffers or a constructor."""
    arguments = _signature(package)
    names = [*package.operands, *(f"{n}={n}" for n in (*package.params, *_OPTIONS))]
    return module(
        [
            *package.header(f"{package.name} as a layer without state of its own."),
            "",
            "from torch import nn",
            "",
            f"from .op import {package.name}",
        ],
        [
            f"class {class_name(package)}(nn.Module):",
            f'    """`forward` is `{package.name}`: the same arguments and results."""',
            "",
            "    has_backward = True",
            "    can_torch_compile = True",
            "",
            *wrapped("def forward(", ["self", *arguments], "):", "    "),
            *wrapped(f"return {package.name}(", names, ")", "        "),
        ],
    )


def _tables(package: Package, sources: Mapping[str, str]) -> Iterator[str]:
    yield f'COMMAND = "{package.command}"'
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(sources):
        digest.update(f"{name}\n{sources[name]}".encode())
    yield "# of this version alone, so that several can be loaded side by side"
    yield f'NAMESPACE = "{package.name}_{digest.hexdigest()}"'
    yield "# axes by operand; H, the heads of a Key, divides HV, those of the Values"
    yield "AXES = {"
    for o in package.form.operands:
        yield f'    "{o.name}": "{" ".join(axes(o, package.micro))}",'
    yield "}"
    narrow = [f'"{o}"' for o in package.operands if o in package.narrow]
    yield "# in the dtype of the products; the other operands are widened to float32"
    yield from wrapped("NARROW = (", [*narrow, ""] if len(narrow) == 1 else narrow, ")")
    yield "KERNELS = {"
    for s in package.served:
        key = f"(torch.{s.dtype.value}, {s.dims.K}, {s.dims.V})"
        yield f"    {key}: launch_{s.suffix},"
    yield "}"


def _kind(o: Operand) -> str:
    name = o.kind.name.title()
    return f"{name} of every micro-step" if o.micro else f"{name}, per {o.per.value}"


def _signature(package: Package) -> list[str]:
    """The public function's arguments as in the declaration, then the options of every op."""
    options = ["initial_state=None", "output_final_state=False", "cu_seqlens=None"]
    return [*package.operands, "*", *package.keywords, *options]


def _public(package: Package) -> Iterator[str]:
    several = len(package.states) > 1
    yield from wrapped(f"def {package.name}(", _signature(package), "):")
    yield f'    """{_summary(package)}'
    yield ""
    yield "    Args:"
    for o in package.form.operands:
        yield f"        {o.name}: `[{','.join(axes(o, package.micro))}]` ({_kind(o)})."
    for p in package.form.params:
        yield f"        {p.name}: a Python number."
    for n, s in enumerate(package.form.states):
        name = "initial_state" + (f"[{n}]" if several else "")
        yield f"        {name}: `[{','.join(state_letters(s))}]`; zero where absent."
    yield "        output_final_state: return the state after the last token too."
    yield "        cu_seqlens: int32 or int64 `[N+1]`, N sequences packed along T, with B = 1."
    yield ""
    yield "    Returns:"
    yield "        The output `[B,T,HV,V]`, and the final state in float32 or None."
    yield ""
    yield "    Raises:"
    yield "        ValueError, TypeError: they name the operand, what it is and what was expected."
    yield "        RuntimeError: no kernel of this package can serve the call; says why."
    yield '    """'
    count = len(package.states)
    if several:
        names = ", ".join(package.states)
        yield f"    starts = (None,) * {count} if initial_state is None else tuple(initial_state)"
        yield f"    if len(starts) != {count}:"
        yield "        raise ValueError("
        yield f'            f"{package.name}: initial_state has {{len(starts)}} entries, "'
        yield f'            "expected {count}: {names}"'
        yield "        )"
    starts = "*starts" if several else "initial_state"
    arguments = [*package.operands, starts, "cu_seqlens", *(f"float({p})" for p in package.params)]
    finals = "*finals" if several else "final"
    yield from wrapped(f"    o, {finals} = _forward(", arguments, ")")
    returned = "tuple(finals)" if several else "final"
    yield f"    return o, ({returned} if output_final_state else None)"


def _summary(package: Package) -> str:
    first = package.declaration.doc.partition("\n")[0] or f"The recurrence {package.form.name}."
    return first.replace("\\", "\\\\").replace('"""', "'''")


class _Ops:
    """The two custom ops, forward and backward, and what torch needs to know of them."""

    def __init__(self, package: Package) -> None:
        self._package = package
        names = Names(_OWN)
        self._known = {
            name: names.fresh(name)
            for name in (*package.operands, *package.states, *package.params)
        }
        self._cotangents = [names.fresh(f"d_{name}") for name in ("o", *package.states)]

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
    def _typed(self) -> list[str]:
        return [
            *(f"{x}: Tensor" for x in self._operands),
            *(f"{s}: Optional[Tensor]" for s in self._states),
            "cu_seqlens: Optional[Tensor]",
            *(f"{p}: float" for p in self._params),
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
            f"    support.check_packing({op}, cu_seqlens, B, T)",
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
        returns = ", ".join(["Tensor"] * (1 + len(package.states)))
        chosen = f"serving, {', '.join(self._shapes)} = _serving("
        passed = [f"support.passed_on({s}, {lead}, {s}_shape)" for s in self._states]
        body = [
            *wrapped(chosen, self._tensors, ")"),
            f'support.check_device("{package.name}", {lead}.device, {lead}.dtype)',
            "if 0 in o_shape[:3]:  # no token",
            *wrapped("return (", [f"{lead}.new_zeros(o_shape)", *passed], ")", "    "),
            "if cu_seqlens is not None:",
            f"    cu_seqlens = cu_seqlens.to({lead}.device, non_blocking=True)",
            *wrapped("return serving.forward(", self._inputs, ")"),
        ]
        yield '@torch.library.custom_op(f"{NAMESPACE}::forward", mutates_args=())'
        yield from wrapped("def _forward(", self._typed, f") -> Tuple[{returns}]:")
        yield from indented(body)
        yield from ("", "")
        made = [f"{lead}.new_empty({s}_shape, dtype=torch.float32)" for s in self._states]
        yield "@_forward.register_fake"
        yield from wrapped("def _(", self._inputs, "):")
        yield from wrapped(chosen.replace("serving,", "_,", 1), self._tensors, ")", "    ")
        yield from wrapped("return (", [f"{lead}.new_empty(o_shape)", *made], ")", "    ")

    def _backward(self) -> Iterator[str]:
        lead = self._known[self._package.lead]
        cotangents = [f"{d}: Optional[Tensor]" for d in self._cotangents]
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
            f"        cu_seqlens = cu_seqlens.to({lead}.device, non_blocking=True)",
            *wrapped("gradients = serving.backward(", launched, ")", "    "),
            "return [",
            "    torch.zeros_like(x) if d is None else d.to(x.dtype).contiguous()",
            "    for x, d in zip(inputs, gradients)",
            "    if x is not None",
            "]",
        ]
        yield '@torch.library.custom_op(f"{NAMESPACE}::backward", mutates_args=())'
        yield from wrapped("def _backward(", [*cotangents, *self._typed], ") -> List[Tensor]:")
        yield from indented(body)
        yield from ("", "")
        yield "@_backward.register_fake"
        yield from wrapped("def _(", [*self._cotangents, *self._inputs], "):")
        yield f"    inputs = [{inputs}]"
        yield "    return [x.new_empty(x.shape) for x in inputs if x is not None]"

    def _autograd(self) -> Iterator[str]:
        package = self._package
        tensors = len(package.operands) + len(package.states)
        rest = ", ".join(["None"] * (len(package.params) + 1))
        yield from f"""\
def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:{tensors + 1}])
    ctx.params = inputs[{tensors + 1}:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *cotangents):
    saved = ctx.saved_tensors
    gradients = iter(_backward(*cotangents, *saved, *ctx.params))
    differentiable = [None if x is None else next(gradients) for x in saved[:{tensors}]]
    return (*differentiable, {rest})  # cu_seqlens and numbers have no gradient


def _save_nothing(ctx, inputs, output):
    pass


def _refuse(ctx, *cotangents):
    raise RuntimeError(
        "the gradient of {package.name} was differentiated again, "
        "and its kernels have no derivative; differentiate once, "
        "or take higher derivatives of reference.{package.name}"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse, setup_context=_save_nothing)""".split("\n")
