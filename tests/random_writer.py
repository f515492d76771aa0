"""Writes the parts of random recurrences: expressions, gates, updates of states, outputs.

All choices are made by `pick`, which chooses one of several things; the simplest comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tests.random_vocabulary import GATES, NUMBERS, OF_ONE, OF_TWO, OUTPUTS, SIGNS, SINGLE

T = TypeVar("T")


class Pick(Protocol):
    """Chooses one of a few things."""

    def __call__(self, options: Sequence[T], /) -> T: ...


def words_of(lines: Sequence[str]) -> set[str]:
    return set(re.findall(r"\w+", "\n".join(lines)))


@dataclass
class Writer:
    """Writes expressions; `inner`: what operands are called within a loop over micro-steps.

    `read`: names of what was read of earlier states, by kind; they stand where operands may.
    """

    pick: Pick
    inner: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    depth: int = 1

    def often(self, times: int = 3) -> bool:
        """True once in `times` + 1; False is simpler."""
        return self.pick((False,) * times + (True,))

    # ------------------------------------------------------------ expressions
    def number(self) -> str:
        """A number: of the language's functions on constants and float keywords."""
        return self.pick(NUMBERS)

    def leaf(self, kind: str) -> str:
        """An operand of `kind`, of the token, of the micro-step or of the head."""
        token = (self.inner[kind],) * 3 if kind in self.inner else ()
        token += (self.read[kind],) * 5 if kind in self.read else ()
        return self.pick((*token, *SINGLE[kind], *SINGLE["Head" + kind]))

    def scalar(self, depth: int | None = None) -> str:
        """A Scalar."""
        depth = self.depth if depth is None else depth
        what = self.pick(("leaf", "one", "two", "number", "dot", "sum", "ratio"))
        if what == "number":
            return self.number()
        if what in ("dot", "sum"):
            kind = self.pick(("Key", "Value"))
            x = self.vector(kind, depth - 1)
            return f"sum({x})" if what == "sum" else f"dot({x}, {self.vector(kind, depth - 1)})"
        if depth <= 0 or what == "leaf":
            return self.leaf("Scalar")
        if what == "ratio":  # what padding turns into 0 / 0
            x = self.pick(SINGLE[self.pick(("Key", "Value"))])
            return f"{self.scalar(0)} * 0.1 / dot({x}, {x})"
        return self._of(what, lambda: self.scalar(depth - 1))

    def vector(self, kind: str, depth: int | None = None) -> str:
        """A Key or a Value."""
        depth = self.depth if depth is None else depth
        what = self.pick(("leaf", "leaf", "leaf", "one", "two", "norm", "scaled", "moved", "apart"))
        if depth <= 0 or what == "leaf":
            return self.leaf(kind)
        x = self.vector(kind, depth - 1)
        if what == "norm":
            shape = self.pick(("l2norm({0})", "{0} * rsqrt(1 + dot({0}, {0}))", "l2norm({0}, 0.1)"))
            return shape.format(x)
        if what == "scaled":
            return f"{self.scalar(depth - 1)} * {x}"
        if what == "moved":  # not 0 where the operand is
            return f"({self.scalar(depth - 1)} + {x})"
        if what == "apart":
            return f"({x} - 0.1 * sum({x}))"
        return self._of(what, lambda: self.vector(kind, depth - 1))

    def _of(self, what: str, inner: Callable[[], str]) -> str:
        if what == "one":
            return self.pick(OF_ONE).format(inner())
        return self.pick(OF_TWO).format(inner(), inner())

    # ------------------------------------------------------------ gates and steps
    def decay(self) -> str:
        """What a state is multiplied by, in [-1, 1]; "": 1."""
        decay = self.contraction()
        if not decay or not self.often(5):
            return decay
        free = self.scalar(1) if self.often(1) else self.vector("Key", 1)
        return self.pick(SIGNS).format(decay, free, self.pick(GATES["Scalar"] + GATES["Key"]))

    def contraction(self) -> str:
        """What a state is multiplied by, in (0, 1], or 0 where a gate is a hard reset; "": 1."""
        per = self.pick(("Scalar", "Scalar", "Key", "Key", "", "number"))
        if per == "":
            return ""
        if per == "number":
            return self.pick(
                ("0.75", "exp(-scale)", "sigmoid(rate)", "sqrt(0.5)", "exp(-1 / power)")
            )
        log, factor = GATES[per]
        (head,) = GATES["Head" + per]
        free = self.scalar(1) if per == "Scalar" else self.vector("Key", 1)
        return self.pick(
            (
                f"exp({log})",
                f"sigmoid({log})",
                f"within({factor}, 0.0, 1.0)",
                f"exp(-softplus({log} + {head}))",
                f"exp(-exp({head}) * softplus({log}))",
                f"(1 - sigmoid({log}))",
                f"exp(-softplus({free}))",
                f"clamp({factor}, 0.0, 1.0)",
                f"exp({head})",
                f"exp(logsigmoid({free}))",
                f"exp({log} + {head})",
                f"exp(-0.6 * sigmoid({log}))",
                f"(exp({log}) * sigmoid({free}))",
                f"exp(-({log} ** 2))",
                f"sqrt(sigmoid({log}))",
                f"exp(clamp({log}, -5.0, 0.0))",
                "exp(g) * within(e, 0.0, 1.0)",
                f"exp(maximum({log}, -2.0))",
                f"exp(-{head} ** 2)",
                f"(within({factor}, 0.0, 1.0) * within({factor}, 0.0, 1.0))",
                f"exp(expm1({log}))",
                f"exp(-softplus({log}) * {self.pick(('scale', '0.1'))})",
                f"minimum(exp({free}), 0.9)",
                f"exp(-abs({free}))",
                f"(1 - within({factor}, 0.0, 1.0))",
                f"1 / (1 + softplus({free}))",
                f"clamp({free} ** 2, 0.0, 1.0)",
            )
        )

    def step(self) -> str:
        """A Scalar in [0, 1]."""
        s = self.scalar(1)
        return self.pick(
            (
                f"sigmoid({s})",
                "0.5",
                f"exp(-abs({s}))",
                f"minimum(exp({s}), 0.8)",
                f"sigmoid({s}) / (1 + softplus({s}))",
                "sigmoid(b)",
                f"clamp({s}, 0.0, 1.0)",
                f"tanh(abs({s}))",
            )
        )

    def unit(self) -> str:
        """A Key of length 1 or less."""
        x = self.vector("Key", 0)
        return self.pick((f"l2norm({x})", f"0.6 * l2norm({x})", f"{x} * rsqrt(1 + dot({x}, {x}))"))

    # ------------------------------------------------------------ states
    def update(self, S: str) -> list[str]:
        """Statements that bring the matrix `S` a token further; `S`0 and `S`1 are its moments."""
        lines = self._update(S)
        late = self.decay() if self.often(7) else ""  # of what was just written, too
        return [*lines, f"{S} = {late} * {S}"] if late else lines

    def _update(self, S: str) -> list[str]:
        lines = [f"{S}0 = {S}"]
        decay = self.decay()
        if decay:
            lines.append(
                f"{S} = " + self.pick((f"{decay} * {S}", f"{S} * {decay}", f"-(-({decay} * {S}))"))
            )
        lines.append(f"{S}1 = {S}")
        what = self.pick(
            (
                *("add", "delta", "apart", "ratio", "undecayed", "general", "twice", "split"),
                *("scaled", "channels"),
            )
        )
        write = f"outer({self.vector('Key')}, {self.vector('Value')})"
        if what == "add":
            lines.append(
                self.pick((f"{S} = {S} + {write}", f"{S} = {write} + {S}", f"{S} = {S} - {write}"))
            )
            return lines
        if what == "twice":
            other = f"outer({self.vector('Key')}, {self.vector('Value')})"
            return [*lines, f"{S} = {S} + {write}", f"{S} = {S} - {self.scalar(0)} * {other}"]
        if what == "ratio":  # the step that divides by what padding leaves 0
            x = self.leaf("Key")
            value = self.vector("Value")
            return [
                *lines,
                f"{S} = {S} + {self.step()} / dot({x}, {x}) * outer({x}, {value} - {x} @ {S}1)",
            ]
        key, step = self.unit(), self.step()
        if what == "delta":
            value = self.vector("Value")
            return [*lines, f"{S} = {S} + {step} * outer({key}, {value} - {key} @ {S}1)"]
        if what == "channels":  # a step size for each
            error = f"({self.vector('Value')} - {key} @ {S}1)"
            return [*lines, f"{S} = {S} + outer({key}, sigmoid({self.vector('Value')}) * {error})"]
        if what == "split":  # the delta rule in two terms
            value = self.vector("Value")
            at = self.pick(("1", "0"))
            lines.append(
                f"{S} = {S} - {step} * outer({key}, {key} @ {S}{at})"
                f" + {step} * outer({key}, {value})"
            )
            return lines
        read = self.pick((self.unit(), f"{key} * sigmoid({self.vector('Key', 0)})"))
        if what == "scaled":  # factors on every side of what is recalled
            recalled = f"{self.step()} * (({read}) @ {S}1) / (1 + abs({self.scalar(0)}))"
            return [*lines, f"{S} = {S} - 0.7 * outer({step} * {key}, {recalled}) + {write}"]
        if what == "apart":
            return [
                *lines,
                f"{S} = {S} + {step} * outer({key}, {self.vector('Value')} - {read} @ {S}1)",
            ]
        seen = f"{S}0" if what == "undecayed" else f"{S}1"
        return [*lines, f"{S} = {S} - {step} * outer({key}, {read} @ {seen}) + {write}"]

    def normaliser(self, z: str) -> list[str]:
        """Statements that bring the KeyState `z` a token further."""
        decay = self.decay()
        lines = [f"{z}0 = {z}", *([f"{z} = {decay} * {z}"] if decay else []), f"{z}1 = {z}"]
        key, step, c = self.unit(), self.step(), self.scalar()
        write = self.vector("Key")
        return [
            *lines,
            self.pick(
                (
                    f"{z} = {z} + {write}",
                    f"{z} = {z} + outer({write}, {c})",
                    f"{z} = {z} + {step} * outer({key}, {c} - {key} @ {z}1)",
                    f"{z} = {z} + {step} * ({c} - dot({key}, {z}1)) * {key}",
                    f"{z} = {z} - {c} * {write}",
                    f"{z} = {z} - {step} * outer({key}, {self.unit()} @ {z}0) + {write}",
                    f"{z} = {z} + {step} / dot(k, k) * outer(k, {c} - k @ {z}1)",
                )
            ),
        ]

    def micro(self, S: str) -> list[str]:
        """The same through a loop over tuples, one delta step or write each."""
        decay = self.decay()
        lines = [f"{S}0 = {S}", *([f"{S} = {decay} * {S}"] if decay else []), f"{S}1 = {S}"]
        self.inner = {"Key": "k_i", "Value": "v_i", "Scalar": "b_i"}
        head = len(lines)
        what = self.pick(("delta", "add", "decayed", "ratio", "general", "window"))
        value = self.pick(("v_i", self.vector("Value", 1)))
        if what == "general":
            read, key = self.pick(("l2norm(k_i)", "l2norm(p)")), self.pick(("l2norm(k_i)", "k_i"))
            lines.append(
                f"    {S} = {S} - {self.step()} * outer({read}, {read} @ {S})"
                f" + outer({key}, {value})"
            )
        elif what == "window":  # all recall the same state; entries meet in one row
            other = self.pick(("0.3", "tanh(dot(ks[0], k_i))"))
            lines.append(
                f"    {S} = {S} + {other} * {self.step()} * outer(l2norm(k_i), "
                f"{value} - l2norm(k_i) @ {S}1)"
            )
        elif what == "add":
            lines.append(
                f"    {S} = {S} + {self.pick(('b_i', self.scalar(1)))} * outer(k_i, {value})"
            )
        else:
            step = self.pick(("sigmoid(b_i)", self.step()))
            key = "l2norm(k_i)"
            if what == "ratio":
                key, step = "k_i", f"{step} / dot(k_i, k_i)"
            if what == "decayed":
                gate = self.pick(
                    ("sigmoid(b_i)", "exp(-abs(b_i))", "sigmoid(k_i)", "exp(g)", "exp(w)")
                )
                lines.append(f"    {S} = {gate} * {S}")
            lines.append(f"    {S} = {S} + {step} * outer({key}, {value} - {key} @ {S})")
        self.inner = {}
        used = [n for n in ("k_i", "v_i", "b_i") if n in words_of(lines[head:])]
        each, of = ", ".join(used), ", ".join(f"{n[0]}s" for n in used)
        lines.insert(head, f"for {each} in zip({of}):" if len(used) > 1 else f"for {each} in {of}:")
        return lines

    def reads(self, S: str, vector: bool) -> list[str]:
        """Statements that read a state, for the updates of later ones to be made of it."""
        at = self.pick((S, f"{S}1", f"{S}0"))
        if vector:
            lines = [f"{S}s = tanh(dot({self.vector('Key')}, {at}))"]
            self.read = {"Scalar": f"{S}s"}
            return lines
        shape = self.pick(("l2norm({})", "tanh({})", "{}", "0.3 * {}"))
        key, value, other = self.unit(), self.leaf("Value"), self.leaf("Value")
        self.read = {"Value": f"{S}v", "Key": f"{S}k", "Scalar": f"{S}s"}
        return [
            f"{S}v = {shape.format(f'(({key}) @ {at})')}",
            f"{S}k = {shape.format(f'({at} @ l2norm({value}))')}",
            f"{S}s = tanh(dot({S}v, {other}))",
        ]

    def group(self, states: Sequence[str]) -> list[str]:
        """Statements that bring matrices a token further that mix and recall one another."""
        lines = [f"{S}0 = {S}" for S in states]
        for S in states:
            own = self.pick(
                (
                    *("0.5 * {0}0", "0.6 * sigmoid(g) * {0}0", "0.5 * exp(h) * {0}0"),
                    *("0.5 * tanh(b) * {0}0", "0 * {0}0", "exp(-softplus(g) - 0.7) * {0}0"),
                )
            )
            lines.append(f"{S} = {own.format(S)}")
            for other in states:
                if other != S and self.pick((True, True, False)):
                    factor = self.pick((self.step(), f"tanh({self.scalar(0)})", "-1", "sigmoid(g)"))
                    lines.append(f"{S} = {S} + 0.2 * {factor} * {other}0")
            for _ in range(self.pick((1, 1, 2) if states[0] == S else (1, 1, 2, 0))):
                of = self.pick((S, *states))
                write = self.pick(
                    (
                        f"outer({self.unit()}, {self.vector('Value')} - {self.unit()} @ {of}0)",
                        f"outer({self.vector('Key')}, {self.vector('Value')})",
                    )
                )
                lines.append(f"{S} = {S} + 0.3 * {self.step()} * {write}")
            lines.append(f"{S}1 = {S}")
        return lines

    def turned(self, x: str, y: str, late: Sequence[str] = ()) -> list[str]:
        """Statements that turn two states by an angle, and write to them, a token further.

        `late`: states that have what was written at the token before, and turn along.
        """
        lines = [f"{x}0, {y}0 = {x}, {y}"]
        if late:  # what mixes besides has Scalar factors
            decay = self.pick(("exp(g)", "", "sigmoid(f)", "-0.7", "-exp(g) * tanh(b)"))
        else:
            decay = self.decay()
        angle = self.angle()
        r = f"{decay} * " if decay else ""
        parts = [f"{r}{x}0", f"{r}{y}0"]
        if late:
            lag = self.pick(("0.3", f"0.3 * {self.step()}", f"0.3 * tanh({self.scalar(0)})"))
            parts = [f"{part} + {lag} * {z}" for part, z in zip(parts, late, strict=True)]
        turned = self.pick(
            (
                "{x}, {y} = rotate({p}, {q}, {a})",
                "{x}, {y} = rotate({p}, {q}, {a})",
                "{y}, {x} = rotate({q}, {p}, {a})",
                "{x}, {y} = cos({a})*({p}) - sin({a})*({q}), sin({a})*({p}) + cos({a})*({q})",
            )
        )
        lines.append(turned.format(x=x, y=y, p=parts[0], q=parts[1], a=angle))
        lines.append(f"{x}1, {y}1 = {x}, {y}")
        k, c = self.unit(), self.pick(("0 * p", self.unit(), self.unit()))
        recalled = self.pick(
            (
                "",
                f" - ({k}) @ {x}1 - ({c}) @ {y}1",
                f" - ({k}) @ {x}1 + ({c}) @ {y}1",
                f" - ({k}) @ {x}1",
                f" - ({c}) @ {y}0",
                f" - ({self.unit()}) @ {y}1",
            )
        )
        value = f"0.4 * {self.step()} * ({self.vector('Value')}{recalled})"
        other = self.pick((value, value, self.vector("Value"), ""))
        lines.append(f"{x} = {x} + outer({k}, {value})")
        if other:
            lines.append(f"{y} = {y} + outer({c}, {other})")
        for z, key, written in zip(late, (k, c), (value, other or value), strict=False):
            lines.append(f"{z} = outer({key}, {written})")
        return lines

    def turned_vectors(self, x: str, y: str) -> list[str]:
        """The same of two KeyStates."""
        decay, angle, key = self.decay(), self.angle(), self.unit()
        r = f"{decay} * " if decay else ""
        lines = [f"{x}0, {y}0 = {x}, {y}", f"{x}, {y} = rotate({r}{x}, {r}{y}, {angle})"]
        lines.append(f"{x}1, {y}1 = {x}, {y}")
        recalled = self.pick(("", f" - dot({key}, {x}1)", f" - dot({key}, {y}1)"))
        lines.append(f"{x} = {x} + 0.6 * {self.step()} * ({self.scalar(0)}{recalled}) * {key}")
        if self.often(1):
            lines.append(f"{y} = {y} + {self.vector('Key')}")
        return lines

    def angle(self) -> str:
        """An angle of every kind: of the token, of the head, of channels, made of anything."""
        kind = self.pick(("Scalar", "Key", "HeadScalar", "HeadKey"))
        leaf = self.pick(SINGLE[kind])
        free = self.scalar(1) if "Scalar" in kind else self.vector("Key", 1)
        return self.pick((leaf, leaf, f"3 * {leaf}", free, f"-({leaf})", f"{self.step()} * {leaf}"))

    # ------------------------------------------------------------ outputs
    def output(
        self, matrices: Sequence[str], vectors: Sequence[str], over: str = "Key"
    ) -> list[str]:
        """Statements that make the output `o` of reads of the states over an axis."""
        lines = []
        kind = "Value" if over == "Key" else "Key"  # of the output
        query = self.vector("Key")

        def reading(x: str, S: str) -> str:
            return f"({x}) @ {S}" if over == "Key" else f"{S} @ ({x})"

        for n, S in enumerate(matrices):
            seen = [S, S, f"{S}1", f"{S}0"]
            seen.append(f"({S}0 + outer({self.leaf('Key')}, {self.leaf('Value')}))")
            seen += [f"({S} - {S}0)", f"({self.scalar(0)} * {S} + {S}1)"]
            x = self.pick((query, self.vector("Key"))) if over == "Key" else self.vector("Value")
            read = reading(x, self.pick(seen))
            lines.append(f"o = o + {read}" if n else f"o = {read}")
        if not matrices:
            lines.append(f"o = {self.vector(kind)}")
        for z in vectors:
            at = self.pick((z, z, f"{z}1", f"{z}0"))
            read = self.pick((f"dot({query}, {at})", f"(({query}) @ {at})"))
            lines.append(
                self.pick(
                    (
                        f"o = o / (1 + abs({read}))",
                        f"o = o / maximum(abs({read}), 1.0)",
                        f"o = o * {read}",
                        f"o = o + {read} * {self.leaf(kind)}",
                        f"o = o * sigmoid({read})",
                    )
                )
            )
        if matrices and self.often():
            lines.append(f"o = o + {reading(self.vector(over), matrices[0])}")
        final = self.pick(OUTPUTS)
        if final != "o":
            places = {
                "v": lambda: self.vector(kind, 0),
                "k": lambda: self.vector(over, 0),
                "s": lambda: self.scalar(0),
                "n": self.number,
            }
            lines.append("o = " + re.sub(r"\{(.)\}", lambda m: places[m[1]](), final))
        return lines
