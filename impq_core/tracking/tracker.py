"""MLflow, as an observer of a run: it watches, and the run would go on without it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.runs.folder import CHILDREN, RunFolder
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
from impq_core.tracking.store import FOLDER_TAG, check_store, create_store, store_lock, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from impq_core.results import RunResult
    from impq_core.space import FloatArray, IntArray, SearchSpace
    from impq_core.types import Measurements, Plan, SensitivityEstimate


class Tracker:
    """Keeps each impq run as one MLflow run, and a sweep's under one of its own; what later fails to be logged is
    reported and the run goes on. A run that is resumed goes on in the MLflow run it had."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment_name = store_uri(uri), experiment
        self.run_id = self._parent_id = ""
        self._folder = RunFolder(Path())
        self._evaluations = self._logged = 0
        self._sizes: dict[str, float] = {}

    @hookimpl
    def impq_sweep_started(self, config: RunConfig, folder: Path, varied: Mapping[str, Sequence[str]]) -> None:
        """Open the parent; the children repeat its parameters with what is theirs."""
        self._open(RunFolder(folder), sweep_name(varied),
                   {**dict(run_params(config)), **{name: ",".join(values) for name, values in varied.items()}})
        self._client.set_tag(self.run_id, "impq.kind", "sweep")
        self._parent_id = self.run_id

    @hookimpl
    def impq_sweep_finished(self, folder: Path) -> None:
        """Close it, with a table of its runs."""
        self.run_id, self._folder, self._parent_id = self._parent_id, RunFolder(folder), ""
        try:
            self._client.set_tag(self.run_id, NOTE_TAG, self._overview())
        finally:
            self._end("FINISHED")

    def _overview(self) -> str:
        """The runs of a sweep, best first, as Markdown."""
        parent = self._client.get_run(self.run_id).info
        runs = self._client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{self.run_id}'",
                                        max_results=1000, order_by=["metrics.nll ASC"])
        shown = ("bits_nominal", "nll", "nll_stderr", "search_forwards")
        rows = [[run.info.run_name, *(f"{run.data.metrics[name]:.4g}" if name in run.data.metrics else ""
                                      for name in shown)] for run in runs]
        return shortened(markdown_table(("run", *shown), rows))

    @hookimpl
    def impq_run_started(self, config: RunConfig, space: SearchSpace, folder: Path) -> None:
        """Open the run before the weights are loaded, so that nothing is ever computed untracked."""
        self._config = config
        self._open(RunFolder(folder), run_name(config), {**dict(run_params(config)), "layers": len(space),
                                                         "quantizable_weights": space.parameters})

    def _open(self, folder: RunFolder, name: str, params: Mapping[str, Any]) -> None:
        check_store(self.uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import logging

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it meets is raised as well
        from mlflow import MlflowClient

        self._folder, self._evaluations, self._logged, self._sizes = folder, 0, 0, {}
        try:
            with store_lock(self.uri):
                create_store(self.uri)
                self._client: MlflowClient = MlflowClient(self.uri)
                experiment = self._experiment()
                if not self._reopen(experiment):
                    tags = {FOLDER_TAG: str(folder.path), "mlflow.source.name": f"impq {folder.path.name}",
                            "mlflow.source.type": "LOCAL",
                            **({"mlflow.parentRunId": self._parent_id} if self._parent_id else {})}
                    self.run_id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
            folder.write_json(folder.tracking, {"uri": self.uri, "run_id": self.run_id})
            self._client.log_batch(self.run_id, params=_params(params.items()))
            self._client.log_artifact(self.run_id, str(folder.config))
        except ImpqError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
            reason = " ".join(str(error).split())[:200]
            raise ImpqError(f"tracking store {self.uri} cannot be used: {reason}") from error

    def _reopen(self, experiment: str) -> bool:
        """Go on in the MLflow run that the folder had, where it is in this store still."""
        path = str(self._folder.path).replace("'", "''")
        for run in self._client.search_runs([experiment], f"tags.`{FOLDER_TAG}` = '{path}'", max_results=1):
            self.run_id = run.info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            history = self._client.get_metric_history(self.run_id, "measured_loss")
            self._logged = max((point.step + 1 for point in history), default=0)
            return True
        return False

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment_name)
        if known is not None:
            if known.lifecycle_stage != "active":
                raise ImpqError(f"the MLflow experiment '{self._experiment_name}' is deleted: restore it or take "
                                "another --experiment")
            return self._set_up(known.experiment_id, known.tags)
        location = None
        if self.uri.startswith("sqlite:"):
            location = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return self._set_up(self._client.create_experiment(self._experiment_name, artifact_location=location), {})

    def _set_up(self, experiment_id: str, tags: Mapping[str, str]) -> str:
        """Give an experiment the view; what is there already, somebody may have edited."""
        for name, value in {**experiment_tags(), NOTE_TAG: experiment_note(experiment_id)}.items():
            if name not in tags:
                self._client.set_experiment_tag(experiment_id, name, value)
        return experiment_id

    @hookimpl
    def impq_variants_ready(self, nbytes: int, seconds: float) -> None:
        """Keep the size of all variants for the end: MLflow's comparison plots the metric that came first."""
        self._sizes = {"variants_bytes": nbytes}

    @hookimpl
    def impq_measured(self, picks: IntArray, losses: FloatArray, forwards: float) -> None:
        """Every loss as a step metric, in one batch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric("measured_loss", float(loss), now, step) for step, loss in enumerate(losses, self._evaluations)
                 if step >= self._logged]
        self._evaluations += len(losses)
        batch.append(Metric("forwards", forwards, now, self._evaluations))
        self._log(batch)

    @hookimpl
    def impq_estimate_ready(self, estimate: SensitivityEstimate, measurements: Measurements | None) -> None:
        """Convergence: the mean standard error of the Shapley values as permutations come in."""
        if measurements is None:
            self._client.update_run(self.run_id, name=run_name(self._config, fitted=False))
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric("shapley_stderr", float(value), now, step)
                   for step, value in enumerate(measurements.convergence(), start=2)])

    @hookimpl
    def impq_plan_ready(self, plan: Plan) -> None:
        """Size and prediction of the plan."""
        numbers = {"bytes": plan.nbytes, "bits_nominal": plan.space.nominal_bits(plan.nbytes),
                   "bits_stored": plan.space.bits_per_weight(plan.nbytes),
                   "predicted_loss" if plan.nats else "predicted_score": plan.predicted_loss,
                   "optimality_gap": plan.gap}
        self._metrics({name: value for name, value in numbers.items() if value is not None})

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Quality, cost, texts, figures and every file of the run."""
        from PIL import Image

        from impq_core.tracking.figures import draw_figures

        try:
            self._metrics({**run_numbers(result), **self._sizes,
                           **{f"seconds_{stage}": s for stage, s in result.seconds.items()}})
            self._client.log_inputs(self.run_id, datasets=text_inputs(result))
            self._client.set_tag(self.run_id, NOTE_TAG, run_note(result))
            for path in draw_figures(result, self._folder.figures):
                # Beside the file among the artifacts: only images logged by key are shown next to other runs'.
                with Image.open(path) as image:
                    self._client.log_image(self.run_id, image.convert("RGB"), key=path.stem, step=0)
        finally:
            self._end("FINISHED")
            self.run_id = self._parent_id or self.run_id

    @hookimpl
    def impq_run_failed(self, error: BaseException) -> None:
        """KILLED where somebody stopped the run, else FAILED; the traceback and the log go along."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        for run_id in dict.fromkeys((self.run_id, self._parent_id)):
            if run_id:
                told = "".join(traceback.format_exception_only(error)).strip()[:4000]
                self._client.set_tag(run_id, "error", told)
                if run_id == self.run_id:
                    self._end(status)
                else:
                    self._client.set_terminated(run_id, status)

    def _metrics(self, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric(name, float(value), now, 0) for name, value in numbers.items()])

    def _log(self, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), 1000):  # the store's limit for one batch
            self._client.log_batch(self.run_id, metrics=metrics[start:start + 1000])

    def _end(self, status: str) -> None:
        from impq_core.exports.manifest import MANIFEST

        try:
            for item in sorted(self._folder.path.iterdir()):
                weights = (item / MANIFEST).exists()  # an export is named by a LoggedModel, and not copied
                if not item.name.startswith(".") and item.name != CHILDREN and not weights:
                    log = self._client.log_artifacts if item.is_dir() else self._client.log_artifact
                    log(self.run_id, str(item), *([item.name] if item.is_dir() else []))
        finally:
            self._client.set_terminated(self.run_id, status)


def _params(pairs: Iterable[tuple[str, Any]]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in pairs]
