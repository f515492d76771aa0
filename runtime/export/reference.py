"""Prints the reference of an exported package: the declared step in torch, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ...codegen.expressions import Names
from ...dsl.elementwise import ELEMENTWISE
from ...dsl.ir import Kind, Node, Op, topological
from ...dsl.notation import PYTHON, Level, Text, read
from ...dsl.step import Step
from .contents import Package
from .text import module, wrapped

_OWN = ("K", "V", "step", "torch")  # what the printed step calls its own things
# of numbers: Python computes it, without tensors
_ARITHMETIC = (*PYTHON.signs, Op.NEG, Op.WITHIN, Op.CONST, Op.PARAM)
_READS = {Op.READ: "...k,...kv->...v", Op.READ_VALUE: "...kv,...v->...k"}
_LONG = 36  # an expression longer than this gets a name of its own


def print_reference(package: Package) -> str:
    """The module `reference.py`: `step`, one token, and the recurrence over whole sequences."""
    return module(
        [
            *package.header(f"{package.name}, token by token in plain torch: slow, on any device."),
            "",
            "import torch",
            "",
            "from . import token_loop",
            "from .op import AXES, STATES",
        ],
        _StepPrinter(package.declaration.step(package.micro)).lines(),
        _over_sequences(package),
    )


class _StepPrinter:
    """The step as a function of torch tensors whose last axes are a head's."""

    def __init__(self, step: Step) -> None:
        self._step = step
        names = Names(_OWN)
        own = [*(s.name for s in step.states), *(o.name for o in step.operands)]
        self._known = {name: names.fresh(name) for name in (*own, *(p.name for p in step.params))}
        self._names = names
        self._texts: dict[Node, Text] = {}
        order = topological(*step.roots)
        self._uses = Counter(a for n in order for a in n.args)
        self._uses.update(step.roots)

    def lines(self) -> Iterator[str]:
        step = self._step
        yield from wrapped("def step(", [*self._known.values()], "):")
        state, output = (_named("state", step.states), _named("output", step.outputs))
        yield f'    """One token of every head: the new {state}, and the {output}.'
        yield ""
        for s in step.states:
            yield f"    {self._known[s.name]}: `[{','.join(('…', *s.kind.axes))}]`."
        for o in step.operands:
            axes = ",".join(("…", *o.kind.axes))
            micro = "; a tuple, one of each micro-step" if o.micro else ""
            yield f"    {self._known[o.name]}: `[{axes}]`{micro}."
        yield '    """'
        for node in topological(*step.roots):
            self._texts[node] = self._print(node)
            text = self._texts[node].text
            if self._named(node, text):
                name = self._names.fresh(self._stem(node))
                yield f"    {name} = {text}"
                self._texts[node] = Text(name)
        yield from wrapped("return (", [self._texts[n].text for n in step.roots], ")", "    ")

    def _stem(self, node: Node) -> str:
        """States are called like the state that they become, whatever else is x."""
        for state, end in zip(self._step.states, self._step.next_states, strict=True):
            if node == end or (node.kind is state.kind and node.kind.is_state):
                return self._known[state.name]
        return "x"

    def _named(self, node: Node, text: str) -> bool:
        shared = self._uses[node] > 1 or len(text) > _LONG
        plain = not node.args or node.op is Op.WITHIN or node in self._step.outputs
        return shared and not plain

    def _print(self, node: Node) -> Text:
        op, args = node.op, node.args
        if op is Op.CONST:
            (value,) = node.attrs
            return read(repr(value))
        if op in (Op.STATE, Op.PARAM):
            return Text(self._known[str(node.attrs[0])])
        if op is Op.OPERAND:
            name, index = node.attrs
            text = self._known[str(name)]
            return Text(text if index is None else f"{text}[{index}]")
        if op is Op.WITHIN:
            return self._texts[args[0]]
        if op in PYTHON.signs:
            return PYTHON.binary(op, *(self._lifted(a, node.kind) for a in args))
        if op is Op.NEG:
            return PYTHON.negative(self._texts[args[0]])
        if op is Op.SCALE:
            return self._product(self._lifted(args[1], node.kind), self._texts[args[0]])
        if op is Op.SUM:
            return Text(f"{self._atom(args[0])}.sum(-1)")
        if op is Op.OUTER:
            if node.kind is Kind.KEY_STATE:
                return self._product(self._texts[args[0]], self._lifted(args[1], node.kind))
            key, value = (self._atom(a) for a in args)
            return self._product(Text(f"{key}[..., None]"), Text(f"{value}[..., None, :]"))
        if op is Op.READ and node.kind is Kind.SCALAR:
            return Text(f"({self._product(*(self._texts[a] for a in args)).text}).sum(-1)")
        if op in _READS:
            both = ", ".join(self._texts[a].text for a in args)
            return Text(f'torch.einsum("{_READS[op]}", {both})')
        parts = [self._tensor(a, node.kind) for a in args]
        return Text(ELEMENTWISE[op].torch.format(**dict(zip("xy", parts, strict=False))))

    def _product(self, x: Text, y: Text) -> Text:
        return PYTHON.binary(Op.MUL, x, y)

    def _atom(self, node: Node) -> str:
        return self._texts[node].at(Level.ATOM)

    def _lifted(self, node: Node, kind: Kind) -> Text:
        """An argument that broadcasts against what has `kind`."""
        missing = len(kind.axes) - len(node.kind.axes)
        if missing == 0 or _is_number(node):
            return self._texts[node]
        if node.kind is Kind.VALUE:
            return Text(f"{self._atom(node)}[..., None, :]")
        return Text(f"{self._atom(node)}[{', '.join(['...', *['None'] * missing])}]")

    def _tensor(self, node: Node, kind: Kind) -> str:
        """An argument of a function that takes tensors only."""
        if not all(n.op in _ARITHMETIC for n in topological(node)):
            return self._lifted(node, kind).text
        like = next(iter(self._known.values()))
        return f"{like}.new_tensor({self._texts[node].text})"


def _is_number(node: Node) -> bool:
    """Whether `node` is a Python number, or a tensor without axes, which broadcasts like one."""
    return not any(n.op in (Op.OPERAND, Op.STATE) for n in topological(node))


def _named(what: str, several: Sequence[object]) -> str:
    return what if len(several) == 1 else f"{what}s"


def _over_sequences(package: Package) -> Iterator[str]:
    """The function over whole sequences, packed or not."""
    options = ["initial_state=None", "cu_seqlens=None", "dtype=torch.float64"]
    arguments = [*package.operands, "*", *package.keywords, *options]
    yield from wrapped(f"def {package.name}(", arguments, "):")
    outputs = [f"`[{','.join(a)}]`" for a in package.outputs.values()]
    yield f'    """The {_named("output", outputs)} and the final state, in `dtype`.'
    yield ""
    yield from wrapped(f"    {_named('Output', outputs)}: ", outputs, ".")
    yield ""
    yield f"    Arguments as those of `op.{package.name}`; differentiable as often as you like."
    yield '    """'
    operands = [f'"{name}": {name}' for name in package.operands]
    yield from wrapped("operands = {", operands, "}", "    ")
    given = f"({', '.join([*package.params, ''])})" if package.params else "()"
    axes = tuple(" ".join(a) for a in package.outputs.values())
    call = ["step", "AXES", "STATES", repr(axes), "operands"]
    call += [given, "initial_state", "cu_seqlens", "dtype"]
    yield from wrapped("return token_loop.run(", call, ")", "    ")
