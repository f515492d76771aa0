"""What a tensor holds is only looked at here: boundaries on the host, the rest under `check`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dsl import errors, oracle
from ..dsl.ir import Node, Op, bounds_of, operands_of, topological
from ..dsl.normal_form import expressions, results_of
from ..dsl.turns import log_decays
from .call import Call, Pool
from .sizes import check_boundaries

CHECK_VARIABLE = "CHUNKWISE_CHECK"


def check_contents(call: Call, check: bool) -> None:
    """Look at the contents of a call, as far as that costs no wait, or everything if asked to.

    Args:
        call: with `cu_seqlens` still where the user had it.
        check: everything, which waits for the device.

    Raises:
        BadCuSeqlens: the boundaries do not rise from 0 to T.
        NanOperand, PositiveGate: the first offender, where it is and what it holds.
    """
    bounds = call.cu_seqlens
    if bounds is not None and (check or bounds.device.type == "cpu"):
        check_boundaries(bounds, call.T)
    if check:
        _check_finite(call)
        _check_promises(call)


def check_slots(pool: Pool) -> None:
    """That a pool has the slots of a step, each for one sequence; waits for their device.

    Raises:
        BadSlots: the first index or number of tokens at fault.
    """
    if pool.accepted is not None:
        check_accepted(pool.accepted, pool.width)
    every = pool.indices.flatten().tolist()
    if len(set(every)) == len(every) and max(every, default=-1) < pool.slots:
        return
    owners: dict[int, int] = {}
    rows = pool.indices.view(len(pool.indices), -1).tolist()
    for b, row in enumerate(rows):
        for t, slot in enumerate(row):
            at = [b] if pool.indices.ndim == 1 else [b, t]
            if slot >= pool.slots:
                expected = f"a slot, 0 to {pool.slots - 1} (or a negative number for none)"
                raise errors.BadSlots("state_indices", f"{slot} at {at}", expected)
            if slot >= 0 and owners.setdefault(slot, b) != b:
                expected = f"a slot of its own: sequence {owners[slot]} writes this one"
                raise errors.BadSlots("state_indices", f"{slot} at {at}", expected)


def check_accepted(accepted: Tensor, width: int) -> None:
    """That numbers of accepted tokens are those of the `width` tokens whose states are there.

    Raises:
        BadSlots: the first that is not.
    """
    for b, n in enumerate(accepted.tolist()):
        if not 1 <= n <= width:
            expected = f"1 to {width}, as many as there are states of a sequence"
            raise errors.BadSlots("num_accepted", f"{n} at [{b}]", expected)


def check_results(call: Call, results: Sequence[Tensor]) -> None:
    """Look for results that are not finite though all operands are.

    Raises:
        Overflow: the first of them, where it is and what it holds.
    """
    names = ("output", *(f"final state ({s.name})" for s in call.declaration.states))
    for name, x in zip(names, results, strict=True):
        if not bool(torch.isfinite(x).all()):
            at, value = _first(~torch.isfinite(x), x)
            raise errors.Overflow(call.declaration.name, name, f"{value} at {at}")


def asked() -> bool:
    """Whether contents are to be looked at where a call does not say: as CHUNKWISE_CHECK does."""
    return os.environ.get(CHECK_VARIABLE, "") not in ("", "0")


def _check_finite(call: Call) -> None:
    """Numbers are finite, but for what gates are made of: a log-decay of -inf is a reset."""
    states = zip((s.name for s in call.declaration.states), call.initial, strict=True)
    named = [*call.operands.items(), *((f"initial_state ({n})", x) for n, x in states)]
    decays = [node for _, node in _log_decays(call)]
    others = [] if not decays else [n for n in _expressions(call) if n not in decays]
    gates, elsewhere = operands_of(*decays), operands_of(*others)
    for name, x in named:
        if x is None:
            continue
        bad = ~torch.isfinite(x)
        if name in gates:
            # the gate itself is looked at next; what else takes +inf makes it a number
            bad &= x != float("-inf") if name in elsewhere else ~torch.isinf(x)
        if bool(bad.any()):
            at, value = _first(bad, x)
            raise errors.NanOperand(name, f"{value} at {at}")


def _expressions(call: Call) -> list[Node]:
    return [*expressions(call.form), *call.form.outputs]


def _log_decays(call: Call) -> list[tuple[str, Node]]:
    """Of each state that decays; none without a normal form: then nothing relies on a gate."""
    if call.declaration.any_step:
        return []
    return log_decays(call.form)


def _check_promises(call: Call) -> None:
    """Log-decays are at most 0, and what `within` promises holds, but for those made of reads."""
    env = oracle.leaves(call.step, call.operands, call.params, call.state_dtype)
    for node in topological(*call.step.roots):
        if node.op is Op.WITHIN and not _reads_a_state(node):
            (x,) = oracle.evaluate([node.args[0]], dict(env))
            _check_range(f"within(…) of {_named(node)}", x, *bounds_of(node))
    for state, log_decay in _log_decays(call):
        if results_of(log_decay):
            continue
        (g,) = oracle.evaluate([log_decay], dict(env))
        what = f"the log-decay of state {state!r} (from {_named(log_decay)})"
        _check_range(what, g, float("-inf"), 0.0)


def _check_range(what: str, x: Tensor, lo: float, hi: float) -> None:
    outside = ~((x >= lo) & (x <= hi))  # so that a NaN is outside
    if bool(outside.any()):
        at, value = _first(outside, x)
        log_decay = (lo, hi) == (float("-inf"), 0.0)
        expected = errors.AT_MOST_ZERO if log_decay else f"numbers in [{lo}, {hi}]"
        raise errors.PositiveGate(what, f"{value} at {at}", expected)


def _first(where: Tensor, x: Tensor) -> tuple[list[int], float]:
    at = [int(i) for i in where.nonzero()[0]]
    return at, float(x.detach()[tuple(at)])


def _reads_a_state(node: Node) -> bool:
    return any(n.op is Op.STATE for n in topological(node))


def _named(node: Node) -> str:
    return ", ".join(map(repr, operands_of(node))) or "constants"
