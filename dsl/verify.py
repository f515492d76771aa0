"""The verifier: invariants of StepIR and of normal forms, checked after each pass."""

from __future__ import annotations

from .elementwise import ELEMENTWISE
from .errors import InvalidIR
from .ir import Kind, Node, Op, topological
from .normal_form import NormalForm, Phase, Read, Update, levels_of, result_leaf
from .printing import infix
from .step import Step

_VECTORS = (Kind.SCALAR, Kind.KEY, Kind.VALUE)
_BINARY_ON_STATES = (Op.ADD, Op.SUB)


def verify_step(step: Step) -> None:
    """Raises InvalidIR unless every node is well-kinded and the roots match the declaration."""
    _verify_nodes(step, step.roots)
    for node in topological(*step.roots):
        if node.op is Op.RESULT:
            raise InvalidIR("a RESULT leaf in a step")
    for state, node in zip(step.states, step.next_states, strict=True):
        if node.kind is not state.kind:
            raise InvalidIR(f"the next {state.name} is not a {state.kind.name}", infix(node))
    for output in step.outputs:
        if output.kind not in _VECTORS:
            raise InvalidIR("an output is a state", infix(output))


def verify_form(form: NormalForm) -> None:
    """Raises InvalidIR unless the form obeys the rules in `normal_form`."""
    names = [s.name for s in form.states]
    kinds = {s.name: s.kind for s in form.states}
    if not form.micro_steps:
        raise InvalidIR("no micro-step")
    expressions: list[Node] = []
    for micro in form.micro_steps:
        if [u.state for u in micro.updates] != names:
            raise InvalidIR("a micro-step does not update every state once, in order")
        for update in micro.updates:
            expressions += _verify_update(update, kinds, form.transposed)
    for read in form.reads:
        _verify_read(read, kinds, len(form.micro_steps))
        expressions.append(read.key)
    for node in topological(*expressions):
        if node.op is Op.STATE or node.kind.is_state:
            raise InvalidIR("the preamble reads a state", infix(node))
    _verify_results(form, expressions)
    _verify_nodes(form, (*expressions, *form.outputs))


def _verify_update(update: Update, kinds: dict[str, Kind], transposed: bool) -> list[Node]:
    is_matrix = kinds[update.state] is Kind.STATE
    row = Kind.VALUE if transposed and is_matrix else Kind.KEY
    col = (Kind.KEY if transposed else Kind.VALUE) if is_matrix else Kind.SCALAR
    found: list[Node] = []

    def expect(what: str, node: Node, *allowed: Kind) -> None:
        if node.kind not in allowed:
            raise InvalidIR(f"{what} of {update.state} has kind {node.kind.name}", infix(node))
        found.append(node)

    if update.log_decay is not None:
        expect("the log-decay", update.log_decay, Kind.SCALAR, row)
    if update.columns is not None:
        expect("the log-decay of columns", update.columns, col)
    for mix in update.mixes:
        if kinds.get(mix.state) is not kinds[update.state]:
            raise InvalidIR(f"{update.state} mixes with {mix.state}")
        expect("a mixing factor", mix.factor, Kind.SCALAR, row)
    for write in update.writes:
        expect("a write key", write.key, row)
        if write.value is not None:
            expect("a written value", write.value, col)
        correction = write.correction
        if correction is None:
            if write.value is None:
                raise InvalidIR(f"a write to {update.state} has neither value nor correction")
            continue
        if kinds.get(correction.state) is not kinds[update.state]:
            raise InvalidIR(f"a write to {update.state} recalls {correction.state}")
        expect("a correction key", correction.key, row)
        expect("a correction scale", correction.scale, Kind.SCALAR, col)
    return found


def _verify_read(read: Read, kinds: dict[str, Kind], micro_steps: int) -> None:
    if read.state not in kinds or not 0 <= read.micro_step < micro_steps:
        raise InvalidIR(f"a read of {read.state} in micro-step {read.micro_step}")
    wanted = Kind.VALUE if read.other_axis else Kind.KEY
    if read.key.kind is not wanted or (read.other_axis and kinds[read.state] is Kind.KEY_STATE):
        raise InvalidIR("a read along an axis that its key does not have", infix(read.key))
    if read.phase is Phase.BEFORE and read.micro_step > 0:
        raise InvalidIR("a read before a later micro-step: it is AFTER the one before")


def _verify_results(form: NormalForm, preamble: list[Node]) -> None:
    """Every read is used, in the output or a later level; what is made of them is elementwise."""
    used: set[object] = set()
    reached: set[Node] = set()
    for node in topological(*preamble, *form.outputs):
        if node.op is Op.STATE or node.kind.is_state:
            raise InvalidIR("the output reads a state outside the reads", infix(node))
        if node.op is Op.RESULT:
            index = node.attrs[0]
            if not isinstance(index, int) or not 0 <= index < len(form.reads):
                raise InvalidIR(f"RESULT {index} of {len(form.reads)} reads")
            if node != result_leaf(form, index):
                raise InvalidIR(f"RESULT {index} has kind {node.kind.name}")
            used.add(index)
            reached.add(node)
        elif any(a in reached for a in node.args):
            if node.op not in ELEMENTWISE and node.op is not Op.SUM:
                raise InvalidIR("the postamble is not elementwise", infix(node))
            reached.add(node)
    if used != set(range(len(form.reads))):
        raise InvalidIR("a read that nothing uses")
    levels_of(form)


def _verify_nodes(form: Step | NormalForm, roots: tuple[Node, ...]) -> None:
    operands = {o.name: o for o in form.operands}
    params = {p.name for p in form.params}
    states = {s.name: s.kind for s in form.states}
    for node in topological(*roots):
        if len(node.args) != node.op.arity:
            raise InvalidIR(f"{node.op.name} with {len(node.args)} arguments")
        if node.op is Op.OPERAND:
            declared = operands.get(str(node.attrs[0]))
            micro = node.attrs[1] is not None
            if declared is None or declared.kind is not node.kind or declared.micro is not micro:
                raise InvalidIR("an operand that is not declared so", infix(node))
        elif node.op is Op.PARAM:
            if node.attrs[0] not in params:
                raise InvalidIR("a parameter that is not declared", infix(node))
        elif node.op is Op.STATE:
            if states.get(str(node.attrs[0])) is not node.kind:
                raise InvalidIR("a state that is not declared so", infix(node))
        elif node.op is not Op.RESULT and node.kind is not _kind(node):
            raise InvalidIR(f"{node.op.name} of kind {node.kind.name}", infix(node))


def _kind(node: Node) -> Kind | None:
    """The kind that an op gives its result; None where its arguments do not go together."""
    kinds = [a.kind for a in node.args]
    op = node.op
    if op is Op.CONST:
        return Kind.SCALAR
    if op is Op.SUM:
        return Kind.SCALAR if kinds[0] in (Kind.KEY, Kind.VALUE) else None
    if op is Op.SCALE:
        columns = kinds == [Kind.KEY_STATE, Kind.VALUE]
        legal = kinds[0].is_state and kinds[1] in _VECTORS and not columns
        return kinds[0] if legal else None
    if op is Op.OUTER:
        pairs = {Kind.VALUE: Kind.STATE, Kind.SCALAR: Kind.KEY_STATE}
        return pairs.get(kinds[1]) if kinds[0] is Kind.KEY else None
    if op is Op.READ:
        reads = {Kind.STATE: Kind.VALUE, Kind.KEY_STATE: Kind.SCALAR}
        return reads.get(kinds[1]) if kinds[0] is Kind.KEY else None
    if op is Op.READ_VALUE:
        return Kind.KEY if kinds == [Kind.STATE, Kind.VALUE] else None
    found = {k for k in kinds if k is not Kind.SCALAR}
    on_states = op.arity == 2 and any(k.is_state for k in found)
    if on_states and (op not in _BINARY_ON_STATES or Kind.SCALAR in kinds):
        return None
    if len(found) > 1:
        return None
    return found.pop() if found else Kind.SCALAR
