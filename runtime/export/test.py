"""Prints the test of an exported package: its kernels against its reference, gradients included."""

from __future__ import annotations

from string import Template

from ...codegen.interface import Dtype
from ...dsl import errors
from ...dsl.ir import Kind
from ...dsl.normal_form import NormalForm, StateDecl
from ..inputs import Ranges, kinds_only, ranges, usual_params
from .contents import Package, axes
from .text import module, wrapped

# relative RMS errors, gradients of gates included; float32 as tf32 in three parts
_TOLERANCES = {Dtype.FLOAT32: 1e-4, Dtype.BFLOAT16: 2e-2, Dtype.FLOAT16: 1e-2}


def _ranges(form: NormalForm) -> Ranges:
    """The ranges of the operands; their kinds alone where no ranges are found to be legal."""
    try:
        return ranges(form, usual_params(form))
    except errors.NotLowered:
        return kinds_only(form)


def print_test(package: Package) -> str:
    """The module `test_<name>.py`: needs torch only, and pytest or nothing to run it."""
    found = _ranges(package.form)
    made = []
    for o in package.form.operands:
        normal = f"normal(random, {', '.join(axes(o, package.micro))})"
        made.append(f'        "{o.name}": {found.text(o, normal)},')
    states = [_state(s) for s in package.form.states]
    states_given = "tuple(states)" if len(package.states) > 1 else "states[0]"
    cases = [
        f"    (torch.{s.dtype.value}, {s.dims.K}, {s.dims.V}, {s.config.chunk}, "
        f"{_TOLERANCES[s.dtype]}),"
        for s in package.served
    ]
    numbers = [f'"{name}": {value!r}' for name, value in usual_params(package.form).items()]
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
            "from .op import NARROW",
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
            "    narrow = {n: x.to(dtype) for n, x in made.items() if n in NARROW}",
            "    return {n: x.to(DEVICE).requires_grad_() for n, x in {**made, **narrow}.items()}",
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


def _state(state: StateDecl) -> str:
    text = f"normal(random, {', '.join(state.axes)})"
    return text if state.kind is Kind.STATE else f"{text}.abs()"


_COMPARE = '''
def results(leaves, o, final):
    """Outputs, final states, and the gradients of a random weighting of them."""
    made = [x for y in (o, final) for x in (y if isinstance(y, tuple) else (y,))]
    random = torch.Generator().manual_seed(2)
    weights = [normal(random, *y.shape).to(y.device) for y in made]
    loss = sum((y * w).sum() for y, w in zip(made, weights))
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach().double() for x in (*made, *gradients)]


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
