"""The pages of docs/reference, generated from help texts, docstrings and defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields

import click

from impq_core.cli import cli
from impq_core.config import RunConfig, TextConfig
from impq_core.parts import describe_options, described_arguments
from impq_core.plugins import OFFERED, Plugins

WIDTH = 100
"""Width of a help text in columns, the same on every terminal."""

WRITTEN = "Written by `IMPQ_WRITE_DOCS=1 pytest tests/test_docs.py` from the code; the tests compare it.\n"


def commands() -> str:
    """Every command's help."""
    parts = ["# Commands\n", WRITTEN]
    own = click.Group("impq", help=cli.help, params=cli.params, commands=cli.commands)  # without those of plugins
    for words, command in _every(own, "impq"):
        context = click.Context(command, info_name=words, terminal_width=WIDTH, max_content_width=WIDTH,
                                help_option_names=["-h", "--help"])
        parts += [f"## {words}\n", "```text", command.get_help(context).rstrip(), "```\n"]
    return "\n".join(parts).rstrip() + "\n"


def _every(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _every(below, f"{words} {name}")


def options() -> str:
    """Every part with its options."""
    plugins = Plugins()
    parts = ["# Parts and their options\n", WRITTEN,
             "An option is set with `-o NAME=VALUE`, or `-o ROLE.NAME=VALUE` where several of a run's parts have one "
             "of that name, or in `impq.toml` under `[options.ROLE]`. `impq plugins --options` lists the same, and the "
             "parts of every plugin that is installed.\n"]
    for role in OFFERED:
        parts.append(f"## {role.capitalize()}s\n")
        for name in plugins.names(role):
            if not plugins.offers[role, name].origin.startswith("impq:"):
                continue
            parts += [f"### {name} {{ #{role}-{name} }}\n", f"{plugins.find(role, name).summary}.\n"]
            if rows := [_split(line) for line in describe_options(plugins, role, name)]:
                parts += ["| option | default | what it does |", "|---|---|---|", *map(_row, rows), ""]
    return "\n".join(parts).rstrip() + "\n"


def _split(line: str) -> tuple[str, str, str]:
    setting, _, described = line.partition("  ")
    name, _, default = setting.partition("=")
    return f"`{name}`", f"`{default}`" if default else "", described


def configuration() -> str:
    """The keys of impq.toml."""
    parts = ["# Configuration\n", WRITTEN,
             "The keys of `impq.toml`, which `impq` reads in the working folder or where `--config` says; flags of the "
             "same name win. Unknown keys are errors. A run folder's `impq.toml` holds all of them, resolved.\n",
             "| key | default | what it is |", "|---|---|---|"]
    texts = ("calibration", "evaluation")
    parts += map(_row, _keys(RunConfig, skip=texts))
    described = described_arguments(RunConfig.__doc__ or "")
    parts += ["", *(f"- `[{name}]`: {_code(described[name])}" for name in texts), "",
              "## `[calibration]` and `[evaluation]`\n", "A name alone is short for a table with that `source`.\n",
              "| key | default | what it is |", "|---|---|---|", *map(_row, _keys(TextConfig))]
    return "\n".join(parts) + "\n"


def _keys(kind: type, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    described: Mapping[str, str] = described_arguments(kind.__doc__ or "")
    for one in fields(kind):
        if one.name in skip:
            continue
        default = one.default if one.default is not MISSING else {}
        shown = str(default).lower() if isinstance(default, bool) else (
            "[]" if default == () else "{}" if default == {} else f'"{default}"' if isinstance(default, str)
            else str(default))
        yield f"`{one.name}`", f"`{shown}`", described[one.name]


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_code(cell).replace("|", "\\|") for cell in cells) + " |"


def _code(text: str) -> str:
    return text.replace("``", "`")


PAGES: Mapping[str, Callable[[], str]] = {"commands.md": commands, "options.md": options,
                                          "configuration.md": configuration}
