"""MLflow, as an observer of a run: it watches, and the run would go on without it."""

from __future__ import annotations

import os
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.runfolder import CHILDREN, RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from impq_core.pipeline import RunResult
    from impq_core.space import FloatArray, IntArray, SearchSpace
    from impq_core.types import Measurements, Plan, SensitivityEstimate

FOLDER_TAG = "impq.folder"
"""Tag that says which run folder a run is kept in."""

CONNECT_SECONDS = 5.0
"""How long a tracking server may take to answer before a run is refused."""


def store_uri(uri: str) -> str:
    """The tracking URI meant: ``mlflow.db`` here by default, and SQLite files by their absolute path."""
    path = uri.removeprefix("sqlite:///") if uri else "mlflow.db"
    if not uri or uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(path).absolute()}"
    return uri


def check_store(uri: str) -> None:
    """Refuse a store that cannot be written or does not answer, without waiting for MLflow's many retries.

    Raises:
        ImpqError: the folder of a SQLite file is missing, a server does not answer, or the URI is of another kind.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ImpqError(f"tracking store '{uri}' is not understood: {error}") from error
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        folder = file.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ImpqError(f"tracking store {uri}: the folder {folder} is missing or cannot be written")
        if file.exists() and not _is_sqlite(file):
            raise ImpqError(f"tracking store {uri}: the file there is no SQLite database; give another --tracking-uri")
    elif parts.scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it answers is MLflow's business
        except (OSError, ValueError, HTTPException) as error:
            raise ImpqError(f"tracking server {uri} does not answer ({getattr(error, 'reason', error)}); "
                            "use --tracking-uri none to run without it") from error
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks") and "+" not in parts.scheme:
        raise ImpqError(f"tracking store '{uri}' is not understood: give sqlite:///FILE, http(s)://HOST, or none")


class Tracker:
    """Keeps each impq run as one MLflow run, and a sweep's under one of its own; what later fails to be logged is
    reported and the run goes on. A run that is resumed goes on in the MLflow run it had."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment_name = store_uri(uri), experiment
        self.run_id = self._parent_id = ""
        self._folder = RunFolder(Path())
        self._evaluations = self._logged = 0

    @hookimpl
    def impq_sweep_started(self, config: RunConfig, folder: Path, varied: Mapping[str, Sequence[str]]) -> None:
        """Open the parent; the children repeat its parameters with what is theirs."""
        self._open(RunFolder(folder), {**dict(_flat(config)), **{name: ",".join(v) for name, v in varied.items()}})
        self._client.set_tag(self.run_id, "impq.kind", "sweep")
        self._parent_id = self.run_id

    @hookimpl
    def impq_sweep_finished(self, folder: Path) -> None:
        """Close it."""
        self.run_id, self._folder, self._parent_id = self._parent_id, RunFolder(folder), ""
        self._end("FINISHED")

    @hookimpl
    def impq_run_started(self, config: RunConfig, space: SearchSpace, folder: Path) -> None:
        """Open the run before the weights are loaded, so that nothing is ever computed untracked."""
        self._open(RunFolder(folder), {**dict(_flat(config)), "layers": len(space),
                                       "quantizable_weights": space.parameters})

    def _open(self, folder: RunFolder, params: Mapping[str, Any]) -> None:
        check_store(self.uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import logging

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it meets is raised as well
        from mlflow import MlflowClient

        self._folder, self._evaluations, self._logged = folder, 0, 0
        try:
            with _store_lock(self.uri):
                self._client: MlflowClient = MlflowClient(self.uri)
                if self._reopen():
                    return
                tags = {FOLDER_TAG: str(folder.path),
                        **({"mlflow.parentRunId": self._parent_id} if self._parent_id else {})}
                run = self._client.create_run(self._experiment(), run_name=folder.path.name, tags=tags)
            self.run_id = run.info.run_id
            folder.write_json(folder.tracking, {"uri": self.uri, "run_id": self.run_id})
            self._client.log_batch(self.run_id, params=_params(params.items()))
            self._client.log_artifact(self.run_id, str(folder.config))
        except ImpqError:
            raise
        except Exception as error:  # mlflow, the database and its driver each raise their own
            reason = " ".join(str(error).split())[:200]
            raise ImpqError(f"tracking store {self.uri} cannot be used: {reason}") from error

    def _reopen(self) -> bool:
        """Go on in the MLflow run that the folder had, where it is in this store still."""
        from mlflow.exceptions import MlflowException

        if not self._folder.tracking.exists():
            return False
        known = self._folder.read_json(self._folder.tracking)
        if known.get("uri") != self.uri:
            return False
        try:
            self._client.update_run(known["run_id"], status="RUNNING")
        except (KeyError, MlflowException):
            return False
        self.run_id = known["run_id"]
        history = self._client.get_metric_history(self.run_id, "measured_loss")
        self._logged = max((point.step + 1 for point in history), default=0)
        return True

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment_name)
        if known is not None:
            if known.lifecycle_stage != "active":
                raise ImpqError(f"the MLflow experiment '{self._experiment_name}' is deleted: restore it or take "
                                "another --experiment")
            return str(known.experiment_id)
        location = None
        if self.uri.startswith("sqlite:"):
            location = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(self._experiment_name, artifact_location=location))

    @hookimpl
    def impq_variants_ready(self, nbytes: int, seconds: float) -> None:
        """Size of the bank."""
        self._metrics({"bank_bytes": nbytes})

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
            return
        from mlflow.entities import Metric

        marginals, replicates = measurements.marginals()
        draws = np.stack([marginals[replicates == r].mean(axis=0) for r in np.unique(replicates)])
        if np.isnan(draws).any():
            return  # truncated permutations: their standard errors are in the estimate
        count = np.arange(1, len(draws) + 1)[:, None, None]
        mean, square = draws.cumsum(axis=0) / count, (draws**2).cumsum(axis=0) / count
        stderr = np.sqrt(np.maximum(square - mean**2, 0) / np.maximum(count - 1, 1)).mean(axis=(1, 2))
        now = int(time.time() * 1000)
        self._log([Metric("shapley_stderr", float(value), now, step)
                   for step, value in enumerate(stderr[1:], start=2)])

    @hookimpl
    def impq_plan_ready(self, plan: Plan) -> None:
        """Size and prediction of the plan."""
        numbers = {"bytes": plan.nbytes, "bits_nominal": plan.space.nominal_bits(plan.nbytes),
                   "bits_stored": plan.space.bits_per_weight(plan.nbytes), "predicted_loss": plan.predicted_loss,
                   "optimality_gap": plan.gap}
        self._metrics({name: value for name, value in numbers.items() if value is not None})

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Quality, cost, figures and every file of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        from impq_core.figures import draw_figures

        self._metrics({**_numbers(result), **{f"seconds_{stage}": s for stage, s in result.seconds.items()}})
        inputs = []
        for context in result.digests:
            text = getattr(result.config, context)
            dataset = Dataset(name=f"{text.source}-{context}", digest=result.digests[context], source_type="local",
                              source=text.source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self._client.log_inputs(self.run_id, datasets=inputs)
        draw_figures(result, self._folder.figures)
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
        try:
            for item in sorted(self._folder.path.iterdir()):
                if not item.name.startswith(".") and item.name != CHILDREN:
                    log = self._client.log_artifacts if item.is_dir() else self._client.log_artifact
                    log(self.run_id, str(item), *([item.name] if item.is_dir() else []))
        finally:
            self._client.set_terminated(self.run_id, status)


def orphans(uri: str, close: bool = False) -> list[str]:
    """Names of the impq runs in a store that are RUNNING while nobody is at work in their folders.

    Args:
        uri: the store.
        close: end them as KILLED.

    Raises:
        ImpqError: the store cannot be read.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    found = []
    try:
        with _store_lock(uri):
            client = MlflowClient(uri)
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000)
        for run in runs:
            folder = run.data.tags.get(FOLDER_TAG)
            if folder is not None and not _at_work(Path(folder)):
                found.append(f"{run.info.run_name} ({run.info.run_id})")
                if close:
                    client.set_terminated(run.info.run_id, "KILLED")
    except Exception as error:  # mlflow, the database and its driver each raise their own
        raise ImpqError(f"tracking store {uri} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return found


def _at_work(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        with RunFolder(folder).locked():
            return False
    except ImpqError:
        return True


def _is_sqlite(file: Path) -> bool:
    """Whether a file is a SQLite database, or empty, which SQLite takes for one."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def _store_lock(uri: str) -> FileLock:
    """SQLite stores are created by one process at a time: MLflow's own set-up fails when several race for it."""
    if uri.startswith("sqlite:"):
        return FileLock(uri.removeprefix("sqlite:///") + ".lock")
    import tempfile

    return FileLock(Path(tempfile.gettempdir()) / "impq-tracking.lock")


def _numbers(result: RunResult) -> dict[str, float]:
    """What a run came to; by the names that the MLflow pages show."""
    numbers: dict[str, float] = {"search_forwards": result.forwards, "evaluations": len(result.measurements or ())}
    if result.measured_loss is not None:
        numbers["measured_plan_loss"] = result.measured_loss
    if result.plan is not None:
        numbers["model_bytes"] = result.model_bytes
        if result.plan.predicted_loss is not None and result.measured_loss is not None:
            numbers["surrogate_error"] = result.plan.predicted_loss - result.measured_loss
    if result.evaluation is not None:
        score = result.evaluation.plan
        numbers |= {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
                    "top1_agreement": score.top1}
        for row in result.evaluation.rows[1:]:
            numbers[f"reference_nll/{row.name.replace(' ', '_').replace('/', '_')}"] = row.nll
    return numbers


def _flat(config: RunConfig) -> Iterable[tuple[str, Any]]:
    from dataclasses import asdict

    for key, value in asdict(config).items():
        if key == "options":
            for role, options in value.items():
                yield from ((f"{role}.{name}", option) for name, option in options.items())
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value) if isinstance(
                value, tuple) else value


def _params(pairs: Iterable[tuple[str, Any]]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in pairs]
