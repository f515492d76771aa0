"""Every mistake in a declaration has its message, at the user's own line."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from chunkwise.dsl import (
    Declaration,
    HeadScalar,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    clamp,
    dot,
    errors,
    exp,
    maximum,
    outer,
    rotate,
    sigmoid,
    softplus,
    tanh,
    within,
)
from chunkwise.dsl import sum as channels
from chunkwise.dsl.explain import explain

Case = tuple[type[errors.ChunkwiseError], str, Callable[..., object]]
CASES: list[Case] = []


def mistake(
    error: type[errors.ChunkwiseError], message: str
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers a step that must be refused with `error` and a text that contains `message`."""

    def register(step: Callable[..., object]) -> Callable[..., object]:
        CASES.append((error, message, step))
        return step

    return register


tensor = torch.ones(3)
array = np.ones(3)


@mistake(errors.WrongSide, "write `q @ S`")
def state_at_key(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    return S, S @ q


@mistake(errors.WrongSide, "write `S @ v`")
def value_at_state(S: State, q: Key, k: Key, v: Value):
    return S + outer(k - v @ S, v), q @ S


@mistake(errors.KeyTimesValue, "the matrix k vᵀ is `outer(k, v)`")
def key_times_value(S: State, q: Key, k: Key, v: Value):
    S = S + k * v
    return S, q @ S


@mistake(errors.KindMismatch, "what is written to a State is `outer(k, v)`")
def state_plus_value(S: State, q: Key, k: Key, v: Value):
    return S + v, q @ S


@mistake(errors.KindMismatch, "maximum got a Key and a Value")
def maximum_of_kinds(S: State, q: Key, k: Key, v: Value):
    return S + outer(maximum(k, v), v), q @ S


@mistake(errors.KindMismatch, "at most one state")
def state_times_state(S: State, q: Key, k: Key, v: Value):
    return S * outer(k, v), q @ S


@mistake(errors.KindMismatch, "a KeyState has no V axis")
def key_state_columns(z: KeyState, q: Key, k: Key, v: Value):
    z = v * z + k
    return z, dot(q, z) * v


@mistake(errors.KindMismatch, "two Keys or two Values")
def dot_of_kinds(S: State, q: Key, k: Key, v: Value):
    return dot(k, v) * S, q @ S


@mistake(errors.KindMismatch, "sum got a Scalar")
def sum_of_scalar(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return exp(channels(g)) * S + outer(k, v), q @ S


@mistake(errors.MatmulOfVectors, "Python reads `k @ exp(g) * S` as `(k @ exp(g)) * S`")
def precedence(S: State, q: Key, k: Key, v: Value, g: Scalar):
    S = S + outer(k, v - k @ exp(g) * S)
    return S, q @ S


@mistake(errors.MatmulOfVectors, "`dot(x, y)`")
def key_at_key(S: State, q: Key, k: Key, v: Value):
    return S + outer(k, (k @ q) * v), q @ S


@mistake(errors.OuterOrder, "the Key comes first")
def outer_order(S: State, q: Key, k: Key, v: Value):
    S = S + outer(v, k)
    return S, q @ S


@mistake(errors.StatePlusNumber, "the number 1e-06 is added to a state")
def state_plus_number(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v) + 1e-6
    return S, q @ S


@mistake(errors.StatePlusNumber, "a Scalar is added to a state")
def state_plus_scalar(S: State, q: Key, k: Key, v: Value, g: Scalar):
    S = S + outer(k, v) + g
    return S, q @ S


@mistake(errors.StateAsVector, "read it: `q @ S`")
def key_state_as_key(z: KeyState, q: Key, k: Key, v: Value):
    z = z + k
    return z, channels(z) * v


@mistake(errors.StateAsVector, "/ got a KeyState")
def divide_by_state(S: State, z: KeyState, q: Key, k: Key, v: Value):
    return (S + outer(k, v), z + k), (q @ S) / z


@mistake(errors.ForeignFunction, "torch.exp was called on a traced value")
def torch_exp(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return torch.exp(g) * S + outer(k, v), q @ S


@mistake(errors.ForeignFunction, "from chunkwise import exp")
def numpy_exp(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return np.exp(g) * S + outer(k, v), q @ S


@mistake(errors.ForeignFunction, "use chunkwise's own functions: abs, clamp, cos, dot, exp")
def math_exp(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return math.exp(g) * S + outer(k, v), q @ S


@mistake(errors.TracedBranch, "use `maximum`, `minimum` or `clamp`")
def builtin_max(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return exp(max(g, -5)) * S + outer(k, v), q @ S


@mistake(errors.TracedBranch, "it cannot branch on data")
def branch(S: State, q: Key, k: Key, v: Value, g: Scalar):
    if g > 0:
        S = exp(g) * S
    return S + outer(k, v), q @ S


@mistake(errors.TracedBranch, "== or !=")
def equality(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return (exp(g) * S if g == 0 else S) + outer(k, v), q @ S


@mistake(errors.TracedBranch, "if, and, or, not, while")
def truth(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return exp(g and 1.0) * S + outer(k, v), q @ S


@mistake(errors.TracedIteration, "use `chunkwise.sum` or `dot`")
def builtin_sum(S: State, q: Key, k: Key, v: Value):
    k = k / sum(k * k)
    return S + outer(k, v), q @ S


@mistake(errors.TracedIteration, "indexing")
def indexing(S: State, q: Key, k: Key, v: Value):
    return S + k[0] * outer(k, v), q @ S


@mistake(errors.TracedIteration, "len()")
def length(S: State, q: Key, k: Key, v: Value):
    return S + outer(k, v) / len(k), q @ S


@mistake(errors.NoAttribute, "there is nothing to transpose")
def transpose(S: State, q: Key, k: Key, v: Value):
    return S + k.T @ v, q @ S


@mistake(errors.NoAttribute, "write `exp(x)`")
def method(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return g.exp() * S + outer(k, v), q @ S


@mistake(errors.CapturedTensor, "HeadScalar, HeadKey or HeadValue")
def captured_right(S: State, q: Key, k: Key, v: Value):
    return S + outer(k * tensor, v), q @ S


@mistake(errors.CapturedTensor, "a torch.Tensor from outside the step")
def captured_left(S: State, q: Key, k: Key, v: Value):
    return S + outer(tensor * k, v), q @ S


@mistake(errors.CapturedTensor, "a numpy.ndarray from outside the step")
def captured_array(S: State, q: Key, k: Key, v: Value):
    return S + outer(array * k, v), q @ S


@mistake(errors.BadPower, "expected 2, 3, 4, -1, -2, 0.5 or -0.5")
def power(S: State, q: Key, k: Key, v: Value):
    return S + outer(k**1.7, v), q @ S


@mistake(errors.BadBounds, "within got the bounds [1, 0]")
def bounds(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return within(f, 1, 0) * S + outer(k, v), q @ S


@mistake(errors.BadBounds, "clamp got the bounds [a traced value, 0]")
def traced_bounds(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return clamp(f, f, 0) * S + outer(k, v), q @ S


@mistake(errors.MissingAnnotation, "the parameter 'v' has no annotation")
def missing_annotation(S: State, q: Key, k: Key, v):
    return S + outer(k, v), q @ S


@mistake(errors.BadAnnotation, "the parameter 'v' is annotated Tensor")
def tensor_annotation(S: State, q: Key, k: Key, v: torch.Tensor):
    return S + outer(k, v), q @ S


@mistake(errors.BadAnnotation, "numbers are keyword-only")
def positional_number(S: State, q: Key, k: Key, v: Value, scale: float):
    return S + outer(k, v), scale * q @ S


@mistake(errors.BadAnnotation, "a static number without a default")
def static_number(S: State, q: Key, k: Key, v: Value, *, n: int):
    return S + outer(k, v), n * q @ S


@mistake(errors.BadAnnotation, "a variable argument")
def variable(S: State, q: Key, *k: Key):
    return S, q @ S


@mistake(errors.BadAnnotation, "Key with a default")
def default_operand(S: State, q: Key, v: Value, k: Key = None):
    return S + outer(k, v), q @ S


@mistake(errors.BadAnnotation, "an unknown name")
def unknown_annotation(S: State, q: Keys, k: Key, v: Value):  # noqa: F821
    return S + outer(k, v), q @ S


@mistake(errors.BadAnnotation, "expected a kind")
def tuple_of_states(S: tuple[State, ...], q: Key, k: Key, v: Value):
    return S, q


@mistake(errors.NoState, "declares no state")
def no_state(q: Key, k: Key, v: Value):
    return q, v


@mistake(errors.NothingReturned, "end with `return S, o`")
def nothing_returned(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    q @ S


@mistake(errors.ReturnOrder, "is the order swapped?")
def return_order(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    return q @ S, S


@mistake(errors.BadReturn, "the step returns a State, expected a State (S), then the output")
def only_state(S: State, q: Key, k: Key, v: Value):
    return S + outer(k, v) + outer(q, v)


@mistake(errors.BadReturn, "the states one by one")
def flat_return(S: State, z: KeyState, q: Key, k: Key, v: Value):
    S, z = S + outer(k, v), z + k
    return S, z, q @ S / dot(q, z)


@mistake(errors.BadReturn, "the step returns (a Value, a Value)")
def no_state_returned(S: State, q: Key, k: Key, v: Value):
    return k @ S + v, q @ S


@mistake(errors.BadReturn, "(a State, a State)")
def state_as_output(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v)
    return S, S


@mistake(errors.StateUnchanged, "'S' is returned unchanged")
def unchanged(S: State, q: Key, k: Key, v: Value):
    return S, q @ (S + outer(k, v))


@mistake(errors.UnusedOperand, "'g' is declared but reaches neither")
def unused(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return S + outer(k, v), q @ S


@mistake(errors.NotAffine, "the state passes through tanh")
def tanh_of_read(S: State, q: Key, k: Key, v: Value):
    S = S + outer(k, v + tanh(k @ S))
    return S, q @ S


@mistake(errors.NotAffine, "the state passes through tanh")
def tanh_of_state(S: State, q: Key, k: Key, v: Value):
    S = tanh(S) + outer(k, v)
    return S, q @ S


@mistake(errors.NotAffine, "read with a vector that depends on it")
def read_with_read(S: State, q: Key, k: Key, v: Value):
    y = S @ v
    S = S + outer(k, y @ S)
    return S, q @ S


@mistake(errors.NotAffine, "both sides of outer depend on the state")
def both_sides(S: State, q: Key, k: Key, v: Value):
    S = S + outer(S @ v, k @ S)
    return S, q @ S


@mistake(errors.NotAffine, "multiplied by a value that depends on it")
def divided_by_read(S: State, z: KeyState, q: Key, k: Key, v: Value):
    S, z = S + outer(k, v), (z + k) / dot(k, z)
    return (S, z), q @ S


@mistake(errors.NotAffine, "a product of two values that depend on it")
def square_of_read(S: State, q: Key, k: Key, v: Value):
    r = k @ S
    return S + outer(k, v - r * r), q @ S


@mistake(errors.NoChunkForm, "multiply the factors instead")
def sum_of_gates(S: State, q: Key, k: Key, v: Value, g: Key, h: Value):
    S = 0.5 * exp(g) * S + 0.5 * S * exp(h) + outer(k, v)
    return S, q @ S


@mistake(errors.NoChunkForm, "a system of equations for every channel")
def key_gate_and_right_read(S: State, q: Key, k: Key, v: Value, g: Key):
    S = exp(g) * S
    S = S + outer(k - S @ v, v)
    return S, q @ S


@mistake(errors.NoChunkForm, "does not contain the old S")
def forgotten(S: State, q: Key, k: Key, v: Value):
    return outer(k, v), q @ S


@mistake(errors.NoChunkForm, "states that mix carry a gate per channel")
def vector_coupling(S: State, M: State, q: Key, k: Key, v: Value, g: Key):
    M = exp(g) * M + outer(k, v)
    return (S + M, M), q @ S


@mistake(errors.NotAffine, "S and W see one another, so that none of them is known before")
def cycle(S: State, W: State, q: Key, k: Key, v: Value):
    S, W = S + outer(k, v + tanh(k @ W)), W + outer(k, tanh(k @ S))
    return (S, W), q @ S


@mistake(errors.NoChunkForm, "summed over its channels")
def summed_read(S: State, q: Key, k: Key, v: Value):
    return S + outer(k, channels(k @ S) * v), q @ S


@mistake(errors.NoChunkForm, "a KeyState accompanies a State whose columns")
def transposed_with_key_state(S: State, z: KeyState, q: Key, k: Key, v: Value, g: Value):
    S, z = S * exp(g) + outer(k - S @ v, v), z + k
    return (S, z), q @ S / dot(q, z)


@mistake(errors.StateGrows, "is a sign forgotten?")
def forgotten_sign(S: State, q: Key, k: Key, v: Value, x: Scalar, A_log: HeadScalar):
    S = exp(exp(A_log) * softplus(x)) * S + outer(k, v)
    return S, q @ S


@mistake(errors.StateGrows, "lies in [1.5, 1.5]")
def growing_constant(S: State, q: Key, k: Key, v: Value):
    return 1.5 * S + outer(k, v), q @ S


@mistake(errors.StateGrows, "the state grows")
def loose_clamp(S: State, q: Key, k: Key, v: Value, g: Scalar):
    return exp(clamp(g, -5, 1)) * S + outer(k, v), q @ S


@mistake(errors.StateGrows, "bound the factor: `within(f, -1, 1) * S` promises it")
def promised_too_wide(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return within(f, -2, 2) * S + outer(k, v), q @ S


@mistake(errors.KindMismatch, "`x, y = rotate(x, y, angle)`")
def rotated_pair_as_one(R: State, J: State, q: Key, k: Key, v: Value, a: Scalar):
    R = rotate(R, J, a) + outer(k, v)
    return (R, J), q @ R


@mistake(errors.NoChunkForm, "`rotate(x, y, angle)` under one gate for both")
def rotated_under_one_gate(R: State, J: State, q: Key, k: Key, v: Value, a: Scalar, g: Key):
    R, J = rotate(exp(g) * R, J, a)
    return (R + outer(k, v), J), q @ R


@mistake(errors.NoChunkForm, "gate the rows, or the columns, not both")
def sign_of_rows_and_gate_of_columns(S: State, q: Key, k: Key, v: Value, x: Key, h: Value):
    return tanh(x) * S * exp(h) + outer(k, v), q @ S


@mistake(errors.StateGrows, "its multiplier 1/sigmoid(f) lies in [1, inf]")
def divided_by_less_than_one(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return S / sigmoid(f) + outer(k, v), q @ S


@mistake(errors.UnboundedDecay, "write `within(f, 0, 1) * S`")
def unbounded(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return f * S + outer(k, v), q @ S


@mistake(errors.UnboundedDecay, "nothing bounds it to [-1, 1]")
def unbounded_param(S: State, q: Key, k: Key, v: Value, *, decay: float = 0.9):
    return decay * S + outer(k, v), q @ S


@mistake(errors.StateGrows, "its multiplier 2*tanh(f) lies in [-2, 2]")
def signed_growth(S: State, q: Key, k: Key, v: Value, f: Scalar):
    return 2 * tanh(f) * S + outer(k, v), q @ S


@mistake(errors.DecayNotPositive, "multiplied by the constant 0")
def nothing_left(S: State, q: Key, k: Key, v: Value):
    return 0 * S + outer(k, v), q @ S


@pytest.mark.parametrize(
    ("error", "message", "step"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_mistake(
    error: type[errors.ChunkwiseError], message: str, step: Callable[..., object]
) -> None:
    with pytest.raises(error) as caught:
        Declaration(step)
    assert type(caught.value) is error
    text = caught.value.render()
    assert text.startswith(f"{error.__name__}: ")
    assert message in text
    # the user's own line
    assert "test_errors.py" in text
    assert re.search(r"^\d+ \| ", text, re.MULTILINE)


def test_rendering() -> None:
    """The layout of conventions.md, carets included where Python gives columns."""
    (step,) = (s for _, _, s in CASES if s.__name__ == "tanh_of_read")
    line = step.__code__.co_firstlineno + 2
    with pytest.raises(errors.NotAffine) as caught:
        Declaration(step)
    lines = caught.value.render().splitlines()
    assert lines[0] == (
        "NotAffine: the state passes through tanh, so the step is not affine in the state"
    )
    assert lines[1].endswith(f"test_errors.py:{line}, in tanh_of_read")
    assert lines[1].lstrip().startswith("--> ")
    assert lines[2] == " " * len(str(line)) + " |"
    assert lines[3] == f"{line} |     S = S + outer(k, v + tanh(k @ S))"
    if caught.value.loc is not None and caught.value.loc.col is not None:
        assert lines[4].index("^") == lines[3].index("tanh")
        assert lines[4].count("^") == len("tanh(k @ S)")
    assert any(s.strip().startswith("= why:  chunkwise kernels exist for") for s in lines)
    assert lines[-1].strip().startswith("= help: apply tanh to k, v or the output")


def test_a_parameter_is_pointed_at() -> None:
    (step,) = (s for _, _, s in CASES if s.__name__ == "missing_annotation")
    with pytest.raises(errors.MissingAnnotation) as caught:
        Declaration(step)
    lines = caught.value.render().splitlines()
    assert lines[3].endswith("def missing_annotation(S: State, q: Key, k: Key, v):")
    assert lines[4].index("^") == lines[3].rindex("v")


def test_errors_of_workers_survive_pickling() -> None:
    error = errors.BadShape("g", (2, 3, 4, 5), "[B,T,HV]", kind="Scalar")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.BadShape
    assert again.render() == error.render()


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            errors.BadShape("g", (2, 8, 4, 64), "[B,T,HV]", kind="Scalar"),
            ("'g'", "[2, 8, 4, 64]", "[B,T,HV]", "declared `g: Key`"),
        ),
        (errors.BadShape("k", (2, 8, 4), "[B,T,H,K]", kind="Key"), ("declared `k: Scalar`",)),
        (errors.BadDtype("q", "int64", "a float dtype"), ("'q'", "int64", "a float dtype")),
        (errors.BadDevice("q", "cpu", "cuda:0"), ("'q'", "cpu", "cuda:0")),
        (errors.HeadMismatch("k", 3, "a divisor of 4"), ("'k'", "3 heads", "a divisor of 4")),
        (errors.BadCuSeqlens("[1, 5]", "0 first"), ("[1, 5]", "0 first", "starts at 0")),
        (errors.BadBatch("v", 2, "1"), ("'v'", "2", "expected 1")),
        (errors.MissingOperand("beta", "Scalar", "[B,T,HV]"), ("'beta'", "Scalar", "[B,T,HV]")),
        (errors.UnknownOperand("gate", ["q", "k"]), ("'gate'", "q, k")),
        (errors.NanOperand("v", "3 NaNs"), ("'v'", "3 NaNs", "finite")),
        (errors.PositiveGate("g", "0.25", "at most 0"), ("g reaches 0.25", "a sign forgotten")),
        (
            errors.PositiveGate("within(…) of 'y'", "3.0", "numbers in [0.0, 1.0]"),
            ("reaches 3.0", "promises with `within`", "use `clamp`"),
        ),
        (errors.EngineUnavailable("triton", "no GPU"), ("'triton'", "no GPU")),
        (
            errors.PackageUnavailable("fla", "it is imported", help="call it before"),
            ("package fla", "it is imported", "call it before"),
        ),
        (errors.NotLowered("coupled states", "not derived", "use eager"), ("use eager",)),
        (errors.UnknownRecurrence("gdr", ["gla"]), ("'gdr'", "gla")),
        (errors.ReservedName("engine", ["check", "engine"], None), ("'engine'", "check, engine")),
        (errors.DoubleBackward("gla"), ("gla", "differentiate once")),
        (
            errors.BadConfiguration("EagerConfig.chunk", -1, "a power of two", "halved"),
            ("EagerConfig.chunk is -1", "expected a power of two", "why:  halved"),
        ),
        (errors.BadCache("/c", "/c is no folder"), ("/c", "is no folder", "CHUNKWISE_CACHE")),
        (
            errors.LinkerFailed("cc -shared", 1, "cannot find -lc\n"),
            ("status 1: cc -shared", "cannot find -lc", "C compiler"),
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_bad_calls_name_operand_got_and_expected(
    error: errors.ChunkwiseError, parts: tuple[str, ...]
) -> None:
    for part in parts:
        assert part in error.render()


def test_every_class_of_the_catalogue_is_tested() -> None:
    """A new class must come with a case here (or be a base, or a fault of the compiler)."""
    bases = {"ChunkwiseError", "DeclarationError", "CallError"}
    internal = {"InvalidIR", "ProofFailed"}  # tests of verify and prove
    tested = {error.__name__ for error, _, _ in CASES}
    call = {c.__name__ for c in errors.CallError.__subclasses__()}
    other = {"EngineUnavailable", "NotLowered", "UnknownRecurrence", "ReservedName"}
    other |= {
        "BadArtifact",
        "BadCache",
        "BadConfiguration",
        "LinkerFailed",
        "PackageUnavailable",
    }  # and in tests/cache
    other |= {"BadFile"}  # of the command line
    other |= {"InPlace", "UnknownName", "NotATensor"}  # in tests/test_newcomers.py
    catalogue = {
        n
        for n, c in vars(errors).items()
        if isinstance(c, type) and issubclass(c, errors.ChunkwiseError)
    }
    assert catalogue == bases | internal | tested | call | other


def test_any_step_traces_for_the_reference_engine() -> None:
    (step,) = (s for _, _, s in CASES if s.__name__ == "tanh_of_read")
    d = Declaration(step, any_step=True)
    assert "only the reference engine" in explain(d)
    with pytest.raises(errors.NotAffine):
        d.normal_form()
