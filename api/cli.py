"""The command line: a table of commands, `chunkwise new | list | explain | tune | export …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import interrupts
from .cli_audit import AUDIT
from .cli_command import Command, UsageError
from .cli_completion import COMPLETION
from .cli_crossover import CROSSOVER
from .cli_doctor import DOCTOR
from .cli_emit import EMIT
from .cli_export import EXPORT
from .cli_inspect import EXPLAIN, LIST, PROVE
from .cli_new import NEW
from .cli_parser import Parser
from .cli_report import REPORT
from .cli_tune import TUNE
from .cli_verify import VERIFY
from .dsl.errors import ChunkwiseError
from .runtime.tuned.machine import version

# a new command joins here
COMMANDS: tuple[Command, ...] = (
    NEW,
    LIST,
    EXPLAIN,
    PROVE,
    REPORT,
    EMIT,
    EXPORT,
    TUNE,
    VERIFY,
    CROSSOVER,
    AUDIT,
    DOCTOR,
    COMPLETION,
)

_EXAMPLES = """\
A TARGET is a name of the library, or a file and a name in it:
  chunkwise new my_rule
  chunkwise list
  chunkwise explain gated_delta_rule
  chunkwise explain my_rules.py:my_rule
  chunkwise prove delta_rule kda
  chunkwise emit gated_delta_rule --stage chunk
  chunkwise tune gated_delta_rule --dims K=128,V=128 --dtype bf16
  chunkwise export gated_delta_rule -o my_model/kernels
  chunkwise doctor
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="chunkwise",
        description="A compiler for linear-attention recurrences.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    installed = version("chunkwise") or "(not installed)"
    top.add_argument("--version", action="version", version=f"chunkwise {installed}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(own)
        own.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 1 for a failure (stderr says why), 2 if the command line was not
    understood, and 130 after an interrupt.
    """
    try:
        interrupts.raise_again()
        top = parser()
        words = sys.argv[1:] if argv is None else argv
        if not words:
            top.print_help(sys.stderr)
            return 2
        arguments = top.parse_args(words)
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"chunkwise: {error}", file=sys.stderr)
        return 2
    except ChunkwiseError as error:
        print(error.render(), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # its text says what is kept
        print(": ".join([interrupts.LINE, *interrupt.args]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `chunkwise list | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
