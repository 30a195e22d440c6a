"""``--json`` and ``--quiet``: every command, by the schema in docs/reference."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
import pytest
import reference
from gguf_files import linears_of, write_gguf
from scenes import World

from impq_core.cli import cli
from impq_core.documents.base import SCHEMA, plain

COMMANDS = {
    "run --estimator random": "run",
    "run --plan finished/plan.json --export impq": "run",
    "run --resume finished": "run",
    "run --dry-run": "forecast",
    "run --estimator random --budget 2.5bits,3bits": "curves",
    "curve finished": "curves",
    "evaluate finished --tasks questions.jsonl --row plan": "tasks",
    "ask finished --tokens 2 Hello": "answers",
    "estimate": "run",
    "sweep --estimator random --budget 2.5bits,3bits": "sweep",
    "sweep --resume swept": "sweep",
    "sweep --dry-run": "forecast",
    "export finished hqq": "checkpoint",
    "evaluate exported": "checkpoint",
    "fit finished": "fits",
    "allocate finished --budget 2.5bits,3bits": "plans",
    "compare finished swept": "comparison",
    "compare finished --no-html": "comparison",
    "show finished": "run",
    "show estimated": "run",
    "show unfinished": "run",
    "plugins": "plugins",
    "plugins --options": "plugins",
    "plugins new mine.py": "written",
    "cache": "cache",
    "cache prune --all": "pruned",
    "doctor --tracking-uri none": "doctor",
    "rotate model --to rotated": "rotated",
    "import model.gguf --model model --to imported.json": "plan",
}
"""Commands in the folder of the tests' world, and the kind of document that each prints."""

ERRORS = {
    "run --json --estimator spqq": ("usage", 2),
    "run --json --estimater spqe": ("usage", 2),
    "run --json --quiet": ("usage", 2),
    "rnu --json": ("usage", 2),
    "allocate --json nowhere --budget 3bits": ("error", 1),
    "evaluate --json model": ("error", 1),
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((Path(reference.__file__).parents[1] / "docs" / "reference" / "json-schema.json").read_text())


@pytest.fixture(scope="module")
def documents(world: World) -> dict[str, Any]:
    """What every command prints on stdout."""
    printed = {}
    for command in COMMANDS:
        world.reset()
        settings = world.here / "impq.toml"
        settings.write_text(settings.read_text().replace('tracking_uri = ""', 'tracking_uri = "none"'))
        if "unfinished" in command:
            leave_unfinished(world.here)
        if "questions.jsonl" in command:
            (world.here / "questions.jsonl").write_text('{"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}\n')
        if command.startswith("import"):
            linears = linears_of(world.here / "model")[:-2]
            write_gguf(world.here / "model.gguf", linears, {linear.name: "Q8_0" for linear in linears}, blocks=2)
        answer = world.ask(f"{command} --json")
        assert answer.code == 0, (command, answer.err)
        printed[command] = json.loads(answer.out)
    return printed


def leave_unfinished(here: Path) -> None:
    """A run that was killed while it measured."""
    shutil.copytree(here / "estimated", here / "unfinished")
    for name in ("estimate.npz", "measurements.npz", "cost.json"):
        (here / "unfinished" / name).unlink()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_one_document_of_the_schema(command: str, documents: dict[str, Any],
                                                     schema: dict[str, Any]) -> None:
    """All that is documented is there, and nothing else."""
    document = documents[command]
    assert document["kind"] == COMMANDS[command] and document["schema"] == SCHEMA
    [branch] = [one for one in schema["oneOf"] if one["properties"]["kind"]["const"] == document["kind"]]
    jsonschema.validate(document, {**branch, "$defs": schema["$defs"]})  # names the field; that of oneOf does not


def test_the_schema_refuses_a_field_more_and_a_field_less(documents: dict[str, Any], schema: dict[str, Any]) -> None:
    document = documents["run --dry-run"]
    for change in ({"result": {**document["result"], "more": 1}},
                   {"result": {k: v for k, v in document["result"].items() if k != "memory"}}, {"kind": "runs"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, **change}, schema)


def test_every_document_that_is_described_is_printed(schema: dict[str, Any]) -> None:
    assert {*COMMANDS.values(), "error"} == {one["properties"]["kind"]["const"] for one in schema["oneOf"]}


def every_command(group: click.Group = cli, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*words, name))
        yield " ".join((*words, name)), command


@pytest.mark.parametrize(("name", "command"), every_command())
def test_every_command_but_the_server_answers(name: str, command: click.Command) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert ({"--json", "--quiet"} <= options) != (name == "ui")
    assert name == "ui" or any(f"{case} ".startswith(f"{name} ") for case in (*COMMANDS, *ERRORS)), "no case"


@pytest.mark.parametrize("command", ERRORS)
def test_an_error_is_a_document_too(command: str, world: World, schema: dict[str, Any]) -> None:
    world.reset()
    answer = world.ask(command)
    document = json.loads(answer.out)
    jsonschema.validate(document, schema)
    assert (document["error"]["type"], answer.code) == ERRORS[command]
    assert document["error"]["exit_code"] == answer.code and answer.err == f"impq: {document['error']['message']}\n"


def test_a_wrong_installation_is_a_document_with_exit_code_1(world: World) -> None:
    world.reset()
    answer = world.ask("doctor --json --tracking-uri nonsense://x")
    document = json.loads(answer.out)
    assert answer.code == 1 and not document["result"]["ok"]
    assert "wrong" in {finding["state"] for finding in document["result"]["findings"]}


def test_the_numbers_are_those_of_the_run(documents: dict[str, Any], world: World) -> None:
    result = documents["run --resume finished"]["result"]
    world.reset()
    stored = json.loads((world.here / "finished" / "evaluation.json").read_text())
    plan = json.loads((world.here / "finished" / "plan.json").read_text())
    rows = {row["allocation"]: row for row in result["evaluation"]["rows"]}
    assert {row["name"]: row["nll"] for row in stored["rows"]} == {n: row["nll_nats"] for n, row in rows.items()}
    assert rows["plan"]["size_bytes"] == result["plan"]["size_bytes"] == plan["bytes"]
    assert sum(layer["size_bytes"] for layer in result["plan"]["layers"]) == plan["bytes"]
    assert {layer["layer"]: layer["bits"] for layer in result["plan"]["layers"]} == {
        name: choice["bits"] for name, choice in plan["layers"].items()}
    assert documents["run --plan finished/plan.json --export impq"]["result"]["exports"][0]["format"] == "impq"


def test_quiet_is_the_last_lines(world: World) -> None:
    world.reset()
    loud, quiet = world.ask("run --resume finished"), world.ask("run --resume finished --quiet")
    lines = quiet.out.splitlines()
    assert quiet.code == 0 and 0 < len(lines) < 5 and set(lines[:1]) <= set(loud.out.splitlines())
    assert "finished" in lines[-1]
    assert world.ask("run --quiet --estimator spqq").err.startswith("impq: ")


CHATTER = """
import ctypes, os, sys, click
from impq_core.documents.installation import WrittenDocument
from impq_core.commands.output import Answer, answers
from impq_core.cli import cli, main

@cli.command()
@answers
def chatter():
    print("from Python")
    os.write(1, b"from the system\\n")
    ctypes.CDLL(None).printf(b"from C\\n")
    os.system("echo from a child")
    return Answer(WrittenDocument(["file"]), ["last"])

main()
"""


@pytest.mark.parametrize(("option", "err"), [("--json", 4), ("--quiet", 0)])
def test_chatter_of_libraries_is_not_on_stdout(option: str, err: int) -> None:
    done = subprocess.run([sys.executable, "-c", CHATTER, "chatter", option], capture_output=True, text=True)
    assert done.stderr.count("from ") == err, done
    if option == "--json":
        assert json.loads(done.stdout)["result"] == {"files": ["file"]}
    else:
        assert done.stdout == "last\n"


def test_numbers_that_are_not_finite_are_null() -> None:
    given = {"a": [math.nan, np.float64("inf"), np.arange(2)], "b": Path("x"), "c": np.int64(3)}
    assert plain(given) == {"a": [None, None, [0, 1]], "b": "x", "c": 3}
