"""Tasks and answers in the MLflow run of the run folder that they were measured for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.paired_answers import FILE as ANSWERS
from impq_core.paired_answers import AnswerTable
from impq_core.runs.folder import RunFolder
from impq_core.task_scores import FILE as TASKS
from impq_core.task_scores import TaskScore, TaskTable
from impq_core.tracking.store import check_store, connect, sqlite_file, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def tracked_run(folder: RunFolder) -> tuple[MlflowClient, str] | None:
    """The store of a run folder's MLflow run, and the run's id; None if the folder has none.

    Raises:
        ImpqError: the store does not answer, or its file is gone.
    """
    if not folder.tracking.exists():
        return None
    tracked = folder.read_json(folder.tracking)
    uri = store_uri(tracked["uri"])
    check_store(uri)
    if (file := sqlite_file(uri)) and not file.exists():
        raise ImpqError(f"tracking store {uri} is gone")  # MLflow would make an empty one
    return connect(uri), tracked["run_id"]


class MeasuredTracker:
    """Logs tasks as metrics, and tasks and answers as files; does nothing for untracked runs and exported folders."""

    @hookimpl
    def impq_tasks_measured(self, tasks: TaskTable, folder: Path) -> None:
        """Log ``task/NAME.METRIC`` of the plan, ``task_minus_unquantized/NAME.METRIC``, and
        ``reference_task/ROW/NAME.METRIC`` of the other models."""
        from mlflow.entities import Metric

        if tracked := tracked_run(RunFolder(folder)):
            client, run_id = tracked
            now = int(time.time() * 1000)
            numbers = {}
            for score in tasks.scores:
                name = _metric(score)
                numbers[f"task/{name}" if score.row == "plan" else f"reference_task/{_word(score.row)}/{name}"] = (
                    score.value)
                if score.row == "plan" and (difference := tasks.against_unquantized(score)):
                    numbers[f"task_minus_unquantized/{name}"] = difference.mean
            client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in numbers.items()])
            client.log_artifact(run_id, str(folder / TASKS))

    @hookimpl
    def impq_answered(self, answers: AnswerTable, folder: Path) -> None:
        """Log the answers as a file."""
        if tracked := tracked_run(RunFolder(folder)):
            client, run_id = tracked
            client.log_artifact(run_id, str(folder / ANSWERS))


def _metric(score: TaskScore) -> str:
    return _word(score.task) + "." + _word(score.metric) + ("" if score.filter == "none" else f".{_word(score.filter)}")


def _word(text: str) -> str:
    """A name with the characters that MLflow accepts in one."""
    return "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in text)
