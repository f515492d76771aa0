"""The proof holds for the library, and fails where a normal form is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from chunkwise.dsl import (
    Declaration,
    Key,
    Scalar,
    State,
    Value,
    errors,
    exp,
    library,
    outer,
    prove,
    sigmoid,
    sqrt,
    tanh,
)
from chunkwise.dsl.normal_form import MicroStep, NormalForm, Phase, Update, Write, levels_of


@pytest.mark.parametrize("d", library.all_declarations(), ids=lambda d: d.name)
def test_library(d: Declaration) -> None:
    proof = prove.prove(d, chunk=3)
    levels = len(levels_of(d.normal_form(d.default_micro)))
    assert proof.chunks == ((2,) if d.has_micro or levels > 1 else (2, 3))
    assert len(proof.claims) == 3
    assert str(proof).startswith(f"{d.name}: proved for chunks of 2")


def test_four_tokens() -> None:
    assert "chunks of 2, 3, 4 tokens" in str(prove.prove(library.gated_delta_rule, chunk=4))


def test_what_was_not_normalised_is_refused() -> None:
    def rule(S: State, q: Key, k: Key, v: Value):
        return S + outer(k, tanh(k @ S) + v), q @ S

    with pytest.raises(errors.NotLowered, match="no chunk form to prove"):
        prove.prove(Declaration(rule, any_step=True))


def test_decays_of_every_rule() -> None:
    """The multiplier comes back from its logarithm."""

    def rule(S: State, q: Key, k: Key, v: Value, f: Scalar, w: Key):
        S = 0.9 * sqrt(sigmoid(f)) * (1 - sigmoid(w)) * S
        return S + outer(k, v - k @ S), q @ S

    assert "✓" in str(prove.prove(Declaration(rule), chunk=2))


def broken(change: Callable[[Update], Update]) -> Declaration:
    """The gated delta rule with a normal form that does not mean the same."""
    d = Declaration(library.gated_delta_rule.function)
    form = d.normal_form()
    wrong = replace(form, micro_steps=(MicroStep((change(form.micro_steps[0].updates[0]),)),))
    return with_form(d, wrong)


def with_form(d: Declaration, form: NormalForm) -> Declaration:
    d.normal_form = lambda micro=1, static=None: form  # type: ignore[method-assign]
    return d


def undecayed(update: Update) -> Update:
    (write,) = update.writes
    assert write.correction is not None
    return replace(
        update, writes=(replace(write, correction=replace(write.correction, decayed=False)),)
    )


def without_recall(update: Update) -> Update:
    (write,) = update.writes
    return replace(update, writes=(Write(write.key, write.value, None),))


@pytest.mark.parametrize(
    "change",
    [undecayed, without_recall, lambda u: replace(u, log_decay=None)],
    ids=["reads the undecayed state", "forgets to recall", "forgets the decay"],
)
def test_wrong_forms_are_caught(change: Callable[[Update], Update]) -> None:
    with pytest.raises(errors.ProofFailed, match="gated_delta_rule"):
        prove.prove(broken(change), chunk=2)


def test_a_wrong_moment_is_caught() -> None:
    d = Declaration(library.gla.function)
    form = d.normal_form()
    wrong = replace(form, reads=(replace(form.reads[0], phase=Phase.DECAYED),))
    with pytest.raises(errors.ProofFailed, match="output 0 of 2 tokens"):
        prove.prove(with_form(d, wrong), chunk=2)


def test_a_decay_with_the_wrong_gate_is_caught() -> None:
    def rule(S: State, q: Key, k: Key, v: Value, g: Scalar, h: Scalar):
        return exp(g) * S + exp(h) * outer(k, v), q @ S

    d = Declaration(rule)
    form = d.normal_form()
    (update,) = form.micro_steps[0].updates
    assert update.log_decay is not None
    other = Declaration(rule).operands[4]
    assert other.name == "h"
    from chunkwise.dsl.step import operand_leaf

    wrong = replace(update, log_decay=operand_leaf(other))
    d = with_form(d, replace(form, micro_steps=(MicroStep((wrong,)),)))
    with pytest.raises(errors.ProofFailed):
        prove.prove(d, chunk=2)
