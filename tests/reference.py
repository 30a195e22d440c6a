"""The pages of docs/reference, generated from help texts, docstrings and defaults."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

import click
from pydantic import TypeAdapter

import impq_core.documents
from impq_core.cli import cli
from impq_core.config import RunConfig, TextConfig
from impq_core.descriptions import described_arguments, described_options
from impq_core.documents.base import SCHEMA, Document, ErrorDocument
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
            if rows := [(f"`{option}`", f"`{default}`" if default else "", what)
                        for option, default, what in described_options(plugins, role, name)]:
                parts += ["| option | default | what it does |", "|---|---|---|", *map(_row, rows), ""]
    return "\n".join(parts).rstrip() + "\n"


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


def document_kinds() -> dict[str, type[Document]]:
    """The documents that commands print, by their kind."""
    for module in pkgutil.iter_modules(impq_core.documents.__path__, "impq_core.documents."):
        importlib.import_module(module.name)
    own = [kind for kind in Document.__subclasses__() if kind.__module__.startswith("impq_core.")]  # not of plugins
    return {kind.kind: kind for kind in sorted(own, key=lambda kind: kind.kind)}


def json_schema() -> dict[str, Any]:
    """The JSON schema of every document: types from annotations, descriptions from docstrings. Every field of a
    document is always there, and no other is."""
    kinds = document_kinds()
    described: dict[str, Any] = {}
    for kind in (ErrorDocument, *kinds.values()):
        schema = TypeAdapter(kind).json_schema()
        described |= schema.pop("$defs", {}) | {kind.__name__: schema}
    classes = _dataclasses(ErrorDocument, *kinds.values())
    for name, schema in described.items():
        about = described_arguments(classes[name].__doc__ or "")
        schema["description"] = inspect.cleandoc(classes[name].__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        schema["additionalProperties"] = False
        schema["required"] = list(schema["properties"])
        for field, its in schema["properties"].items():
            its.pop("title", None)
            its["description"] = about[field].replace("None if", "null if")
    head = {"impq": {"type": "string"}, "schema": {"const": SCHEMA}}
    bodies = {"error": {"error": {"$ref": "#/$defs/ErrorDocument"}},
              **{name: {"result": {"$ref": f"#/$defs/{kind.__name__}"}} for name, kind in kinds.items()}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "What impq prints with --json",
            "oneOf": [{"type": "object", "properties": {**head, "kind": {"const": name}, **body},
                       "required": [*head, "kind", *body], "additionalProperties": False}
                      for name, body in bodies.items()],
            "$defs": dict(sorted(described.items()))}


def _dataclasses(*kinds: type) -> dict[str, type]:
    """Dataclasses by name: the given ones, and those of the modules that define them or that they import from."""
    modules = {inspect.getmodule(kind) for kind in kinds}
    return {name: value for module in modules for name, value in vars(module).items()
            if isinstance(value, type) and hasattr(value, "__dataclass_fields__")} | _forecast_parts()


def _forecast_parts() -> dict[str, type]:
    from impq_core.runs import forecast

    return {kind.__name__: kind for kind in (forecast.CostForecast, forecast.Fixed, forecast.SearchForecast,
                                            forecast.Size)}


def schema_text() -> str:
    """The JSON schema as a file."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def documents() -> str:
    """Every field of every document."""
    schema = json_schema()
    parts = ["# JSON documents\n", WRITTEN,
             "The fields of what `--json` prints ([use](../json.md)); [json-schema.json](json-schema.json) has "
             "the same as a JSON schema. Every field is always there. A number that is unknown or not finite is "
             "null.\n"]
    for name, kind in [("error", ErrorDocument), *document_kinds().items()]:
        about = schema["$defs"][kind.__name__]
        parts += [f"## {name}\n", f"{about['description']}\n", "| field | type | content |", "|---|---|---|",
                  *map(_row, _fields(about, schema["$defs"])), ""]
    return "\n".join(parts).rstrip() + "\n"


def _fields(schema: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in schema["properties"].items():
        shown, below, mark = _type_of(field)
        yield f"`{prefix}{name}`", shown, field["description"]
        if below and known[below].get("properties") and below not in SEPARATE:
            yield from _fields(known[below], known, f"{prefix}{name}{mark}.")
        elif below:
            yield f"`{prefix}{name}{mark}`", "object", f"as [{SEPARATE[below]}](#{SEPARATE[below]})"


SEPARATE = {"PlanDocument": "plan", "CheckpointDocument": "checkpoint", "ComparisonDocument": "comparison"}
"""Documents that others hold and that have a section of their own, with its title."""


def _type_of(field: Mapping[str, Any]) -> tuple[str, str, str]:
    """The type of a field as words, the name of the object in it, and ``[]`` if it is in a list."""
    if "anyOf" in field:
        [(shown, below, mark)] = [_type_of(kind) for kind in field["anyOf"] if kind.get("type") != "null"]
        return f"{shown} or null", below, mark
    if "$ref" in field:
        return "object", field["$ref"].rpartition("/")[2], ""
    if field.get("type") == "array":
        _, below, _ = _type_of(field["items"])
        return "list", below, "[]"
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(field.get("type", ""),
                                                                                       field.get("type", "any")), "", ""


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_code(cell).replace("|", "\\|") for cell in cells) + " |"


def _code(text: str) -> str:
    return text.replace("``", "`")


PAGES: Mapping[str, Callable[[], str]] = {"commands.md": commands, "options.md": options,
                                          "configuration.md": configuration, "json.md": documents,
                                          "json-schema.json": schema_text}
