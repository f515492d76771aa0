"""The command `chunkwise completion`: a script by which a shell completes what is typed."""

from __future__ import annotations

import argparse

import shtab

from . import library
from .cli_command import TARGET, Command
from .codegen.interface import Dtype

_SHELLS = ("bash", "zsh", "tcsh")
# a TARGET is a name of the library, or a file; `$1` is the word so far
_BASH = """\
_chunkwise_target() {{
  compgen -W '{names}' -- "$1"
  compgen -f -X '!*.py' -- "$1"
  compgen -d -S / -- "$1"
}}
_chunkwise_dtype() {{ compgen -W '{dtypes}' -- "$1"; }}
"""
_ZSH = """\
_chunkwise_target() {{
  _alternative 'names:recurrence:({names})' 'files:file:_files -g "*.py"'
}}
_chunkwise_dtype() {{ compadd {dtypes}; }}
"""
# by the placeholder of a usage; tcsh has no functions, and completes words or files
_WORDS = {
    TARGET: {"bash": "_chunkwise_target", "zsh": "_chunkwise_target", "tcsh": "({names})"},
    "DTYPE": {"bash": "_chunkwise_dtype", "zsh": "_chunkwise_dtype", "tcsh": "({dtypes})"},
}
_PATHS = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY, "PATH": shtab.FILE}


def script(shell: str) -> str:
    """The script of a shell, which knows all commands, options and names of the library."""
    from .cli import parser  # which has this command too

    words = {
        "names": " ".join(library.names()),
        "dtypes": " ".join(d.value for d in Dtype),
    }
    completers: dict[str, object] = dict(_PATHS)
    for placeholder, by_shell in _WORDS.items():
        completers[placeholder] = {s: text.format(**words) for s, text in by_shell.items()}
    top = parser()
    pending: list[argparse.ArgumentParser] = [top]
    while pending:
        for action in pending.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
            elif action.choices is None and action.metavar in completers:
                action.complete = completers[str(action.metavar)]  # type: ignore[attr-defined]
    preamble = {"bash": _BASH.format(**words), "zsh": _ZSH.format(**words)}
    return str(shtab.complete(top, shell=shell, preamble=preamble.get(shell, ""))).rstrip("\n")


def _completion(arguments: argparse.Namespace) -> int:
    print(script(arguments.shell))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="the shell that will run the script")


COMPLETION = Command(
    "completion",
    "Print a script by which bash, zsh or tcsh completes commands, options and names.",
    (
        "chunkwise completion bash > ~/.local/share/bash-completion/completions/chunkwise",
        "source <(chunkwise completion bash)   # in this shell only",
        "chunkwise completion zsh > ~/.zfunc/_chunkwise   # a folder of $fpath",
    ),
    _arguments,
    _completion,
)
