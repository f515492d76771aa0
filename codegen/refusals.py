"""What of a normal form has no chunk form yet, and why."""

from __future__ import annotations

from collections.abc import Iterator

from ..dsl.ir import Op, topological
from ..dsl.normal_form import NormalForm, of_update, results_of


def refusals(form: NormalForm) -> Iterator[tuple[str, str]]:
    """What the chunk derivation does not lower of `form`, each with the reason."""
    if not _indices_are_rows(form):
        why = "a row of time holds one micro-step's operands and no other's"
        yield "an operand of micro-steps outside its own", why
    read = [form.reads[n] for n in results_of(form.output)]
    if any(r.micro_step != len(form.micro_steps) - 1 for r in read):
        why = "outputs are read in the last row of a token so far"
        yield "a read before the last micro-step", why


def _indices_are_rows(form: NormalForm) -> bool:
    """Whether a micro-step's expressions take its own operands and reads only."""
    last = len(form.micro_steps) - 1
    pairs = [(last, form.output), *((r.micro_step, r.key) for r in form.reads)]
    for m, micro_step in enumerate(form.micro_steps):
        updates = [n for u in micro_step.updates for n in of_update(u)]
        if any(form.reads[n].micro_step != m for n in results_of(*updates)):
            return False
        pairs += [(m, n) for n in updates]
    return all(
        leaf.attrs[1] in (None, m)
        for m, node in pairs
        for leaf in topological(node)
        if leaf.op is Op.OPERAND
    )
