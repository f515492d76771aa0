"""The scripts of `chunkwise completion`, in the shells for which they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pexpect
import pytest
from chunkwise import cli_completion

WORDS = [
    ("chunkwise ex", "explain export"),
    ("chunkwise explain gated_delta", "gated_delta_product gated_delta_rule"),
    ("chunkwise emit kda --stage c", "chunk"),
    ("chunkwise tune kda --dtype b", "bfloat16"),
]
FILES = [("chunkwise explain my_r", "my_rules.py")]
OPTIONS = [("chunkwise emit kda --st", "--stage")]
# what makes a shell use the script in the file _chunkwise of its folder
READY = {
    "zsh": "fpath=($PWD $fpath); autoload -U compinit; compinit -D",
    "tcsh": "set autolist; source _chunkwise",
}


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_scripts_know_every_command(shell: str) -> None:
    from chunkwise.cli import COMMANDS

    script = cli_completion.script(shell)
    assert all(command.name in script for command in COMMANDS)


@needs("bash")
@pytest.mark.parametrize(("typed", "offered"), WORDS + FILES + OPTIONS)
def test_bash(typed: str, offered: str, tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").touch()
    words = typed.split()
    code = f"""{cli_completion.script("bash")}
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{typed}'; COMPREPLY=()
_shtab_chunkwise
printf '%s\\n' "${{COMPREPLY[@]}}" | sort | xargs
"""
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == offered


def _tab(shell: str, typed: str, folder: Path) -> str:
    """What a shell shows after `typed` and a TAB, and another one where several words fit."""
    (folder / "_chunkwise").write_text(cli_completion.script(shell), encoding="utf-8")
    (folder / "my_rules.py").touch()
    environment = {"TERM": "vt100", "HOME": str(folder), "PATH": os.environ["PATH"]}
    child = pexpect.spawn(
        *(shell, ["-f", "-i"]), cwd=folder, env=environment, encoding="utf-8", timeout=60
    )
    child.sendline(f"{READY[shell]}; echo rea''dy")
    child.expect("ready\r\n")
    child.send(f"{typed}\t\t")
    shown = ""
    while True:
        try:
            shown += child.read_nonblocking(4096, timeout=3)
        except pexpect.TIMEOUT:  # it waits for more
            break
    child.close(force=True)
    return re.sub(r"\x1b\[[?\d;]*\w|.\x08|\x07", "", shown)


def _lacking(shown: str, offered: str) -> list[str]:
    return [w for w in offered.split() if not re.search(rf"(?<!\w){w}(?!\w)", shown)]


@needs("zsh")
@pytest.mark.parametrize(("typed", "offered"), WORDS + FILES + OPTIONS)
def test_zsh(typed: str, offered: str, tmp_path: Path) -> None:
    assert _lacking(_tab("zsh", typed, tmp_path), offered) == []


@needs("tcsh")
@pytest.mark.parametrize(("typed", "offered"), WORDS)
def test_tcsh(typed: str, offered: str, tmp_path: Path) -> None:
    assert _lacking(_tab("tcsh", typed, tmp_path), offered) == []
