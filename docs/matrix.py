"""Writes docs/reference/matrix.md: which recurrence has which feature on which engine, or why not.

`python -m docs.matrix` asks the code and writes the page; a test compares. `python -m docs.matrix
--prove` proves the library as well, and notes how long that takes in
docs/results/offline-proofs.json, from which the page has its proofs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from chunkwise import (
    Key,
    Scalar,
    State,
    Value,
    dot,
    exp,
    outer,
    sigmoid,
)
from chunkwise.codegen.config import Dims
from chunkwise.codegen.programs import chunk_adjoint, chunk_program, transition_of
from chunkwise.codegen.prove import prove
from chunkwise.codegen.token import token_program
from chunkwise.dsl.declaration import Declaration
from chunkwise.dsl.errors import ChunkwiseError
from chunkwise.dsl.ir import Kind
from chunkwise.dsl.library import all_declarations
from chunkwise.dsl.normal_form import NormalForm, levels_of
from chunkwise.runtime.call import Call, describe
from chunkwise.runtime.engine import chunk_refusal
from chunkwise.runtime.engines import EngineName, load
from chunkwise.runtime.inputs import usual_params
from chunkwise.runtime.printed import dtypes_of, unsupported_dtype

from docs.tables import FOLDER, table
from docs.tables import load as result

PAGE = Path(__file__).resolve().parent / "reference" / "matrix.md"
PROOFS = "offline-proofs.json"
_SIZES = {"B": 2, "T": 5, "H": 2, "HV": 2, "K": 4, "V": 3, "n": 2, "N": 2}
_NOT_PROVED = "`python -m docs.matrix --prove` has not proved it yet"
Answer = str | None  # why not; None: yes


# ---- steps that are refused, each the smallest that asks for what is missing ---------------------


def recall_between_gates_on_both_axes(S: State, q: Key, k: Key, v: Value, g: Key, h: Value) -> Any:
    S = exp(g) * S * exp(h)
    S = S + outer(k, v - k @ S)
    return S, q @ S


def gate_on_rows_plus_gate_on_columns(S: State, q: Key, k: Key, v: Value, g: Key, h: Value) -> Any:
    S = exp(g) * S + exp(h) * S + outer(k, v)
    return S, q @ S


def gate_per_entry(S: State, q: Key, k: Key, v: Value, a: Key, d: Value) -> Any:
    S = exp(outer(a, d)) * S + outer(k, v)  # Mamba-1
    return S, q @ S


def mixing_per_key_channel(
    R: State, J: State, q: Key, p: Key, k: Key, v: Value, c: Key, s: Key
) -> Any:
    R, J = c * R - s * J + outer(k, v), s * R + c * J
    return (R, J), q @ R - p @ J


def kalman_with_process_noise(L: State, q: Key, k: Key, e: Value, p: Scalar) -> Any:
    L = L / (1 + p * (k @ L)) + outer(k * k, e)
    return L, q @ L


def nonlinear_memory(S: State, q: Key, k: Key, v: Value) -> Any:
    S = S + outer(k, v - sigmoid(k @ S))
    return S, q @ S


def cycle_of_states(S: State, W: State, q: Key, k: Key, v: Value) -> Any:
    S, W = S + outer(k, sigmoid(k @ W)), W + outer(k, v) * dot(k, k) + outer(k, sigmoid(k @ S))
    return (S, W), q @ S


_REFUSED: tuple[Callable[..., Any], ...] = (
    recall_between_gates_on_both_axes,
    gate_on_rows_plus_gate_on_columns,
    gate_per_entry,
    mixing_per_key_channel,
    kalman_with_process_noise,
    nonlinear_memory,
    cycle_of_states,
)


# ---- what the code answers -----------------------------------------------------------------------


def _asked(question: Callable[[], object]) -> Answer:
    """Why the code refuses; None if it answers."""
    try:
        question()
    except ChunkwiseError as error:
        return f"{error.headline}: {error.why}" if error.why else str(error.headline)
    return None


def _lowered(function: Callable[..., Any]) -> Answer:
    return _asked(lambda: chunk_program(Declaration(function).normal_form()))


def _call(
    declared: Declaration, form: NormalForm, *, keys: int, packed: bool, states: bool
) -> Call:
    """A call of zeros, float32 on the CPU: `keys` heads of Keys for two value heads."""
    sizes = {**_SIZES, "H": keys, **({"B": 1} if packed else {})}

    def zeros(axes: Sequence[str]) -> torch.Tensor:
        return torch.zeros([sizes[a] for a in axes])

    cu = torch.tensor([0, 2, 5]) if packed else None
    initial = tuple(zeros(s.axes) if states else None for s in form.states)
    operands = {o.name: zeros(o.axes) for o in declared.operands}
    return describe(declared, operands, usual_params(form), initial, cu)


def _of_calls(declared: Declaration, form: NormalForm) -> dict[str, Answer]:
    """Features that are layouts of calls: what the engines that run here say of each."""
    layouts = {
        "packed": _call(declared, form, keys=2, packed=True, states=False),
        "states": _call(declared, form, keys=2, packed=False, states=True),
        "grouped": _call(declared, form, keys=1, packed=False, states=False),
    }
    answers: dict[str, Answer] = {}
    for feature, call in layouts.items():
        engines = (EngineName.EAGER, EngineName.TVM)
        answers[feature] = next(filter(None, (load(e).refusal(call) for e in engines)), None)
    answers["eager"] = load(EngineName.EAGER).refusal(call)
    answers["tvm"] = load(EngineName.TVM).refusal(call)
    # what its engine says but for the device
    answers["triton"] = unsupported_dtype(dtypes_of(call)) or chunk_refusal(form)
    return answers


def _segments(form: NormalForm) -> Answer:
    if transition_of(form, Dims(128, 128)) is not None:
        return None
    updates = [u for m in form.micro_steps for u in m.updates]
    if any(u.mixes for u in updates):
        return "states that mix pass a segment together, by a matrix of all of them"
    if len(levels_of(form)) > 1:
        return "a state of a later level is no affine function of its own past alone"
    if any(s.kind is Kind.KEY_STATE for s in form.states):
        return "a vector that is corrected passes a segment by a K x K matrix that is not derived"
    corrections = [w.correction for u in updates for w in u.writes if w.correction is not None]
    if any(u.columns is not None for u in updates):
        return "states that decay along both axes pass a segment by a number for every entry"
    if any(c.scale.kind is Kind.VALUE for c in corrections):
        return "columns that are corrected apart pass a segment by a K x K matrix each"
    return "the matrix that a state passes a segment by is not derived"


def answers_of(declared: Declaration, proved: set[str]) -> dict[str, Answer]:
    """What the code says of one recurrence of the library, by column."""
    micro = declared.default_micro
    form = declared.normal_form(micro)
    refused = chunk_refusal(form)
    if refused is not None:
        return dict.fromkeys(_COLUMNS, refused)
    return {
        "forward": _asked(lambda: chunk_program(form)),
        "backward": _asked(lambda: chunk_adjoint(form)),
        **_of_calls(declared, form),
        "segments": _segments(form),
        "step": _asked(lambda: token_program(declared.step(micro))),
        "prove": None
        if declared.name in proved
        else "not proved yet: `python -m docs.matrix --prove`",
    }


_COLUMNS = (
    *("forward", "backward", "packed", "states", "grouped", "segments", "step"),
    *("eager", "tvm", "triton", "prove"),
)

_INTRO = """<!-- written by `python -m docs.matrix` -->
# What runs where

A row for each recurrence of the [library](../gallery/index.md), a column for each feature and
engine, as the code answers:

- *forward* and *backward*: a chunk form and its adjoint are derived;
- *packed*, *states*, *grouped*: calls with `cu_seqlens`, with initial states, and with fewer heads
  of Keys than of Values are served by the engines of a CPU;
- *segments*: long sequences with few heads are scanned in segments on a GPU (K = V = 128);
- *step*: one token has a kernel;
- *eager*, *tvm*, *triton*: the engine serves it; the reference engine serves all of them;
- *prove*: the chunk form and its gradient are proved ([how long it takes](../results/offline.md)).

A number instead of a yes is that of the reason below.

{matrix}

{reasons}

## What is refused

The smallest step of each kind that has no kernels, and what the compiler says of it.
`engine="reference"` runs those that can be traced.

{refused}
"""


def page() -> str:
    """The page."""
    rows = result(PROOFS)["rows"] if (FOLDER / PROOFS).exists() else []
    proved = {r["proof of"] for r in rows}
    reasons: dict[str, int] = {}
    lines: list[tuple[str, ...]] = [("recurrence", *_COLUMNS)]
    for declared in all_declarations():
        found = answers_of(declared, proved)
        cells = [
            "yes"
            if found[c] is None
            else f"({reasons.setdefault(str(found[c]), len(reasons) + 1)})"
            for c in _COLUMNS
        ]
        lines.append((f"[{declared.name}](../gallery/index.md#{declared.name})", *cells))
    why = "\n".join(f"{n}. {_sentence(reason)}" for reason, n in reasons.items())
    refused = [("step", "what the compiler says")]
    for function in _REFUSED:
        said = _lowered(function)
        refused.append(
            (function.__name__.replace("_", " "), _sentence(said or "It is lowered now"))
        )
    return _INTRO.format(matrix=table(lines), reasons=why, refused=table(refused))


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"{text[:1].upper()}{text[1:]}."


def _proofs() -> dict[str, Any]:
    """How long the proof of each recurrence takes, of its form, tiles and gradient."""
    rows = []
    torch.set_num_threads(1)
    for declared in all_declarations():
        start = time.process_time()
        proof = prove(declared)
        assert proof.left_out == (), declared.name
        seconds = time.process_time() - start
        sizes = ", ".join(map(str, proof.chunks))
        rows.append(
            {
                "proof of": declared.name,
                "tokens of a chunk": sizes,
                "claims": str(len(proof.claims)),
                "CPU seconds": f"{seconds:.1f}",
            }
        )
    return {
        "title": "Proofs of the library: chunk form, tiles and gradient",
        "command": "python -m docs.matrix --prove",
        "machine": {
            "device": "one of 2 shared cores, no GPU",
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        },
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 0."""
    parser = argparse.ArgumentParser(description="Write which recurrence has which feature.")
    parser.add_argument("--prove", action="store_true", help="prove the library, and time that")
    if parser.parse_args(argv).prove:
        text = json.dumps(_proofs(), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / PROOFS).write_text(text, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
