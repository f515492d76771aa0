"""A declared recurrence: the user's function with everything that is derived from it, on demand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache

from . import errors
from .ir import Loc
from .normal_form import NormalForm, Operand, Param, StateDecl
from .normalise import normalise
from .step import Step
from .trace import read_signature, trace, where
from .verify import verify_form, verify_step


class Declaration:
    """A recurrence, from its Python function; the mistakes in it are reported at once.

    `any_step` also takes steps that are not affine in the state: only the reference engine runs
    them. Raises DeclarationError (see `errors`).
    """

    def __init__(self, function: Callable[..., object], *, any_step: bool = False) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", "recurrence")
        self.doc: str = inspect.getdoc(function) or ""
        self.source_location: Loc | None = where(function)
        self.any_step = any_step
        signature = read_signature(function)
        # the tensors of a call, its run-time floats and the carried states, in order
        self.operands: tuple[Operand, ...] = signature.operands
        self.params: tuple[Param, ...] = signature.params
        self.states: tuple[StateDecl, ...] = signature.states
        # the int and bool keywords in alphabetical order, with their defaults
        self.statics: Mapping[str, int | bool] = dict(sorted(signature.statics))
        self._trace = lru_cache(maxsize=None)(self._trace_once)
        self._normalise = lru_cache(maxsize=None)(self._normalise_once)
        if any_step:
            self.step(self.default_micro)
        else:
            self.normal_form(self.default_micro)

    @property
    def has_micro(self) -> bool:
        """Whether an operand is a tuple, one entry per micro-step."""
        return any(o.micro for o in self.operands)

    @property
    def default_micro(self) -> int:
        """The number of micro-steps to derive where none is given: 2 for tuples, else 1."""
        return 2 if self.has_micro else 1

    def step(self, micro: int = 1, static: Mapping[str, int | bool] | None = None) -> Step:
        """The traced step, for tuples of length `micro` and static keywords `static`."""
        return self._trace(micro, _ordered(static))

    def normal_form(
        self, micro: int = 1, static: Mapping[str, int | bool] | None = None
    ) -> NormalForm:
        """The normal form of that step. Raises NotAffine, NoChunkForm and the decay errors."""
        return self._normalise(micro, _ordered(static))

    def _trace_once(self, micro: int, static: tuple[tuple[str, int | bool], ...]) -> Step:
        step = trace(self.function, micro, dict(static))
        verify_step(step)
        usual = micro == self.default_micro and not static
        if len(step.outputs) > 1 and not usual and len(self.step(self.default_micro).outputs) == 1:
            raise errors.BadReturn(
                f"{len(step.outputs)} outputs for these numbers",
                "one, as it returns for others",
                self.source_location,
            )
        return step

    def _normalise_once(self, micro: int, static: tuple[tuple[str, int | bool], ...]) -> NormalForm:
        form = normalise(self._trace(micro, static))
        verify_form(form)
        return form

    def __repr__(self) -> str:
        return f"<recurrence {self.name}({', '.join(o.name for o in self.operands)})>"


def _ordered(static: Mapping[str, int | bool] | None) -> tuple[tuple[str, int | bool], ...]:
    return tuple(sorted(static.items())) if static else ()


def declaration(function: Callable[..., object]) -> Declaration:
    """Decorator: declare a recurrence."""
    return Declaration(function)
