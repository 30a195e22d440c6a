"""Finished runs, found and read from their folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.compare.contest import Contest, Contestant, Scored, block_of
from impq_core.errors import ImpqError
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder
from impq_core.space import FloatArray

DEPTH = 3
"""How far below a folder run folders are looked for."""


def gather(paths: Sequence[str | Path]) -> tuple[tuple[Contest, ...], tuple[str, ...]]:
    """Read finished runs and group them.

    Args:
        paths: run folders, or folders that hold run folders up to ``DEPTH`` below.

    Returns:
        The contests, in the order of their first runs; and a line about each run that has not finished.

    Raises:
        ImpqError: a folder is missing or holds no finished run, or a file of a run is broken.
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
    for one in map(read_contestant, finished):
        windows = one.unquantized.window_nll
        assert windows is not None
        contests.setdefault((one.config.model, one.text, one.tokens, tuple(windows)), []).append(one)
    return tuple(Contest(tuple(those)) for those in contests.values()), tuple(dict.fromkeys(notes))


def read_contestant(path: Path) -> Contestant:
    """Read a finished run folder.

    Raises:
        ImpqError: a file is missing or broken; the message names it.
    """
    run = RunFolder.open(path)
    config = run.read_config()
    scores, plan, cost = (run.read_json(file) for file in (run.evaluation, run.plan, run.cost))
    with _naming(run.evaluation):
        text, tokens, rows = str(scores["text"]), int(scores["tokens"]), _rows(scores["rows"])
    with _naming(run.plan):
        widths = {name: None if choice is None else float(choice["bits"])
                  for name, choice in sorted(plan["layers"].items(), key=lambda item: block_of(item[0]))}
        budget_bytes, bits = int(plan["budget_bytes"]), float(plan["bits_nominal"])
        told = dict(plan.get("provenance", {}))
    with _naming(run.cost):
        forwards = float(cost["forwards"])
    estimate = run.read_estimate() if run.estimate.is_file() else None
    provenance = run.read_json(run.provenance) if run.provenance.is_file() else told
    return Contestant(run.path, config, text, tokens, rows, budget_bytes, bits, widths, forwards,
                      run.measurements.is_file(), estimate, _convergence(run), provenance)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a file's content breaks is said to be broken by that file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ImpqError(f"{path} is not what a run writes: {type(error).__name__}: {error}") from error


def _runs(folder: Path, depth: int) -> Iterator[RunFolder]:
    """The run folders at or below a folder. A configuration alone makes none where runs lie below: people keep theirs
    in the folder they work in."""
    run = RunFolder(folder)
    if run.config.is_file() and run.evaluation.is_file():
        yield run
        return
    below = []
    if (folder / SWEEP).is_file():  # what else is in a sweep's folder are no runs
        yield from _runs(folder / CHILDREN, depth) if (folder / CHILDREN).is_dir() else ()
        return
    if depth:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        below = [one for path in inside for one in _runs(path, depth - 1)]
    yield from below
    if run.config.is_file() and not below:
        yield run


def _rows(data: Iterable[Mapping[str, Any]]) -> tuple[Scored, ...]:
    rows = []
    for row in data:
        nbytes = None if row["bytes"] is None else int(row["bytes"])
        if "window_nll" in row:
            windows = np.array(row["window_nll"], dtype=np.float64)
            if windows.ndim != 1 or not len(windows):
                raise ValueError(f"window_nll of '{row['name']}' is no list of numbers")
            rows.append(Scored(str(row["name"]), nbytes, float(windows.mean()), windows))
        else:
            rows.append(_interpolated(rows, str(row["name"]), nbytes, float(row["nll"])))
    scored = {row.name for row in rows if row.window_nll is not None}
    if not rows or rows[0].nbytes is None or not {rows[0].name, "unquantized"} <= scored:
        raise ValueError("the first row must be a plan with its bytes, and another the unquantized model")
    if len({len(row.window_nll) for row in rows if row.window_nll is not None}) > 1:
        raise ValueError("its rows have different numbers of windows")
    return tuple(rows)


def _interpolated(rows: Sequence[Scored], name: str, nbytes: int | None, nll: float) -> Scored:
    """A row between uniform models, with what the same interpolation gives for each window: its error is then known
    as well as a measured row's."""
    points = sorted((row.nbytes, row.nll, tuple(row.window_nll)) for row in rows
                    if row.kind == "uniform" and row.nbytes is not None and row.window_nll is not None)
    if name == "line low-high":
        points = points[::max(1, len(points) - 1)]
    if points and nbytes is not None:
        sizes, _, windows = zip(*points, strict=True)
        between = np.array([np.interp(nbytes, sizes, losses) for losses in np.array(windows).T])
        if math.isclose(between.mean(), nll, rel_tol=1e-9):
            return Scored(name, nbytes, nll, between)
    return Scored(name, nbytes, nll)


def _convergence(run: RunFolder) -> FloatArray:
    """Forwards spent and the standard error by then; measurements that are no whole permutations tell of none."""
    stderr: FloatArray = np.zeros(0)
    forwards = 0.0
    if run.measurements.is_file():
        measurements = run.read_measurements()
        forwards = measurements.forwards
        with suppress(ImpqError, ValueError):
            stderr = measurements.convergence()
    replicates = np.arange(2, len(stderr) + 2)
    return np.array([forwards * replicates / (len(stderr) + 1), stderr])
