"""The net: random calls of random recurrences on an engine, against the float64 token loop.

    python -m tests.net --engine eager --count 5000 --seed 0 --json out.json

draws the numbered calls 0 to 4999 of seed 0, each of which is the same in every run, and appends
one line per call to out.json; those that it holds already are not drawn again. Prints how many
there are of each outcome, and every declaration that failed, shrunk.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from tests.random_draws import CALIBERS, Draw, Outcome, Verdict, draw, examine

T = TypeVar("T")


# ---------------------------------------------------------------- numbered draws


class _Recorded:
    """Picks by a generator of numbers, or what was picked before; remembers what it picked."""

    def __init__(self, numbers: random.Random, given: Sequence[int] | None = None) -> None:
        self._numbers, self._given = numbers, given
        self.picked: list[int] = []

    def __call__(self, options: Sequence[T], /) -> T:
        if self._given is None:
            n = self._numbers.randrange(len(options))
        else:  # what was not given is the simplest
            at = len(self.picked)
            n = min(self._given[at], len(options) - 1) if at < len(self._given) else 0
        self.picked.append(n)
        return options[n]


def numbered(engine: str, seed: int, index: int) -> tuple[Draw, list[int]]:
    """The draw of that number, and its choices."""
    pick = _Recorded(random.Random(f"{engine}:{seed}:{index}"))
    return draw(pick, engine), pick.picked


def replayed(engine: str, choices: Sequence[int]) -> tuple[Draw, list[int]]:
    """The draw of those choices."""
    pick = _Recorded(random.Random(0), choices)
    return draw(pick, engine), pick.picked


def shrunk(engine: str, choices: list[int], same: Callable[[Draw], bool], seconds: float) -> Draw:
    """A simpler draw that still fails: choices made simpler, or left out, one run after another."""
    deadline = time.monotonic() + seconds
    best, choices = replayed(engine, choices)
    width = len(choices)
    while width:
        at = 0
        while at < len(choices):
            for tried in (
                [*choices[:at], *choices[at + width :]],
                [*choices[:at], *[0] * width, *choices[at + width :]],
                [*choices[:at], 0, *choices[at + 1 + width :]],  # what hung on it goes, too
            ):
                if time.monotonic() > deadline:
                    return best
                candidate, picked = replayed(engine, tried)
                if (len(picked), picked) < (len(choices), choices) and same(candidate):
                    best, choices = candidate, picked
                    break
            else:
                at += width
        width //= 2
    return best


def _fails_like(verdict: Verdict, engine: str) -> Callable[[Draw], bool]:
    """Whether a draw fails in the same way: wrong, or with that exception at that place."""
    crashed = verdict.outcome is Outcome.CRASHED

    def same(other: Draw) -> bool:
        v = examine(other, engine)
        return v.outcome is verdict.outcome and (v.reason == verdict.reason or not crashed)

    return same


# ---------------------------------------------------------------- the campaign


def prepare(engine: str) -> None:
    """This process as tests have it: nothing tuned, short chunks, one thread."""
    from chunkwise.runtime import eager as eager_engine
    from chunkwise.runtime.tuned import selection

    torch.set_num_threads(1)
    vars(selection)["folders"] = lambda: ()
    vars(eager_engine)["_LONGEST_CHUNK"] = CALIBERS["eager"].chunk
    if engine == "triton":
        from chunkwise.runtime.triton import engine as triton_engine

        from tests.interpreted import hasten, now_and_then_in_segments

        hasten()
        vars(triton_engine)["_compiled_for"] = now_and_then_in_segments


def _work(engine: str, seed: int, shrinking: float, pipe: Connection) -> None:
    if engine == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    prepare(engine)
    while (index := pipe.recv()) is not None:
        began = time.monotonic()
        drawn, choices = numbered(engine, seed, index)
        verdict = examine(drawn, engine)
        record = {
            "index": index,
            "outcome": verdict.outcome.value,
            "reason": verdict.reason,
            "seconds": round(time.monotonic() - began, 2),
        }
        if verdict.failed:
            smallest = shrunk(engine, choices, _fails_like(verdict, engine), shrinking)
            verdict = examine(smallest, engine)
            record |= {"draw": str(smallest), "reason": verdict.reason, "text": verdict.text}
        elif verdict.outcome is Outcome.REFUSED:
            record["text"] = verdict.text
        pipe.send(record)


class _Worker:
    """A process of its own, so that a draw that ends it is known."""

    def __init__(self, engine: str, seed: int, shrinking: float) -> None:
        self._arguments = (engine, seed, shrinking)
        self.index: int | None = None
        self.began = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, index: int | None) -> None:
        self.index, self.began = index, time.monotonic()
        self.pipe.send(index)

    def lost(self, why: str) -> dict[str, object]:
        """The record of a draw that ended the process (or has to be ended); a new one starts."""
        self._process.kill()
        self._process.join()
        record = {"index": self.index, "outcome": Outcome.CRASHED.value}
        record |= {"reason": f"{why} ({self._process.exitcode})", "seconds": 0.0}
        self._start()
        return record


def block(engine: str, first: int, count: int, seconds: float = 30.0) -> list[Verdict]:
    """The outcomes of some numbered draws of seed 0, for a test: a failure raises, shrunk."""
    verdicts = []
    for index in range(first, first + count):
        drawn, choices = numbered(engine, 0, index)
        verdict = examine(drawn, engine)
        if verdict.failed:
            smallest = shrunk(engine, choices, _fails_like(verdict, engine), seconds)
            again = examine(smallest, engine)
            raise AssertionError(
                f"draw {index} {verdict.outcome.value}: {verdict.reason}\n{drawn}\n{verdict.text}\n"
                f"simpler: {again.reason}\n{smallest}\n{again.text}"
            )
        verdicts.append(verdict)
    return verdicts


def campaign(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of all draws, those of an earlier run included."""
    file = Path(arguments.json)
    records = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    done = {r["index"] for r in records}
    todo = iter([n for n in range(arguments.count) if n not in done])
    workers = {}
    for _ in range(arguments.jobs):
        w = _Worker(arguments.engine, arguments.seed, arguments.shrink)
        if (n := next(todo, None)) is not None:
            w.give(n)
            workers[w] = w.pipe
    with file.open("a") as out:
        while workers:
            ready = wait(list(workers.values()), timeout=5.0)
            for w in list(workers):
                if w.pipe in ready:
                    try:
                        record = w.pipe.recv()
                    except EOFError:
                        record = w.lost("the process ended")
                elif time.monotonic() - w.began > arguments.timeout:
                    record = w.lost("no answer")
                else:
                    continue
                records.append(record)
                out.write(json.dumps(record) + "\n")
                out.flush()
                n = next(todo, None)
                w.give(n)
                del workers[w]
                if n is not None:
                    workers[w] = w.pipe
    return records


def summary(records: Sequence[dict[str, Any]], each: int = 2) -> str:
    """How many there are of each outcome and reason; `each` draws of every kind that failed."""
    lines = []
    outcomes = collections.Counter(r["outcome"] for r in records)
    for outcome, count in outcomes.most_common():
        lines.append(f"{outcome:8} {count:6}  {count / len(records):6.1%}")
        reasons = collections.Counter(r["reason"] for r in records if r["outcome"] == outcome)
        lines += [f"    {n:6}  {reason}" for reason, n in reasons.most_common() if reason]
    printed: collections.Counter[str] = collections.Counter()
    for r in sorted((r for r in records if "draw" in r), key=lambda r: len(r["draw"])):
        printed[r["reason"]] += 1
        if printed[r["reason"]] <= each:
            lines += ["", f"{r['outcome']} {r['index']}: {r['reason']}", r["draw"], r["text"]]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a draw failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.net", description=__doc__)
    parser.add_argument("--engine", choices=sorted(CALIBERS), default="eager")
    parser.add_argument("--count", type=int, default=1000, help="how many draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="out.json", help="a line per draw; what it has is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--shrink", type=float, default=20.0, help="seconds for a failing draw")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds until one is given up"
    )
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:  # nothing compiled before, by another version
        os.environ.setdefault("CHUNKWISE_CACHE", folder)
        records = campaign(arguments)
    print(summary(records))
    failed = {Outcome.WRONG.value, Outcome.CRASHED.value}
    return int(any(r["outcome"] in failed for r in records))


if __name__ == "__main__":
    sys.exit(main())
