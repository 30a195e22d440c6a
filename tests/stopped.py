"""Runs that are stopped, and workers that die: how that is done, and what must be the same when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Answer, Order, Task
from impq_core.plugins import Plugins
from impq_core.runs.folder import RunFolder
from impq_core.runs.pipeline import run
from impq_core.testing.crew import InProcess, InProcessPlugin

LOGS = ("measurements.jsonl", "gradients.jsonl", "scores.jsonl", "refinement.jsonl", "referee.jsonl", "held-back.jsonl")
FILES = ("measurements.npz", "estimate.npz", "plan.json", "evaluation.json", "variants.json", "provenance.json",
         "uniform-test.json")


def with_crew() -> Plugins:
    found = Plugins()
    found.watch(InProcessPlugin())
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def rows_of(folder: Path) -> dict[str, Any]:
    """The rows of the logs. Their order says when the answers came; gradients are put together from parts."""
    found: dict[str, Any] = {}
    for name in LOGS:
        if (folder / name).exists():
            header, *rows = (folder / name).read_text().splitlines()
            found[name] = header, sorted(rows)
    if "gradients.jsonl" in found:
        header, rows = found["gradients.jsonl"]
        readings: dict[str, list[tuple[int, Any]]] = {}
        for row in map(json.loads, rows):
            values, first = row.pop("found"), row.pop("windows", [0])[0]
            readings.setdefault(json.dumps(row), []).append((first, values))
        found["gradients.jsonl"] = header, {key: [window for _, part in sorted(parts) for window in part]
                                            for key, parts in readings.items()}
    return found


def same_rows(alone: Path, shared: Path) -> bool:
    """Whether two runs measured the same. Workers of a refiner may measure what its limit of forwards leaves out."""
    expected, found = rows_of(alone), rows_of(shared)
    more = set(found.get("refinement.jsonl", ("", []))[1]) - set(expected.get("refinement.jsonl", ("", []))[1])
    if more:
        header, rows = found["refinement.jsonl"]
        found["refinement.jsonl"] = header, [row for row in rows if row not in more]
    return expected == found


def forwards(folder: Path) -> float:
    return RunFolder(folder).read_cost().forwards


class Dies:
    """Offers the crew ``dies``, which carries out some tasks and is gone then."""

    left = 0

    def __init__(self, tasks: int) -> None:
        Dies.left = tasks

    @hookimpl
    def impq_crews(self) -> list[Component]:
        return [Component("dies", "stopped:DyingCrew", "")]


class DyingCrew(InProcess):
    def carry_out(self, order: Order, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        for task, answer in super().carry_out(order, tasks):
            if task["kind"] != "variants":
                Dies.left -= 1
            if Dies.left < 0:
                raise ImpqError("the workers are gone")
            yield task, answer


class Stop:
    """Stops the run in a stage, as Ctrl-C does: at the first report of at least so many steps."""

    def __init__(self, stage: str, done: int) -> None:
        self._at = stage, done

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        if stage == self._at[0] and self._at[1] <= done < max(total, 1):
            raise KeyboardInterrupt


def outcome(folder: Path) -> dict[str, bytes]:
    """The results that must be equal bit for bit."""
    names = ("measurements.jsonl", "measurements.npz", "gradients.jsonl", "estimate.npz", "plan.json", "scores.jsonl",
             "evaluation.json", "variants.json", "refinement.jsonl", "referee.jsonl")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def cut(config: RunConfig, stage: str, done: int, *observers: object) -> Path:
    """The folder of a run that was stopped after ``done`` steps of ``stage``."""
    before = set(Path(config.output).glob("*"))
    found = Plugins()
    for observer in (*observers, Stop(stage, done)):
        found.watch(observer)
    with pytest.raises(KeyboardInterrupt):
        run(config, found)
    [folder] = set(Path(config.output).glob("*")) - before
    return folder


def hands(of: int | None = None) -> list[int]:
    """Process ids of the workers below a process, this one by default."""
    import psutil

    return [child.pid for child in psutil.Process(of).children(recursive=True)
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Hand")]
