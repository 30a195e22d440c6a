"""Completion of names in a shell: components, formats, their options, run folders. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from impq_core.config import RunConfig
from impq_core.descriptions import described_options
from impq_core.plugins import ROLES, Plugins

Completion = Callable[[click.Context, str], list[CompletionItem]]


def complete_names(group: click.Group) -> None:
    """Complete the values of every parameter in a group of commands whose name is in ``COMPLETIONS``."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            complete_names(command)
        for parameter in command.params:
            if completion := COMPLETIONS.get(parameter.name or ""):
                parameter.shell_complete = completion  # type: ignore[method-assign,assignment]


def components(role: str, context: click.Context, word: str) -> list[CompletionItem]:
    """Names of a role; in a list with commas, those of its last name."""
    before, comma, begun = word.rpartition(",")
    plugins = _plugins(context)
    return [CompletionItem(f"{before}{comma}{name}", help=plugins.find(role, name).summary)
            for name in plugins.names(role) if name.startswith(begun)]


def part_options(context: click.Context, word: str) -> list[CompletionItem]:
    """``NAME=`` of every option of the components that the command line has chosen so far."""
    plugins, found = _plugins(context), {}
    for role in ROLES:
        chosen = str(context.params.get(role) or getattr(RunConfig(), role))
        for name in chosen.split(","):
            if (role, name) not in plugins.offers:
                continue
            for option, default, description in described_options(plugins, role, name):
                for spelled in (option, f"{role}.{option}"):
                    found[f"{spelled}="] = f"{description} [{default}]"
    return [CompletionItem(name, help=text) for name, text in found.items()
            if name.startswith(word) and ("." in word or "." not in name)]


def run_folders(context: click.Context, word: str) -> list[CompletionItem]:
    """Run folders in the typed folder and in ``impq-runs``, the latest first; if there is none, the shell's folders."""
    above = Path(word if word.endswith("/") else Path(word).parent)
    found: dict[str, None] = {}
    for folder in (above, Path("impq-runs")):
        with suppress(OSError):
            found |= dict.fromkeys(str(path) for path in sorted(folder.iterdir(), reverse=True)
                                   if (path / "impq.toml").is_file())
    return [CompletionItem(path) for path in found if path.startswith(word)] or [CompletionItem(word, type="dir")]


def models(context: click.Context, word: str) -> list[CompletionItem]:
    """``demo``, or the shell's folders."""
    return [CompletionItem("demo")] if word and "demo".startswith(word) else [CompletionItem(word, type="dir")]


COMPLETIONS: Mapping[str, Completion] = {
    **{role: partial(components, role) for role in (*ROLES, "refiner")},
    "names": partial(components, "surrogate"), "estimate_with": partial(components, "backend"),
    "exports": partial(components, "exporter"), "format": partial(components, "exporter"),
    "options": part_options, "model": models, "run": run_folders, "runs": run_folders, "path": run_folders,
    "resume": run_folders}
"""Completions by the names of parameters, which mean the same in every command."""


def _plugins(context: click.Context) -> Plugins:
    """The plugins with the files of ``--plugin``; without them if one cannot be loaded."""
    files: Any = context.params.get("plugin_files") or ()
    try:
        return Plugins(files)
    except Exception:  # the command itself will say it
        return Plugins()
