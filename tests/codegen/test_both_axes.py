"""States that decay along both axes: every rule is the token loop on every engine, and in parts."""

from __future__ import annotations

import chunkwise as cw
import pytest
from chunkwise import Key, KeyState, Scalar, State, Value, dot, exp, outer, sigmoid, tanh, within
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import chunk_program, transition_of
from chunkwise.codegen.prove import prove
from chunkwise.dsl import prove as symbolic
from chunkwise.runtime.triton.segments import segment_of
from chunkwise.runtime.tuned.artifact import CallSize

from tests.codegen.forms import CASES, COMPILED, check_engine, check_normal_form, check_one_token
from tests.harness import Sizes


@cw.recurrence
def moments(S: State, q: Key, p: Key, k: Key, v: Value, f: Key, h: Value, c: Scalar):
    first = q @ S
    S = within(f, 0, 1) * sigmoid(c) * S * sigmoid(h)
    late = p @ S
    S = S + outer(k, v) + outer(q, h)
    return S, q @ S + first + late


@cw.recurrence
def columns(S: State, q: Value, k: Key, v: Value, g: Key, f: Value):
    S = exp(g) * S * within(f, 0, 1) + outer(k, v)
    return S, S @ q


@cw.recurrence
def one_each(
    S: State, M: State, z: KeyState, q: Key, k: Key, v: Value, g: Key, h: Value, b: Scalar
):
    S = exp(g) * S + 0.5 * sigmoid(b) * outer(k, v - k @ S)
    M = exp(h) * M + outer(k, tanh(q @ S))
    z = exp(g) * z + k
    return (S, M, z), q @ M + dot(q, z)


both = cw.library.gla_both
RULES = {op.declaration.name: op for op in (both, moments, columns, one_each)}
_SOME = [n if n == "gla_both" else pytest.param(n, marks=pytest.mark.long) for n in RULES]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_is_the_token_loop(name: str, case: str) -> None:
    check_engine(RULES[name], CASES[case], "eager")


@pytest.mark.parametrize("name", _SOME)
def test_compiled_for_the_cpu(name: str) -> None:
    pytest.importorskip("tvm")
    check_engine(RULES[name], COMPILED["tvm"], "tvm")


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds
@pytest.mark.parametrize("name", _SOME)
def test_interpreted(name: str) -> None:
    check_engine(RULES[name], COMPILED["triton"], "triton")


@pytest.mark.parametrize("name", RULES)
def test_the_normal_form_is_the_step(name: str) -> None:
    check_normal_form(RULES[name], Sizes(T=5, initial=True))


@pytest.mark.parametrize("name", RULES)
def test_proofs(name: str) -> None:
    assert prove(RULES[name].declaration, chunk=2).left_out == ()
    assert len(symbolic.prove(RULES[name].declaration).claims) == 3


def test_one_token() -> None:
    check_one_token(both)


def test_the_class_names_both() -> None:
    assert "decay per key channel and per value channel" in both.explain()
    assert transition_of(both.declaration.normal_form(), Dims(16, 16)) is None


def test_segments_have_no_columns_that_fade() -> None:
    @cw.recurrence
    def row_and_column(S: State, M: State, q: Key, k: Key, v: Value, g: Key, h: Value):
        S = exp(g) * S + outer(k, v)
        M = exp(h) * M + outer(k, v)
        return (S, M), q @ S + q @ M

    form = row_and_column.declaration.normal_form()
    assert transition_of(form, Dims(16, 16)) is None
    assert segment_of(form, Dims(16, 16), CallSize(1, 1 << 16), 132) == 0


def test_reads_over_both_axes_are_refused() -> None:
    @cw.recurrence
    def two_reads(S: State, q: Key, x: Value, k: Key, v: Value, g: Key, h: Value):
        S = exp(g) * S * exp(h) + outer(k, v)
        return S, (q @ S) * dot(k, S @ x)

    with pytest.raises(cw.errors.NotLowered, match="decays along both axes is read over both"):
        chunk_program(two_reads.declaration.normal_form())


def test_what_is_written_alone_is_read_as_a_product() -> None:
    """A lag holds no state: what is read of it is a product of vectors, in a later update too."""

    @cw.recurrence
    def lagged(S: State, N: State, q: Key, k: Key, v: Value, b: Scalar):
        S = 0.9 * S + 0.5 * N
        N = outer(k, v) + b * outer(q, v)
        S = S + outer(k, tanh(k @ N))
        return (S, N), q @ S + tanh(q @ N)

    check_normal_form(lagged, Sizes(T=5, initial=True))
    check_engine(lagged, CASES["packed"], "eager")
