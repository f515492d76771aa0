"""What of a normal form has no chunk form yet, and why."""

from __future__ import annotations

from collections.abc import Iterator

from ..dsl.ir import Kind
from ..dsl.normal_form import NormalForm, are_rows
from ..dsl.turns import mixing_factors


def refusals(form: NormalForm) -> Iterator[tuple[str, str]]:
    """What the chunk derivation does not lower of `form`, each with the reason."""
    every = range(len(form.micro_steps))
    if any(f.kind is not Kind.SCALAR for _, f in mixing_factors(form, every)):
        why = (
            "states that mix in one micro-step decay per channel in another: what is left of one "
            "in another between two rows would be a matrix of rows per channel"
        )
        yield "states that mix carry a gate per channel", why
    both = {u.state for m in form.micro_steps for u in m.updates if u.columns is not None}
    if any(r.state in both and r.other_axis is not form.transposed for r in form.reads):
        why = (
            "its decays along the other axis come between what is summed over, and those of the "
            "axis that is read then between tokens: two sums of tokens under vector gates, one in "
            "the other, have no gradient yet"
        )
        yield "a state that decays along both axes is read over both", why
    if len(form.micro_steps) > 1 and not are_rows(form):
        why = (
            "a row of time holds one micro-step's operands and reads, and these micro-steps "
            "cannot be expanded into one"
        )
        yield "what belongs to one micro-step is used in another", why
