"""The catalogue of mistakes: one class each, naming the value got, the one expected, the remedy.

Mistakes in declarations and in calls have files of their own; here are all the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from .call_errors import *  # noqa: F403
from .declaration_errors import *  # noqa: F403
from .diagnostic import ChunkwiseError as ChunkwiseError
from .ir import Loc


class NotLowered(ChunkwiseError, ValueError):
    """A declaration that the front end accepts and a back end (or a proof) does not serve."""

    def __init__(self, what: str, why: str, instead: str, loc: Loc | None = None) -> None:
        super().__init__(what, loc=loc, why=why, help=instead)

    @property
    def reason(self) -> str:
        """What is not served, and why, on one line."""
        return f"{self.headline}: {self.why}"


class UnknownRecurrence(ChunkwiseError, ValueError):
    """A name that the library does not have."""

    def __init__(self, got: str, expected: Sequence[str]) -> None:
        super().__init__(f"no recurrence {got!r}, expected one of {', '.join(expected)}")


class ProofFailed(ChunkwiseError, ValueError):
    """An identity that `prove` was to show and that does not hold: a fault of the compiler."""

    def __init__(self, name: str, what: str, difference: object) -> None:
        text = str(difference)
        super().__init__(
            f"{name}: {what}",
            why=f"the difference is {text[:200]}{'…' if len(text) > 200 else ''}",
            help="please report the declaration: its chunk form must not be used",
        )


class InvalidIR(ChunkwiseError, ValueError):
    """A broken invariant of an intermediate form: a fault of a pass, not of the user."""

    def __init__(self, what: str, node: str = "") -> None:
        super().__init__(
            f"{what}{': ' + node if node else ''}",
            why="a pass of the compiler produced it; please report the declaration",
        )


class EngineUnavailable(ChunkwiseError, ValueError):
    """An engine that was asked for and cannot serve this machine or call."""

    def __init__(self, engine: str, why: str, *, help: str = "") -> None:
        super().__init__(
            f"engine {engine!r} cannot serve this call",
            why=why,
            help=help or 'engine="eager" runs anywhere; nothing falls back silently',
        )


class PackageUnavailable(ChunkwiseError, ImportError):
    """A package that chunkwise would work with and that is not there, or not as it must be."""

    def __init__(self, package: str, why: str, *, help: str) -> None:
        super().__init__(f"the package {package} cannot be used", why=why, help=help)


class BadArtifact(ChunkwiseError, ValueError):
    """A file of tuned configurations that cannot be trusted."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(
            f"the artifact {file} is not used",
            why=why,
            help="calls are served as if it were not there; `chunkwise tune` writes it anew",
        )


class BadConfiguration(ChunkwiseError, ValueError):
    """A configuration with a number that no kernel can be printed for."""

    def __init__(self, field: str, got: object, expected: str, why: str = "") -> None:
        super().__init__(f"{field} is {got!r}, expected {expected}", why=why)


class BadCache(ChunkwiseError, OSError):
    """A cache folder that cannot be written, or that somebody else could write to."""

    def __init__(self, folder: str, why: str) -> None:
        super().__init__(
            f"the cache folder {folder} is not used",
            why=why,
            help="CHUNKWISE_CACHE names another: a folder of your own (mode 0700) with room in it",
        )


class LinkerFailed(ChunkwiseError, RuntimeError):
    """A linker that was found and did not make a library of compiled code."""

    def __init__(self, command: str, status: int, printed: str) -> None:
        super().__init__(
            f"the linker failed with status {status}: {command}",
            why=printed.strip()[-2000:] or "it printed nothing",
            help="it comes with a C compiler; check that it makes any shared library",
        )


class BadFile(ChunkwiseError, ImportError):
    """A user's file that cannot be run: bad syntax, a failed import, an exception of its own.

    `trace` is the traceback of that exception, without frames of chunkwise.
    """

    def __init__(self, file: str, trace: str) -> None:
        super().__init__(f"{file} cannot be run")
        self.trace = trace

    def render(self) -> str:
        """The user's own traceback, and the name of the file.

        Returns:
            The text, several lines.
        """
        return f"{self.trace.rstrip()}\n{super().render()}"
