"""Curves of finished runs, read from their folders without the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.curve import Curve, Outcome, Point, curves_data
from impq_core.errors import ImpqError, UsageError
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder
from impq_core.target import Target, check_steps

CURVE = "curve.json"
"""The file with the curves of a folder."""


def check_wanted(budgets: Sequence[str], target: str, steps: int) -> Target | None:
    """The target, if there is one; raises UsageError if it or a budget is wrong, or if both are given."""
    if target and budgets:
        raise UsageError("--target chooses the budgets: leave out --budget")
    check_steps(steps)
    if not all(budgets):
        raise UsageError("--budget takes budgets such as 2.5bits,60MB, with nothing left out between the commas")
    for budget in budgets:
        Budget.parse(budget)
    return Target.parse(target) if target else None


def read_curves(path: str | Path) -> tuple[Curve, ...]:
    """The curves of a folder: of a run with the plans of its further budgets, or one for each combination of parts of a
    sweep.

    Raises:
        ImpqError: it is no run and no sweep, nothing in it has finished, or a file cannot be used.
    """
    root = RunFolder.open(path)
    found: dict[tuple[Any, ...], list[Point]] = {}
    parts: dict[tuple[Any, ...], dict[str, str]] = {}
    for run in finished_runs(root):
        config = run.read_config()
        names = parts_of(config, run.measurements.is_file())
        key = tuple(names.items())
        parts[key] = names
        found.setdefault(key, []).append(read_point(run, config))
    if not found:
        raise ImpqError(f"{path} has no finished plan to draw: 'impq curve {path} --budget 2.5bits,3bits' measures "
                        "some")
    return tuple(Curve(parts[key], tuple(sorted(points, key=lambda point: (point.nbytes, point.budget_bytes))))
                 for key, points in found.items())


def finished_runs(root: RunFolder) -> Iterator[RunFolder]:
    """The finished runs of a folder: itself, if it is a run, and those of its budgets or of its sweep."""
    below = root.path / CHILDREN
    inside = sorted(path for path in below.iterdir() if path.is_dir()) if below.is_dir() else []
    runs = [*([] if (root.path / SWEEP).is_file() else [root]), *map(RunFolder, inside)]
    yield from (run for run in runs if run.evaluation.is_file())


def read_point(run: RunFolder, config: RunConfig | None = None) -> Point:
    """A finished run as a point of a curve; raises ImpqError if a file cannot be used."""
    plan = run.read_json(run.plan)
    budget, file_bytes = plan.get("budget_bytes"), plan.get("file_bytes")
    if type(budget) is not int or type(file_bytes) not in (int, type(None)):
        raise ImpqError(f"{run.plan} is not what a run writes: 'budget_bytes' and 'file_bytes' are whole numbers")
    return Point(run.path, (config or run.read_config()).budget, budget, file_bytes, run.read_evaluation())


def earlier_answer(root: RunFolder, curves: tuple[Curve, ...]) -> Outcome | None:
    """The answer of the curve to the target that ``curve.json`` has, if it has one; raises ImpqError if it cannot be
    read."""
    if len(curves) != 1 or not (root.path / CURVE).is_file():
        return None
    target = root.read_json(root.path / CURVE).get("target")
    if not isinstance(target, dict) or not isinstance(target.get("target"), str):
        return None
    return Outcome(Target.parse(target["target"]), curves[0])


def save_curves(root: RunFolder, curves: tuple[Curve, ...], answer: Outcome | None = None) -> dict[str, Any]:
    """Write ``curve.json``; returns its content."""
    data = curves_data(root.read_config().model, curves, answer, root.path)
    root.write_json(root.path / CURVE, data)
    return data


def parts_of(config: RunConfig, fitted: bool) -> dict[str, str]:
    """Names of the parts that make a plan, by slot; that of a surrogate if losses were ``fitted``."""
    if config.plan:
        return {"backend": config.backend, "allocator": "given"}
    names = {"backend": config.backend, "estimator": config.estimator}
    if config.estimate_with:
        names["estimate_with"] = config.estimate_with
    if fitted:
        names["surrogate"] = config.surrogate
    names["allocator"] = config.allocator
    return {**names, "refiner": f"{config.refiner} {config.refine}"} if config.refine else names
