"""MLflow as an observer of runs and sweeps; a run does not depend on it once it has started."""

from __future__ import annotations

import hashlib
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.config import RunConfig
from impq_core.credentials import without_secret
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder
from impq_core.tracking.pages import (
    NOTE_TAG,
    experiment_note,
    experiment_tags,
    markdown_table,
    run_name,
    run_note,
    run_numbers,
    run_params,
    shortened,
    sweep_name,
    text_inputs,
)
from impq_core.tracking.store import (
    FOLDER_TAG,
    HOST_TAG,
    check_store,
    connect,
    create_store,
    experiment_name,
    reason,
    sqlite_file,
    store_lock,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from impq_core.curve import Curve
    from impq_core.results import RunResult
    from impq_core.space import FloatArray, IntArray, SearchSpace
    from impq_core.types import Measurements, Plan, SensitivityEstimate

KEY_TAG = "impq.key"
"""Tag with a digest of the path of the run's folder: MLflow's search cannot express every path."""

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000
LONGEST_PARAM = 6000
LONGEST_NAME = 250


class Tracker:
    """Keeps each impq run as one MLflow run, and the runs of a sweep below a run for the sweep. Anything that fails to
    be logged after the start is reported, and the run continues. A resumed run continues its MLflow run.

    Args:
        uri: tracking URI; empty for ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the working folder.
        experiment: MLflow experiment; empty for ``MLFLOW_EXPERIMENT_NAME``, or ``impq``.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment_name = store_uri(uri), experiment_name(experiment)
        self._open: list[tuple[str, RunFolder]] = []  # a sweep, then its current run
        self._parent: RunFolder | None = None  # the folder of the open sweep
        self._evaluations = self._logged = 0
        self._sizes: dict[str, float] = {}

    @property
    def run_id(self) -> str:
        """Id of the MLflow run that is logged to."""
        return self._open[-1][0]

    @hookimpl
    def impq_sweep_started(self, config: RunConfig, folder: Path, varied: Mapping[str, Sequence[str]]) -> None:
        """Open the sweep's run, or that of the run whose further budgets are measured; its children repeat its
        parameters with their own values."""
        self._parent = RunFolder(folder)
        self._start(self._parent, sweep_name(varied),
                    {**dict(run_params(config)), **{name: ",".join(values) for name, values in varied.items()}})
        if (folder / SWEEP).is_file():
            self._client.set_tag(self.run_id, "impq.kind", "sweep")

    @hookimpl
    def impq_curve_ready(self, curves: tuple[Curve, ...]) -> None:
        """Log loss and divergence of each plan as step metrics, with its bytes as the step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [(name, value, point.nbytes) for curve in curves for point in curve.points
                  for name, value in (("curve_excess", point.excess.mean), ("curve_kl", point.divergence.mean))]
        self._log([Metric(name, value, now, step) for name, value, step in values])

    @hookimpl
    def impq_sweep_finished(self, folder: Path) -> None:
        """Close the sweep's run, with a table of its children."""
        try:
            if (folder / SWEEP).is_file():
                self._client.set_tag(self.run_id, NOTE_TAG, self._overview())
        finally:
            self._end("FINISHED")

    def _overview(self) -> str:
        """Markdown table of the runs of a sweep, the best first."""
        parent = self._client.get_run(self.run_id).info
        runs = self._client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{self.run_id}'",
                                        max_results=1000, order_by=["metrics.nll ASC"])
        shown = ("bits_nominal", "nll", "nll_stderr", "search_forwards")
        rows = [[run.info.run_name, *(f"{run.data.metrics[name]:.4g}" if name in run.data.metrics else ""
                                      for name in shown)] for run in runs]
        return shortened(markdown_table(("run", *shown), rows))

    @hookimpl
    def impq_run_started(self, config: RunConfig, space: SearchSpace, folder: Path) -> None:
        """Open the run before the weights are loaded, so that nothing is computed untracked."""
        self._config = config
        self._start(RunFolder(folder), run_name(config), {**dict(run_params(config)), "layers": len(space),
                                                          "quantizable_weights": space.parameters})

    def _start(self, folder: RunFolder, name: str, params: Mapping[str, Any]) -> None:
        """Open an MLflow run for a folder, or the one that the folder had; raises ImpqError if the store refuses."""
        # An interrupt may have kept an earlier run from being closed.
        self._open = [(run_id, opened) for run_id, opened in self._open if opened == self._parent]
        check_store(self.uri)
        import logging

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised as well
        self._evaluations, self._logged, self._sizes = 0, 0, {}
        try:
            with store_lock(self.uri):
                create_store(self.uri)
                self._client: MlflowClient = connect(self.uri)
                experiment = self._experiment()
                run = self._earlier_run(folder, experiment) or self._client.create_run(
                    experiment, run_name=name[:LONGEST_NAME], tags=self._tags(folder))
            run_id = run.info.run_id
            folder.write_json(folder.tracking, {"uri": without_secret(self.uri), "run_id": run_id})
            self._open.append((run_id, folder))
            from mlflow.entities import Param

            # A parameter that is there cannot be changed, and other versions of impq may have written it otherwise.
            entries = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()
                       if key not in run.data.params]
            for batch in _batches(entries, PARAMS_PER_BATCH):
                self._client.log_batch(run_id, params=batch)
            self._client.log_artifact(run_id, str(folder.config))
        except ImpqError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
            raise ImpqError(f"tracking store {without_secret(self.uri)} cannot be used: {reason(error)}") from error

    def _tags(self, folder: RunFolder) -> dict[str, str]:
        tags = {FOLDER_TAG: str(folder.path), KEY_TAG: _key(folder), HOST_TAG: platform.node(),
                "mlflow.source.name": f"impq {folder.path.name}", "mlflow.source.type": "LOCAL"}
        return tags | ({"mlflow.parentRunId": self.run_id} if self._open else {})

    def _earlier_run(self, folder: RunFolder, experiment: str) -> Run | None:
        """The MLflow run that a folder had, set to RUNNING; None if it had none, or the store does not have it."""
        run = self._recorded_run(folder) or next(iter(self._client.search_runs(
            [experiment], f"tags.`{KEY_TAG}` = '{_key(folder)}'", max_results=1)), None)
        if run is None:
            return None
        run_id = run.info.run_id
        self._client.update_run(run_id, status="RUNNING")
        history = self._client.get_metric_history(run_id, "measured_loss")
        self._logged = max((point.step + 1 for point in history), default=0)
        return run

    def _recorded_run(self, folder: RunFolder) -> Run | None:
        """The MLflow run that mlflow.json names; None if the store does not have it, or it is that of another folder,
        of which this one is a copy."""
        from mlflow.exceptions import MlflowException

        if not folder.tracking.exists():
            return None
        try:
            run = self._client.get_run(folder.read_json(folder.tracking).get("run_id", ""))
        except MlflowException:
            return None
        other = Path(run.data.tags.get(FOLDER_TAG, ""))
        copied = other != folder.path and other.is_dir()
        return None if copied or run.info.lifecycle_stage != "active" else run

    def _experiment(self) -> str:
        """Id of the experiment, which is made if there is none."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            location = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or None
            if file := sqlite_file(self.uri):
                location = location or (file.parent / "mlartifacts").as_uri()
            try:
                number = self._client.create_experiment(self._experiment_name, artifact_location=location)
                return self._set_up(number, {})
            except MlflowException:  # another user's process may have made it in between
                experiment = self._client.get_experiment_by_name(self._experiment_name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise ImpqError(f"the MLflow experiment '{self._experiment_name}' is deleted: restore it or take another "
                            "--experiment")
        return self._set_up(experiment.experiment_id, experiment.tags)

    def _set_up(self, experiment_id: str, tags: Mapping[str, str]) -> str:
        """Give an experiment the view; existing tags may have been edited and are kept."""
        for name, value in {**experiment_tags(), NOTE_TAG: experiment_note(experiment_id)}.items():
            if name not in tags:
                self._client.set_experiment_tag(experiment_id, name, value)
        return experiment_id

    @hookimpl
    def impq_variants_ready(self, nbytes: int, seconds: float) -> None:
        """Log the size of all variants at the end only: MLflow's comparison plots the metric that was logged first."""
        self._sizes = {"variants_bytes": nbytes}

    @hookimpl
    def impq_measured(self, picks: IntArray, losses: FloatArray, forwards: float) -> None:
        """Log every loss as a step metric."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric("measured_loss", float(loss), now, step) for step, loss in enumerate(losses, self._evaluations)
                 if step >= self._logged]
        self._evaluations += len(losses)
        batch.append(Metric("forwards", forwards, now, self._evaluations))
        self._log(batch)

    @hookimpl
    def impq_estimate_ready(self, estimate: SensitivityEstimate, measurements: Measurements | None) -> None:
        """Log convergence: the mean standard error of the Shapley values by number of permutations."""
        if measurements is None:
            self._client.update_run(self.run_id, name=run_name(self._config, fitted=False))
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric("shapley_stderr", float(value), now, step)
                   for step, value in enumerate(measurements.convergence(), start=2)])

    @hookimpl
    def impq_plan_ready(self, plan: Plan) -> None:
        """Log size and prediction of the plan."""
        numbers = {"bytes": plan.nbytes, "bits_nominal": plan.space.nominal_bits(plan.nbytes),
                   "bits_stored": plan.space.bits_per_weight(plan.nbytes),
                   "predicted_loss" if plan.is_loss else "predicted_score": plan.predicted_loss}
        self._metrics({name: value for name, value in numbers.items() if value is not None})

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Log quality, cost, texts, figures and every file of the run."""
        from PIL import Image

        from impq_core.tracking.figures import draw_figures

        try:
            self._metrics({**run_numbers(result), **self._sizes,
                           **{f"seconds_{stage}": s for stage, s in result.seconds.items()}})
            self._client.log_inputs(self.run_id, datasets=text_inputs(result))
            self._client.set_tag(self.run_id, NOTE_TAG, run_note(result))
            for path in draw_figures(result, RunFolder(result.folder).figures):
                # In addition to the file: MLflow's comparison shows only images that were logged by key.
                with Image.open(path) as image:
                    self._client.log_image(self.run_id, image.convert("RGB"), key=path.stem, step=0)
        finally:
            self._end("FINISHED")

    @hookimpl
    def impq_run_failed(self, error: BaseException) -> None:
        """Close the run, or the sweep if none of its runs is open: as KILLED if it was stopped, else as FAILED."""
        if self._open:
            text = without_secret("".join(traceback.format_exception_only(error)).strip())[:4000]
            try:
                self._client.set_tag(self.run_id, "error", text)
            finally:
                self._end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _metrics(self, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric(name, float(value), now, 0) for name, value in numbers.items()])

    def _log(self, metrics: list[Any]) -> None:
        for batch in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=batch)

    def _end(self, status: str) -> None:
        """Log the files of the run's folder and close the run."""
        from impq_core.exports.manifest import MANIFEST

        run_id, folder = self._open.pop()
        try:
            for item in sorted(folder.path.iterdir()):
                exported = (item / MANIFEST).exists()  # a LoggedModel names it; its weights are not copied
                if not item.name.startswith(".") and item.name != CHILDREN and not exported:
                    log = self._client.log_artifacts if item.is_dir() else self._client.log_artifact
                    log(run_id, str(item), *([item.name] if item.is_dir() else []))
        finally:
            self._client.set_terminated(run_id, status)


def _key(folder: RunFolder) -> str:
    return hashlib.sha256(str(folder.path).encode()).hexdigest()[:32]


def _batches(entries: list[Any], size: int) -> Iterator[list[Any]]:
    return (entries[start:start + size] for start in range(0, len(entries), size))
