"""Tracing: what a step may look like, and what StepIR comes out."""

from __future__ import annotations

import pytest
from chunkwise import dsl
from chunkwise.dsl import (
    Declaration,
    HeadKey,
    Key,
    KeyState,
    Scalar,
    State,
    Value,
    dot,
    errors,
    exp,
    outer,
    trace,
)
from chunkwise.dsl.ir import Kind, Op, Per, topological
from chunkwise.dsl.verify import verify_step


def delta(S: State, k: Key, v: Value, beta: Scalar) -> State:
    """A helper: tracing goes through it."""
    return S + beta * outer(k, v - k @ S)


def test_helpers_closures_and_numbers() -> None:
    scale = 0.25

    def rule(S: State, q: Key, k: Key, v: Value, beta: Scalar, *, eps: float = 1e-3):
        S = delta(S, k, v, beta)
        return S, scale * q @ S + eps

    step = trace(rule)
    verify_step(step)
    assert [p.name for p in step.params] == ["eps"]
    assert step.params[0].default == 1e-3
    constants = {n.attrs[0] for n in topological(*step.roots) if n.op is Op.CONST}
    assert constants == {0.25}
    read = next(n for n in topological(*step.roots) if n.op is Op.READ)
    assert read.loc is not None
    assert read.loc.function == "delta"  # where it was written, not where it was called


def test_micro_operands_are_retraced_per_length() -> None:
    def rule(S: State, q: Key, k: tuple[Key, ...], v: tuple[Value, ...]):
        assert isinstance(k, tuple)
        for k_i, v_i in zip(k, v, strict=True):
            S = S + outer(k_i, v_i)
        return S, q @ S

    d = Declaration(rule)
    assert d.has_micro
    assert [o.micro for o in d.operands] == [False, True, True]
    for n in (1, 3):
        step = d.step(n)
        indices = {x.attrs for x in topological(*step.roots) if x.op is Op.OPERAND}
        assert {("k", i) for i in range(n)} <= indices
        assert step.micro == n
    assert d.step(2) is d.step(2)


def test_static_keywords_choose_the_program() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, *, passes: int = 1, gated: bool = False):
        for _ in range(passes):
            S = S + outer(k, v - k @ S)
        return (0.5 * S if gated else S), q @ S

    d = Declaration(rule)
    assert d.statics == {"passes": 1, "gated": False}
    assert len(d.normal_form(static={"passes": 3}).micro_steps) == 3
    assert d.normal_form(static={"gated": True}).micro_steps[0].updates[0].log_decay is not None


def test_kinds_by_operand() -> None:
    d = dsl.declaration(lambda_free)
    assert [(o.name, o.kind, o.per) for o in d.operands] == [
        ("q", Kind.KEY, Per.TOKEN),
        ("k", Kind.KEY, Per.TOKEN),
        ("v", Kind.VALUE, Per.TOKEN),
        ("u", Kind.KEY, Per.HEAD),
    ]
    assert [(s.name, s.kind) for s in d.states] == [("S", Kind.STATE), ("z", Kind.KEY_STATE)]


def lambda_free(S: State, z: KeyState, q: Key, k: Key, v: Value, u: HeadKey):
    """Both states, a per-head operand."""
    S, z = S + outer(u * k, v), z + k
    return (S, z), (q @ S) / dot(q, z)


def test_annotations_that_are_not_strings() -> None:
    """Without `from __future__ import annotations` the annotations are objects."""
    namespace: dict[str, object] = {}
    source = (
        "from chunkwise.dsl import State, Key, Value, outer\n"
        "def rule(S: State, q: Key, k: 'Key', v: Value) -> tuple[State, 'Unknown']:\n"
        "    S = S + outer(k, v)\n"
        "    return S, q @ S\n"
    )
    exec(compile(source, "rules.py", "exec", dont_inherit=True), namespace)
    rule = namespace["rule"]
    assert callable(rule)
    assert [o.kind for o in trace(rule).operands] == [Kind.KEY, Kind.KEY, Kind.VALUE]


def test_annotations_imported_inside_a_function() -> None:
    from chunkwise.dsl import Key as MyKey

    def rule(S: State, q: MyKey, k: MyKey, v: Value):
        assert MyKey is not None  # closes over the name, so that the string resolves
        return S + outer(k, v), q @ S

    assert len(trace(rule).operands) == 3


def test_numpy_scalars_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")

    def rule(S: State, q: Key, k: Key, v: Value):
        S = numpy.float64(0.5) * S + outer(numpy.float32(2.0) * k, v / numpy.int64(4))
        return S, q @ S

    constants = {n.attrs[0] for n in topological(*trace(rule).roots) if n.op is Op.CONST}
    assert constants == {0.5, 2.0, 4.0}


def test_equal_expressions_are_one_node() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar):
        return exp(g) * S + outer(k, v), q @ (exp(g) * S)

    step = trace(rule)
    exps = [n for n in topological(*step.roots) if n.op is Op.EXP]
    assert len(exps) == 1


def test_digest_ignores_lines_and_names_the_step() -> None:
    def rule(S: State, q: Key, k: Key, v: Value):
        return S + outer(k, v), q @ S

    first = trace(rule)

    def rule(S: State, q: Key, k: Key, v: Value):  # type: ignore[no-redef]
        S_old = S
        S = S + outer(k, v)
        return S, q @ S_old

    assert first.digest == trace(rule).digest


def test_powers_and_signs() -> None:
    def rule(S: State, q: Key, k: Key, v: Value):
        S = -(+(-S)) + outer(k**2 - k**-1, +v)
        return S, q @ S

    verify_step(trace(rule))


def test_library_lists_itself() -> None:
    from chunkwise.dsl import library

    everything = library.all_declarations()
    assert len({d.name for d in everything}) == len(everything) >= 23
    assert library.by_name("kda") is library.kda
    for d in everything:
        assert d.doc
        assert d.source_location is not None
    with pytest.raises(errors.UnknownRecurrence, match="gated_delta_rule"):
        library.by_name("gdr")
