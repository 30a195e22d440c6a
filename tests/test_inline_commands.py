"""Commands inside sentences of README and docs, which no test runs: their commands, options and arguments exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from impq_core.cli import cli

ROOT = Path(__file__).parent.parent
GENERATED = "errors.md"
"""Has the commands that are wrong."""


def inline_commands() -> list[tuple[str, str]]:
    """The file and the text of each."""
    found = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        prose = re.sub(r"(?ms)^```.*?^```", "", file.read_text())
        codes = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
        found += [(file.name, code) for code in codes if code.startswith("impq ") and file.name != GENERATED]
    return list(dict.fromkeys(found))


def fault_of(words: list[str]) -> str:
    """What of a command does not exist; empty if all does. Values and files are not looked at."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        following = command.get_command(context, name)
        if following is None:
            return f"no command {name}"
        command = following
    try:
        _, left, _ = command.make_parser(click.Context(command)).parse_args(list(words))
    except click.BadOptionUsage:  # an option is named without its value
        return ""
    except click.UsageError as error:
        return error.format_message()
    return f"too much: {left}" if left else ""


def test_commands_inside_sentences_exist() -> None:
    commands = inline_commands()
    assert len(commands) > 50
    faults = {f"{file}: {code}": fault for file, code in commands
              if (fault := fault_of(shlex.split(code.partition("|")[0])[1:]))}
    assert not faults


@pytest.mark.parametrize("wrong", ["rotate demo rotated", "rnu", "run --estimater spqe", "cache prunes"])
def test_faults_are_found(wrong: str) -> None:
    assert fault_of(shlex.split(wrong))
