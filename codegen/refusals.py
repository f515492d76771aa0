"""What of a normal form has no chunk form yet, and why."""

from __future__ import annotations

from collections.abc import Iterator

from ..dsl.ir import Kind
from ..dsl.normal_form import NormalForm, are_rows


def refusals(form: NormalForm) -> Iterator[tuple[str, str]]:
    """What the chunk derivation does not lower of `form`, each with the reason."""
    updates = [u for m in form.micro_steps for u in m.updates]
    mixed = {name for u in updates for m in u.mixes for name in (u.state, m.state)}
    gates = [u.log_decay for u in updates if u.state in mixed and u.log_decay is not None]
    if any(g.kind is not Kind.SCALAR for g in gates):
        why = (
            "states that mix in one micro-step decay per channel in another: what is left of one "
            "in another between two rows would be a matrix of rows per channel"
        )
        yield "states that mix carry a gate per channel", why
    if len(form.micro_steps) > 1 and not are_rows(form):
        why = (
            "a row of time holds one micro-step's operands and reads, and these micro-steps "
            "cannot be expanded into one"
        )
        yield "what belongs to one micro-step is used in another", why
