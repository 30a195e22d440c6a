"""Finished runs, read from their folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant, block_of
from impq_core.errors import ImpqError
from impq_core.paired_answers import FILE as ANSWERS
from impq_core.paired_answers import AnswerTable
from impq_core.runs.curves import finished_runs
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder
from impq_core.space import Choice, FloatArray
from impq_core.task_scores import FILE as TASKS
from impq_core.task_scores import TaskTable

DEPTH = 3
"""Levels of folders below a given one that are searched for run folders."""


def gather(paths: Sequence[str | Path]) -> tuple[tuple[Contest, ...], tuple[str, ...]]:
    """Read finished runs and group them by model and held-out windows; a run with several held-out texts takes part in
    a contest on each.

    Args:
        paths: run folders, or folders that hold run folders up to ``DEPTH`` levels below.

    Returns:
        The contests, in the order of their first runs; and a note for each run that is left out, because it has not
        finished or because a file of it cannot be used.

    Raises:
        ImpqError: a folder is missing or holds no finished run, or no finished run can be used.
    """
    finished: dict[Path, None] = {}
    notes = []
    for path in paths:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ImpqError(f"{path}: no such folder; give run folders, or folders that hold some")
        runs = list(_runs(folder.resolve(), DEPTH))
        done = [run for run in runs if run.evaluation.is_file()]
        notes += [f"{run.path.name} has not finished: it is left out" for run in runs if run not in done]
        if not done:
            raise ImpqError(f"{path} holds no finished run: 'impq run' makes them")
        finished |= dict.fromkeys(run.path for run in done)
    contests: dict[Any, list[Contestant]] = {}
    problems = []
    for path in finished:
        try:
            run = read_contestant(path)
        except ImpqError as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        for text in run.evaluation.texts:
            on_text = replace(run, evaluation=text)
            scored = (run.config.model, text.text, text.tokens, text.sequential,
                      on_text.unquantized.window_nll.tobytes())
            contests.setdefault(scored, []).append(on_text)
    if not contests:
        more = f" (and {len(problems) - 1} more runs cannot be used)" if len(problems) > 1 else ""
        raise ImpqError(f"no run to compare: {problems[0]}{more}")
    notes += [f"{problem}: the run is left out" for problem in problems]
    return tuple(Contest(tuple(runs)) for runs in contests.values()), tuple(dict.fromkeys(notes))


def read_contestant(path: Path) -> Contestant:
    """Read a finished run folder.

    Raises:
        ImpqError: a file is missing or cannot be used; the message names it.
    """
    run = RunFolder.open(path)
    config, evaluation = run.read_config(), run.read_evaluation()
    plan, forwards = run.read_json(run.plan), run.read_cost().forwards
    with _naming(run.plan):
        widths = {name: None if choice is None else Choice.of(choice)
                  for name, choice in sorted(plan["layers"].items(), key=lambda item: block_of(item[0]))}
        budget_bytes, bits = int(plan["budget_bytes"]), float(plan["bits_nominal"])
        provenance = dict(plan.get("provenance", {}))
    if run.provenance.is_file():
        provenance = run.read_json(run.provenance)
    estimate = run.read_estimate() if run.estimate.is_file() else None
    tasks, answers = run.path / TASKS, run.path / ANSWERS
    return Contestant(run.path, config, evaluation, budget_bytes, bits, widths, forwards, run.measurements.is_file(),
                      estimate, _convergence(run), provenance,
                      TaskTable.load(tasks) if tasks.is_file() else TaskTable(),
                      AnswerTable.load(answers) if answers.is_file() else AnswerTable())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise errors in the content of a file as ImpqError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ImpqError(f"{path} is not what a run writes: {type(error).__name__}: {error}") from error


def _runs(folder: Path, depth: int) -> Iterator[RunFolder]:
    """The run folders at or below a folder. A folder with a configuration and runs below it is no run: people keep an
    impq.toml in their working folder."""
    run = RunFolder(folder)
    if run.config.is_file() and run.evaluation.is_file():
        yield from finished_runs(run)
        return
    below = []
    if (folder / SWEEP).is_file():  # other folders of a sweep hold measurements, not runs
        yield from _runs(folder / CHILDREN, depth) if (folder / CHILDREN).is_dir() else ()
        return
    if depth:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        below = [child for path in inside for child in _runs(path, depth - 1)]
    yield from below
    if run.config.is_file() and not below:
        yield run


def _convergence(run: RunFolder) -> FloatArray:
    """(2, K): forwards spent and the standard error at that point; K is 0 for measurements that are no whole
    permutations."""
    stderr: FloatArray = np.zeros(0)
    forwards = 0.0
    if run.measurements.is_file():
        measurements = run.read_measurements()
        forwards = measurements.forwards
        with suppress(ImpqError, ValueError):
            stderr = measurements.convergence()
    replicates = np.arange(2, len(stderr) + 2)
    return np.array([forwards * replicates / (len(stderr) + 1), stderr])
