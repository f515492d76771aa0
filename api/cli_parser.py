"""argparse's parser, which says what a mistyped command, option or choice may have meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .dsl.diagnostic import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors have suggestions; a subcommand refuses what it does not know itself."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but what is not known is an error of this parser."""
        known, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return known, extra

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message and what may have been meant; exit with 2."""
        super().error("; ".join(filter(None, [message, self._meant(message)])))

    def _meant(self, message: str) -> str:
        choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        if choice is not None and choice[1].partition(":")[0].endswith(".py"):
            return f"a command comes first: chunkwise explain {choice[1]}"
        if choice is not None:
            return did_you_mean(choice[1], re.findall(r"[^\s',]+", choice[2]))
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        if unknown is not None:
            return did_you_mean(unknown[1], self.options())
        return ""

    def options(self) -> list[str]:
        """The long options that this parser takes."""
        return [o for a in self._actions for o in a.option_strings if o.startswith("--")]
