"""Prints the function that users of an exported package call, its tables, and a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from ...dsl.ir import Kind, Node, Op, topological
from ...dsl.normal_form import Operand, has_entries_apart
from .contents import Package, axes
from .text import module, wrapped

_OPTIONS = ("initial_state", "output_final_state", "cu_seqlens")


def print_op(package: Package, sources: Mapping[str, str]) -> str:
    """The module `op.py`. `sources`: the others, whose digest makes the ops' namespace unique."""
    modules = [*(f"launch_{s.suffix}" for s in package.served), "support"]
    return module(
        [
            *package.header(f"{package.name} as a differentiable torch op over the kernels here."),
            "",
            "import re",
            "",
            "import torch",
            "",
            *wrapped("from . import (", modules, ")"),
            "",
            *_tables(package, sources),
        ],
        _public(package),
    )


def class_name(package: Package) -> str:
    """The layer's name: `GatedDeltaRule`."""
    return "".join(part[:1].upper() + part[1:] for part in package.name.split("_"))


def print_on_cpu(package: Package) -> str:
    """The module `op.py` of a hub's variant for CPUs: the step, token by token."""
    given = ["initial_state=initial_state", "cu_seqlens=cu_seqlens", "dtype=torch.float32"]
    given = [*package.operands, *(f"{n}={n}" for n in package.params), *given]
    return module(
        [
            *package.header(f"{package.name} as a torch op for CPUs, token by token: slow."),
            "",
            "import torch",
            "",
            *_axes(package),
        ],
        [
            *wrapped(f"def {package.name}(", _signature(package), "):"),
            f'    """{_summary(package)}"""',
            "    from . import reference  # which has the axes from here",
            "",
            *wrapped(f"o, state = reference.{package.name}(", given, ")", "    "),
            f"    o = o.to({package.lead}.dtype)",
            "    return o, state if output_final_state else None",
        ],
    )


def print_layer(package: Package) -> str:
    """The module `layers.py`: the op as a module without parameters, buffers or a constructor.

    And as one that transformers calls, where the output is linear in queries.
    """
    arguments = _signature(package)
    as_called = _as_called(package)
    names = [*package.operands, *(f"{n}={n}" for n in (*package.params, *_OPTIONS))]
    return module(
        [
            *package.header(f"{package.name} as a layer without state of its own."),
            "",
            "from torch import nn",
            "",
            *(["from . import attention"] if as_called else []),
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
        *([as_called] if as_called else []),
    )


def _as_called(package: Package) -> list[str]:
    """The layer that transformers finds by name; none if the output is not linear in an operand q.

    It checks that the arguments are as many as those of its own function.
    """
    step = package.declaration.step(package.micro)
    output, *others = step.outputs
    uses = [n for n in topological(*step.roots) if any(_is_q(a) for a in n.args)]
    keys = {"q", "k"} <= {o.name for o in package.form.operands if o.kind is Kind.KEY}
    if not keys or others or uses != [output] or output.op is not Op.READ or package.params:
        return []
    options = ["chunk_size=64", "initial_state=None", "output_final_state=False"]
    options += ["use_qk_l2norm_in_kernel=False", "**kwargs"]
    operands = [f'"{n}": {n}' for n in package.operands]
    given = [package.name, "operands", "initial_state", "output_final_state"]
    given += ["use_qk_l2norm_in_kernel", "kwargs"]
    return [
        f"class chunk_{package.name}(nn.Module):",
        f'    """`{package.name}` as transformers calls it: `scale`, of K^-0.5 where it is absent.',
        "",
        "    It takes `cu_seqlens` too, and passes over other arguments of a model.",
        '    """',
        "",
        "    has_backward = True",
        "    can_torch_compile = True",
        "",
        *wrapped("def forward(", ["self", *package.operands, *options], "):", "    "),
        *wrapped("operands = {", operands, "}", "        "),
        *wrapped("return attention.call(", given, ")", "        "),
    ]


def _is_q(node: Node) -> bool:
    return node.op is Op.OPERAND and node.attrs[0] == "q"


def _axes(package: Package) -> Iterator[str]:
    yield "# axes by operand; H, the heads of a Key, divides HV, those of the Values"
    yield "AXES = {"
    for o in package.form.operands:
        yield f'    "{o.name}": "{" ".join(axes(o, package.micro))}",'
    yield "}"
    states = [f'"{s.name}": "{" ".join(s.axes)}"' for s in package.form.states]
    yield from wrapped("STATES = {", states, "}")


def _tables(package: Package, sources: Mapping[str, str]) -> Iterator[str]:
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(sources):
        digest.update(f"{name}\n{sources[name]}".encode())
    version = f"{package.name}_{digest.hexdigest()}_"
    yield from _axes(package)
    narrow = tuple(o for o in package.operands if o in package.narrow)
    yield "# in the dtype of the products; the other operands are widened to float32"
    yield f"NARROW = {narrow!r}"
    yield "RECURRENCE = support.Recurrence("
    yield f"    name={package.name!r},"
    yield f"    command={package.command!r},"
    yield "    axes=AXES,"
    yield "    states=STATES,"
    yield f"    params={package.params!r},"
    yield "    narrow=NARROW,"
    yield f"    lead={package.lead!r},"
    outputs = [f'"{name}": "{" ".join(a)}"' for name, a in package.outputs.items()]
    yield from wrapped("outputs={", outputs, "},", "    ")
    yield f"    rows={len(package.form.micro_steps)},"
    if has_entries_apart(package.form):
        yield "    apart=True,"
    yield "    kernels={"
    for s in package.served:
        key = f"(torch.{s.dtype.value}, {s.dims.K}, {s.dims.V})"
        yield f"        {key}: launch_{s.suffix}.KERNELS,"
    yield "    },"
    yield ")"
    yield "# of this version and this import alone: several can be loaded side by side"
    yield f'NAMESPACE = "{version}" + re.sub(r"\\W", "_", __name__)'
    yield "LIBRARY = support.register(RECURRENCE, NAMESPACE)"
    yield "OPS = getattr(torch.ops, NAMESPACE)"


def _kind(o: Operand) -> str:
    per = "of every micro-step" if o.micro else f", per {o.per.value}"
    return f"{o.kind.spelled} {per}".replace(" ,", ",")


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
        yield f"        {name}: `[{','.join(s.axes)}]`; zero where absent."
    yield "        output_final_state: return the state after the last token too."
    yield "        cu_seqlens: int32 or int64 `[N+1]`, N sequences packed along T, with B = 1."
    yield ""
    yield "    Returns:"
    outputs = [f"`[{','.join(a)}]`" for a in package.outputs.values()]
    each = f"output {outputs[0]}" if len(outputs) == 1 else f"outputs ({', '.join(outputs)})"
    yield f"        The {each}, and the final state in float32 or None."
    yield ""
    yield "    Raises:"
    yield "        ValueError, TypeError: they name the operand, what it is and what was expected."
    yield "        RuntimeError: no kernel of this package can serve the call; says why."
    yield '    """'
    arguments = ["RECURRENCE", "OPS.forward", f"({', '.join(package.operands)},)"]
    yield from wrapped(
        "return support.call(", [*arguments, *_OPTIONS, *package.params], ")", "    "
    )


def _summary(package: Package) -> str:
    first = package.declaration.doc.partition("\n")[0] or f"The recurrence {package.form.name}."
    return first.replace("\\", "\\\\").replace('"""', "'''")
