"""Prints the test of an exported package: its kernels against its reference, gradients included."""

from __future__ import annotations

import itertools
import math
from enum import Enum
from string import Template

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ...codegen.interface import Dtype
from ...dsl import oracle
from ...dsl.ir import Kind, Node, Op, Per, topological
from ...dsl.normal_form import Operand
from .contents import Package, axes, module, wrapped

# relative RMS errors, gradients of gates included; float32 as tf32 in three parts
_TOLERANCES = {Dtype.FLOAT32: 1e-4, Dtype.BFLOAT16: 2e-2, Dtype.FLOAT16: 1e-2}
_SAMPLES, _CHANNELS = 256, 4


class Draw(Enum):
    """How an operand is made of normal samples: as text, and as what the text does."""

    NORMAL = ("{}", lambda x: x)
    UNIT = ("normalize({}, dim=-1)", lambda x: normalize(x, dim=-1))
    POSITIVE_UNIT = ("normalize({}, dim=-1).abs()", lambda x: normalize(x, dim=-1).abs())
    STEP = ("{}.sigmoid()", torch.sigmoid)
    LOG_DECAY = ("-softplus({})", lambda x: -softplus(x))

    def text(self, normal: str) -> str:
        """The expression in the printed test."""
        return str(self.value[0]).format(normal)

    def of(self, normal: Tensor) -> Tensor:
        """Its value."""
        made: Tensor = self.value[1](normal)
        return made


def draws(package: Package) -> dict[str, Draw]:
    """How to draw each operand so that log-decays are at most 0 and promises hold."""
    form = package.form
    # a KeyState is a denominator: it stays away from 0
    unit = Draw.UNIT
    if any(s.kind is Kind.KEY_STATE for s in form.states):
        unit = Draw.POSITIVE_UNIT
    chosen = {}
    for o in form.operands:
        usual = {Kind.KEY: unit, Kind.SCALAR: Draw.STEP, Kind.VALUE: Draw.NORMAL}[o.kind]
        chosen[o.name] = usual if o.per is Per.TOKEN else Draw.NORMAL
    updates = [u for m in form.micro_steps for u in m.updates]
    conditions = [(u.log_decay, -math.inf, 0.0) for u in updates if u.log_decay is not None]
    for node in topological(*package.declaration.step(package.micro).roots):
        if node.op is Op.WITHIN and not any(n.op is Op.STATE for n in topological(node)):
            low, high = (float(x) for x in node.attrs if isinstance(x, (int, float)))
            conditions.append((node.args[0], low, high))
    for node, low, high in conditions:
        chosen |= _found(package, node, low, high, chosen)
    return chosen


def _found(
    package: Package, node: Node, low: float, high: float, usual: dict[str, Draw]
) -> dict[str, Draw]:
    """The first draws of the operands below `node` under which samples of it lie in the range."""
    leaves = [n for n in topological(node) if n.op is Op.OPERAND]
    names = list(dict.fromkeys(str(n.attrs[0]) for n in leaves))
    random = torch.Generator().manual_seed(0)
    normal = {
        n: torch.randn(
            (_SAMPLES, *(() if n.kind is Kind.SCALAR else (_CHANNELS,))),
            generator=random,
            dtype=torch.float32,
            device="cpu",
        ).double()
        for n in leaves
    }
    params = {n: _numbers(package)[str(n.attrs[0])] for n in topological(node) if n.op is Op.PARAM}
    choices = [dict.fromkeys((usual[n], Draw.STEP, Draw.LOG_DECAY)) for n in names]
    for choice in itertools.product(*choices):
        draw = dict(zip(names, choice, strict=True))
        env = {n: draw[str(n.attrs[0])].of(x) for n, x in normal.items()}
        env |= {n: torch.tensor(x, dtype=torch.float64, device="cpu") for n, x in params.items()}
        nothing = torch.zeros((), dtype=torch.float64, device="cpu")
        (value,) = oracle.evaluate([node], env) if env else (nothing,)
        if bool(((value >= low) & (value <= high)).all()):
            return draw
    return {}


def _numbers(package: Package) -> dict[str, float]:
    """The run-time floats of a call: their defaults, or 1."""
    return {p.name: 1.0 if p.default is None else p.default for p in package.form.params}


def print_test(package: Package) -> str:
    """The module `test_<name>.py`: needs torch only, and pytest or nothing to run it."""
    how = draws(package)
    made = [
        f'        "{o.name}": {_operand(package, o, how[o.name])},' for o in package.form.operands
    ]
    states = [_state(s.kind) for s in package.form.states]
    states_given = "tuple(states)" if len(package.states) > 1 else "states[0]"
    cases = [
        f"    (torch.{s.dtype.value}, {s.dims.K}, {s.dims.V}, {s.config.chunk}, "
        f"{_TOLERANCES[s.dtype]}),"
        for s in package.served
    ]
    numbers = [f'"{name}": {value!r}' for name, value in _numbers(package).items()]
    return module(
        [
            *package.header(f"{package.name}: kernels against reference.py in float64."),
            "",
            "import os",
            "import unittest",
            "",
            "import torch",
            "from torch.nn.functional import normalize, softplus  # noqa: F401",
            "",
            f"from . import {package.name}, reference",
            "",
            'DEVICE = "cuda" if torch.cuda.is_available() else "cpu"',
            "# dtype, K, V, tokens of a chunk, allowed relative RMS error",
            "CASES = (",
            *cases,
            ")",
            *wrapped("NUMBERS = {", numbers, "}"),
        ],
        [
            "def normal(random, *shape):",
            '    """Standard normal numbers."""',
            '    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")',
        ],
        [
            "def make_operands(dtype, B, T, H, HV, K, V):",
            '    """Random operands; gates in the ranges that the recurrence expects."""',
            "    random = torch.Generator().manual_seed(0)",
            "    made = {",
            *made,
            "    }",
            "    return {n: x.to(DEVICE).requires_grad_() for n, x in made.items()}",
        ],
        [
            "def make_states(N, HV, K, V):",
            '    """Random initial states."""',
            "    random = torch.Generator().manual_seed(1)",
            *wrapped("made = [", states, "]", "    "),
            "    return [s.to(DEVICE).requires_grad_() for s in made]",
        ],
        [Template(_COMPARE).substitute(name=package.name, states=states_given).strip()],
    )


def _operand(package: Package, o: Operand, draw: Draw) -> str:
    text = draw.text(f"normal(random, {', '.join(axes(o, package.micro))})")
    if o.name not in package.narrow:
        return text
    return f"({text}).to(dtype)" if text.startswith("-") else f"{text}.to(dtype)"


def _state(kind: Kind) -> str:
    shape = "N, HV, K, V" if kind is Kind.STATE else "N, HV, K"
    text = f"normal(random, {shape})"
    return text if kind is Kind.STATE else f"{text}.abs()"


_COMPARE = '''
def results(leaves, o, final):
    """Output, final states, and the gradients of a random weighting of them."""
    finals = final if isinstance(final, tuple) else (final,)
    random = torch.Generator().manual_seed(2)
    weights = [normal(random, *y.shape).to(y.device) for y in (o, *finals)]
    loss = sum((y * w).sum() for y, w in zip((o, *finals), weights))
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach().double() for x in (o, *finals, *gradients)]


def compare(dtype, K, V, T, tolerance, cu_seqlens=None, H=1, HV=2):
    """The kernels' results against those of the token loop, from the same numbers."""
    B = 1
    operands = make_operands(dtype, B, T, H, HV, K, V)
    states = make_states(B if cu_seqlens is None else len(cu_seqlens) - 1, HV, K, V)
    leaves = [*operands.values(), *states]
    call = {**operands, **NUMBERS, "initial_state": $states, "cu_seqlens": cu_seqlens}
    got = results(leaves, *$name(**call, output_final_state=True))
    want = results(leaves, *reference.$name(**call))
    for n, (x, y) in enumerate(zip(got, want)):
        error = (x - y).norm() / y.norm().clamp(min=1e-3 * y.numel() ** 0.5)
        assert error <= tolerance, f"result {n}: relative error {error:.1e}, not {tolerance}"


def cases():
    """The cases that run here: all of them on a GPU, none on a CPU but in the interpreter."""
    if DEVICE == "cuda":
        return CASES
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise unittest.SkipTest("needs a GPU, or TRITON_INTERPRET=1")
    # Triton's interpreter computes bfloat16 products wrongly
    return [case for case in CASES if case[0] != torch.bfloat16]


def test_whole_sequences():
    for dtype, K, V, chunk, tolerance in cases():
        compare(dtype, K, V, chunk + 3, tolerance)


def test_packed_sequences():
    for dtype, K, V, chunk, tolerance in cases():
        cu_seqlens = torch.tensor([0, 2, 2, chunk + 3], dtype=torch.int32, device="cpu")
        compare(dtype, K, V, chunk + 3, tolerance, cu_seqlens)


if __name__ == "__main__":
    test_whole_sequences()
    test_packed_sequences()
    print(f"agrees with the reference: {cases()}")
'''
