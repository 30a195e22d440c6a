"""Descriptions of options, read from the docstrings of parts."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

from impq_core.errors import ImpqError
from impq_core.parts import BASES
from impq_core.plugins import Plugins


def described_options(plugins: Plugins, role: str, name: str) -> list[tuple[str, str, str]]:
    """Name, default and description of each option of a part; none if the part cannot be loaded."""
    try:
        part = plugins.load(role, name, BASES[role])
    except ImpqError:
        return []
    described = described_fields(part.Options)
    return [(field.name, _shown(field.default), described.get(field.name, "")) for field in fields(part.Options)]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def described_fields(options: type) -> dict[str, str]:
    """The description of each field of a dataclass, from the docstrings of the class and of its bases."""
    return {name: text for kind in reversed(options.__mro__)
            for name, text in described_arguments(vars(kind).get("__doc__") or "").items()}


def described_arguments(docstring: str) -> dict[str, str]:
    """The description of each name in the Args section of a docstring, on one line; names may share one."""
    _, _, section = inspect.cleandoc(docstring).partition("Args:\n")
    described: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if match := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            described |= dict.fromkeys(names, match[2])
        elif line.strip():
            described |= {name: f"{described[name]} {line.strip()}" for name in names}
    return described
