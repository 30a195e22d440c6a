"""Runs read back from their folders, without the model and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from impq_core.errors import ImpqError
from impq_core.results import RunResult
from impq_core.runs.folder import SWEEP, Cost, RunFolder
from impq_core.types import Measurements


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        folder: of the run.
        losses: measured losses on disk.
        gradients: gradients on disk.
        scores: held-out scores on disk.
        working: whether a process works in the folder.
        error: the last line of the error that ended it; empty if none did.
    """

    folder: Path
    losses: int
    gradients: int
    scores: int
    working: bool
    error: str


def read_run(path: str | Path) -> RunResult:
    """The result of a run that has at least an estimate or a plan, as ``run`` returned it.

    Args:
        path: a run folder.

    Raises:
        ImpqError: it is no run folder, is the folder of a sweep, has no estimate and no plan yet, or a file of it
            cannot be read.
    """
    run = open_run(path)
    plan = run.read_plan() if run.plan.is_file() else None
    estimate = run.read_estimate() if run.estimate.is_file() else None
    if plan is None and estimate is None:
        raise ImpqError(f"{path} has no estimate and no plan yet: impq run --resume {path} goes on")
    measurements: Measurements | None = run.read_measurements() if run.measurements.is_file() else None
    evaluation = run.read_evaluation() if run.evaluation.is_file() else None
    cost = run.read_cost() if run.cost.is_file() else Cost(estimate.forwards if estimate else 0.0)
    return RunResult(run.path, run.read_config(), plan, evaluation, estimate, measurements, cost.measured_loss,
                     cost.forwards, cost.rest_bytes, dict(cost.seconds), _digests(run), run.read_uniform_test())


def open_run(path: str | Path) -> RunFolder:
    """A run folder; raises ImpqError if it is none, or that of a sweep."""
    if (Path(path).expanduser() / SWEEP).is_file():
        raise ImpqError(f"{path} is the folder of a sweep: give one of {path}/runs, or impq compare {path}")
    return RunFolder.open(path)


def progress_of(path: str | Path) -> Progress:
    """How far a run has come; raises ImpqError as ``open_run``."""
    run = open_run(path)
    working = False
    try:
        with run.locked():
            pass
    except ImpqError:
        working = True
    except OSError:  # a folder that this user cannot write
        pass
    error = run.error.read_text().strip().splitlines()[-1:] if run.error.is_file() else []
    return Progress(run.path, _rows(run.losses), _rows(run.slopes), _rows(run.scores), working, "".join(error))


def _rows(log: Path) -> int:
    """Complete lines of a log behind its header."""
    return max(0, log.read_bytes().count(b"\n") - 1) if log.is_file() else 0


def _digests(run: RunFolder) -> dict[str, str]:
    """Digests of the tokens of both texts, by role."""
    if not run.provenance.is_file():
        return {}
    key = run.read_json(run.provenance)
    texts = {"calibration": (key.get("losses") or {}).get("calibration"), "evaluation": key.get("evaluation")}
    return {role: str(text["tokens"]) for role, text in texts.items() if isinstance(text, dict) and "tokens" in text}


